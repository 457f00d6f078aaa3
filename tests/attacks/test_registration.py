"""Registered PSNR: a shifted or mirrored copy counts as a copy, and noise does not."""

import pytest
import torch
from torch import Tensor

from fedaudit.attacks.registration import reach_of, registered_psnr
from fedaudit.attacks.scores import psnr


def images(count: int, shape: tuple[int, ...] = (3, 16, 16), seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(a: Tensor, b: Tensor, value_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    return psnr((a - b).square().flatten(1).mean(1), value_range)


@pytest.mark.parametrize(("dy", "dx"), [(0, 0), (2, 0), (0, -2), (1, 2), (-2, -1)])
@pytest.mark.parametrize("mirrored", [False, True], ids=["upright", "mirrored"])
def test_a_shifted_copy_has_the_ceiling_and_a_low_plain_psnr(dy: int, dx: int, mirrored: bool) -> None:
    truth = images(3)
    copy = truth.roll((dy, dx), dims=(2, 3))
    copy = copy.flip(-1) if mirrored else copy
    assert registered_psnr(copy, truth).tolist() == [100.0] * 3
    if (dy, dx, mirrored) != (0, 0, False):
        assert float(plain(copy, truth).max()) < 12  # independent uniform pixels: 10 log10(6) = 7.8 dB


def test_a_shift_beyond_the_reach_is_not_undone() -> None:
    truth = images(2)
    copy = truth.roll(3, dims=3)
    assert reach_of((3, 16, 16)) == 2
    assert float(registered_psnr(copy, truth).max()) < 12
    assert registered_psnr(copy, truth, reach=3).tolist() == [100.0] * 2


def test_a_mirror_image_is_no_copy_where_mirroring_is_off() -> None:
    truth = images(2)
    assert float(registered_psnr(truth.flip(-1), truth, flips=False).max()) < 12


def test_it_is_the_best_of_all_overlaps() -> None:
    """Naive reference: every shift written out with padded NaN pixels that no mean counts."""
    truth = images(2, (1, 6, 7))
    guess = images(2, (1, 6, 7), seed=1)
    best = torch.full((2,), -torch.inf, dtype=torch.float64)
    for shown in (guess, guess.flip(-1)):
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                moved = torch.full_like(shown, float("nan"))
                for y in range(6):
                    for x in range(7):
                        if 0 <= y + dy < 6 and 0 <= x + dx < 7:
                            moved[:, :, y, x] = shown[:, :, y + dy, x + dx]
                best = torch.maximum(best, psnr((moved - truth).square().flatten(1).nanmean(1)))
    torch.testing.assert_close(registered_psnr(guess, truth, reach=2), best)


def test_it_is_never_below_the_plain_psnr_and_gains_little_on_noise() -> None:
    truth, guess = images(8, (3, 32, 32)), images(8, (3, 32, 32), seed=1)
    gain = registered_psnr(guess, truth) - plain(guess, truth)
    assert float(gain.min()) >= 0
    # 162 comparisons of a mean over 3072 squared differences: sd of a mean is 0.0035 of 1/6, so 2 %
    assert float(gain.max()) < 10 * torch.log10(torch.tensor(1 / (1 - 5 * 0.02)))


def test_the_value_range_scales_it() -> None:
    truth = images(1)
    found = registered_psnr(200 * (truth + 0.01), 200 * truth, (0.0, 200.0))
    assert found.item() == pytest.approx(40.0)


def test_what_is_no_pair_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="pairs of images"):
        registered_psnr(images(2), images(3))
    with pytest.raises(ValueError, match="pairs of images"):
        registered_psnr(torch.rand(2, 5), torch.rand(2, 5))
    with pytest.raises(ValueError, match="must leave an overlap, got up to 16 pixels of 16x16"):
        registered_psnr(images(1), images(1), reach=16)
    assert [reach_of((1, s, s)) for s in (3, 4, 16, 64, 224)] == [None, 1, 2, 8, 8]
