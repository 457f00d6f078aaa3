"""Latent attributes: what they split, and what is refused."""

import pytest
import torch

from fedaudit.measures.attributes import check_attribute, follows_label, latent_attribute

X = torch.rand(41, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(41) % 3


def test_brightness_is_a_mean_above_the_median() -> None:
    found = latent_attribute("brightness", X, Y)
    order = X.flatten(1).mean(1).argsort()
    assert found.dtype == torch.bool
    assert not found[order[:21]].any()  # the median itself is not above the median
    assert found[order[21:]].all()


def test_contrast_does_not_change_with_brightness() -> None:
    shifts = torch.rand(41, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(latent_attribute("contrast", X + shifts, Y), latent_attribute("contrast", X, Y))
    assert not torch.equal(
        latent_attribute("brightness", X + shifts, Y), latent_attribute("brightness", X, Y)
    )


def test_a_label_attribute_is_the_class_and_follows_the_label() -> None:
    found = latent_attribute("label:2", X, Y)
    assert torch.equal(found, Y == 2)
    assert follows_label(found, Y)
    assert not follows_label(latent_attribute("brightness", X, Y), Y)


def test_an_attribute_that_all_or_none_have_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'label:7' which none of 41 have"):
        latent_attribute("label:7", X, Y)
    with pytest.raises(ValueError, match="got 'label:0' which all of 5 have"):
        latent_attribute("label:0", X[:5], torch.zeros(5))
    with pytest.raises(ValueError, match="got 'contrast' which none of 41 have"):
        latent_attribute("contrast", torch.ones(41, 3), Y)
    with pytest.raises(ValueError, match="got 'brightness' which none of 0 have"):
        latent_attribute("brightness", X[:0], Y[:0])


@pytest.mark.parametrize("spec", ["sharpness", "label:", "label:-1", "label:x", "Brightness", ""])
def test_an_unknown_attribute_is_answered_with_the_known_ones(spec: str) -> None:
    with pytest.raises(ValueError, match="one of brightness, contrast, label:K"):
        check_attribute(spec)
