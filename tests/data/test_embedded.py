"""The two datasets that need no download."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_image

from fedaudit.config.sections import DataConfig
from fedaudit.data.dataset import load_dataset
from fedaudit.data.embedded import digits, patches
from fedaudit.errors import ConfigError


def test_digits_are_the_sixteen_grey_levels_of_the_source():
    dataset = digits()
    assert torch.equal((dataset.x * 16).long().squeeze(1), torch.from_numpy(load_digits().images).long())
    assert torch.equal(dataset.y, torch.from_numpy(load_digits().target))
    assert (float(dataset.x.min()), float(dataset.x.max())) == (0.0, 1.0)


def test_patches_without_overlap_rebuild_both_photographs():
    dataset = patches()
    for label, name in enumerate(("china.jpg", "flower.jpg")):
        own = dataset.x[dataset.y == label].reshape(13, 20, 3, 32, 32)
        rebuilt = own.permute(0, 3, 1, 4, 2).reshape(13 * 32, 20 * 32, 3)  # rows, columns, channels
        photograph = load_sample_image(name)[: 13 * 32]
        assert np.array_equal((rebuilt * 255).round().to(torch.uint8).numpy(), photograph)


def test_a_smaller_stride_gives_the_number_of_windows_that_fit():
    dataset = load_dataset(DataConfig(name="patches(stride=100)"))
    assert len(dataset) == 2 * ((427 - 32) // 100 + 1) * ((640 - 32) // 100 + 1)
    assert torch.equal(torch.bincount(dataset.y), torch.tensor([28, 28]))


@pytest.mark.parametrize("stride", [0, 396])
def test_a_stride_out_of_range_is_refused(stride):
    with pytest.raises(ConfigError, match=f"stride must be from 1 to 395 pixels, got {stride}"):
        load_dataset(DataConfig(name=f"patches(stride={stride})"))


def test_smaller_patches_are_the_quarters_of_larger_ones():
    small = load_dataset(DataConfig(name="patches(size=16)"))
    large = load_dataset(DataConfig(name="patches"))
    assert small.x.shape == (2080, 3, 16, 16)
    quarters = [large.x[0, :, i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16)]
    assert all((small.x == quarter).flatten(1).all(1).any() for quarter in quarters)


@pytest.mark.parametrize("size", [7, 214])
def test_a_patch_size_out_of_range_is_refused(size):
    with pytest.raises(ConfigError, match=f"size must be from 8 to 213 pixels, got {size}"):
        load_dataset(DataConfig(name=f"patches(size={size})"))
