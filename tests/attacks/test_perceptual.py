"""LPIPS is computed where weights lie on this machine, and nothing is ever fetched."""

import pytest
import torch

from fedaudit.attacks.perceptual import hindrance, lpips, present, weight_file
from fedaudit.vision import import_torchvision

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder of weights, and a network that cannot be reached."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*arguments, **options):
        raise AssertionError("weights must not be fetched")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path


def test_without_weights_there_is_a_reason_and_no_number(hub):
    assert present() is None
    assert "never downloaded: put one of alexnet-" in hindrance((3, 32, 32))
    with pytest.raises(ValueError, match="never downloaded"):
        lpips(IMAGES, IMAGES)
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize("shape", [(64,), (3, 31, 40), (2, 32, 32)], ids=["flat", "small", "two channels"])
def test_what_is_no_such_image_is_told_apart_from_missing_weights(shape, hub):
    assert "grey or RGB images of at least 32x32" in hindrance(shape)


def test_with_weights_equal_images_have_no_distance_and_noise_adds_to_it(hub):
    torchvision = import_torchvision()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torchvision.models.squeezenet1_1(weights=None)
    weight_file("squeeze").parent.mkdir(parents=True)
    torch.save(network.state_dict(), weight_file("squeeze"))
    assert present() == "squeeze" and hindrance((1, 32, 32)) == ""
    noise = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    distances = [lpips((IMAGES + s * noise).clamp(0, 1), IMAGES) for s in (0.0, 0.05, 0.2)]
    assert distances[0] == 0.0 and 0 < distances[1] < distances[2]
    assert torch.equal(state, torch.get_rng_state())
    assert lpips(255 * IMAGES[:, :1], 255 * IMAGES[:, :1].flip(-1), (0.0, 255.0)) == pytest.approx(
        lpips(IMAGES[:, :1], IMAGES[:, :1].flip(-1)), rel=1e-4
    )
