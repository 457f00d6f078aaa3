import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedaudit.attacks.scores import match, psnr, score, ssim_kernel


def images(count: int, shape: tuple[int, ...] = (3, 8, 8), seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (5,)], ids=["grey", "rgb", "flat"])
def test_psnr_follows_from_the_known_error(shape: tuple[int, ...]) -> None:
    truth = 0.25 + 0.5 * images(1, shape)
    result = score(truth + 0.1, labels(3), truth, labels(3))
    assert result["mse"] == pytest.approx(0.01)
    assert result["psnr"] == pytest.approx(20.0)


def test_psnr_is_relative_to_the_value_range() -> None:
    truth = images(2) * 100 + 50
    assert score(truth + 2, labels(0, 1), truth, labels(0, 1), (0.0, 200.0))["psnr"] == pytest.approx(40.0)


def test_psnr_is_averaged_over_examples_and_not_over_errors() -> None:
    truth = 0.25 + 0.5 * images(2)
    error = torch.tensor([0.1, 0.01]).reshape(2, 1, 1, 1)
    result = score(truth + error, labels(0, 1), truth, labels(0, 1))
    assert result["psnr"] == pytest.approx(30.0, abs=1e-4)
    assert result["psnr_best"] == pytest.approx(40.0, abs=1e-4)


def test_an_exact_copy_scores_the_documented_ceiling() -> None:
    truth = images(2)
    result = score(truth, labels(0, 1), truth, labels(0, 1))
    assert result["psnr"] == 100.0
    assert result["ssim"] == pytest.approx(1.0)
    assert float(psnr(torch.tensor(0.0))) == 100.0


def test_a_permuted_batch_scores_the_same() -> None:
    truth = images(5)
    y = labels(0, 1, 2, 3, 4)
    guess = truth + 0.1 * images(5, seed=1)
    order = torch.tensor([3, 0, 4, 1, 2])
    straight, permuted = score(guess, y, truth, y), score(guess[order], y[order], truth, y)
    assert straight == pytest.approx(permuted)
    assert permuted["label_pair_accuracy"] == 1.0


def test_matching_has_the_least_total_error_and_not_the_greedy_one() -> None:
    # 0.45 is nearest to 0.5 for both; greedy pairing would leave 0.0 with 1.0
    rows, columns, _ = match(torch.tensor([[0.45], [0.5]]), torch.tensor([[0.5], [0.0]]))
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == {0: 1, 1: 0}


def test_a_constant_grey_guess_has_the_error_of_the_images_spread() -> None:
    truth = images(1, (1, 64, 64))
    result = score(torch.full_like(truth, 0.5), labels(0), truth, labels(1))
    expected = float(((truth - 0.5) ** 2).mean())  # 1/12 on average for uniform pixels
    assert result["psnr"] == pytest.approx(10 * math.log10(1 / expected))
    assert result["psnr"] == pytest.approx(10 * math.log10(12), abs=0.2)
    assert result["ssim"] < 0.1
    assert result["label_accuracy"] == 0.0


def test_reconstructions_are_clamped_before_scoring() -> None:
    truth = torch.ones(1, 1, 8, 8)
    assert score(truth + 7, labels(0), truth, labels(0))["psnr"] == 100.0


def test_counts_may_differ_and_are_reported() -> None:
    truth = images(4)
    fewer = score(truth[:2], labels(0, 1), truth, labels(0, 1, 2, 3))
    more = score(truth, labels(0, 1, 2, 3), truth[1:], labels(1, 2, 3))
    assert (fewer["matched"], fewer["reconstructed"], fewer["truth"]) == (2, 2, 4)
    assert (more["matched"], more["reconstructed"], more["truth"]) == (3, 4, 3)
    assert fewer["label_accuracy"] == 0.5
    assert more["psnr"] == 100.0


def test_label_accuracy_ignores_the_order_and_pair_accuracy_does_not() -> None:
    truth = images(2)
    result = score(truth, labels(1, 0), truth, labels(0, 1))
    assert result["label_accuracy"] == 1.0
    assert result["label_pair_accuracy"] == 0.0


@pytest.mark.parametrize("side", [4, 8, 32])
def test_ssim_is_that_of_all_uniform_windows_inside_the_image(side: int) -> None:
    truth = images(2, (3, side, side))
    guess = (truth + 0.2 * images(2, (3, side, side), seed=1)).clamp(0, 1)
    kernel = ssim_kernel((3, side, side))
    assert kernel is not None
    mean = lambda a: F.avg_pool2d(a, kernel, stride=1)  # noqa: E731
    mx, my = mean(guess), mean(truth)
    vx, vy, cov = mean(guess**2) - mx**2, mean(truth**2) - my**2, mean(guess * truth) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    naive = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert score(guess, labels(0, 1), truth, labels(0, 1))["ssim"] == pytest.approx(
        float(naive.mean()), abs=1e-6
    )


def test_inputs_that_are_no_images_have_no_ssim() -> None:
    assert "ssim" not in score(images(1, (64,)), labels(0), images(1, (64,)), labels(0))
    assert ssim_kernel((3, 3, 3)) is None
    assert [ssim_kernel((1, s, s)) for s in (4, 6, 8, 10, 12, 14, 28)] == [3, 3, 3, 5, 5, 7, 7]


def test_scores_refuse_what_cannot_be_compared() -> None:
    truth, y = images(2), labels(0, 1)
    with pytest.raises(ValueError, match="examples of one shape"):
        score(images(2, (3, 9, 9)), y, truth, y)
    with pytest.raises(ValueError, match="examples of one shape"):
        score(truth[:0], y[:0], truth, y)
    with pytest.raises(ValueError, match="each example needs one label"):
        score(truth, y[:1], truth, y)
    with pytest.raises(ValueError, match="must be finite"):
        score(truth * float("nan"), y, truth, y)
    with pytest.raises(ValueError, match="needs high > low"):
        score(truth, y, truth, y, (1.0, 1.0))
