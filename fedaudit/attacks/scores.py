"""How close a reconstruction comes to the private examples; the truth enters here and nowhere else."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MSE_FLOOR = 1e-10
"""Relative MSE below which two images count as equal: PSNR is at most 100 dB, never infinite."""


def psnr(mse: Tensor, value_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(range^2 / MSE), elementwise.

    The MSE is floored at 1e-10 range^2 (100 dB), so that an exact copy does not make a mean infinite.

    Raises:
        ValueError: if the range is empty.

    >>> psnr(torch.tensor([0.25, 0.0], dtype=torch.float64), (0.0, 5.0)).tolist()
    [20.0, 100.0]
    """
    width = _width(value_range)
    return -10 * torch.log10((mse.to(torch.float64) / width**2).clamp_min(MSE_FLOOR))


def ssim_kernel(input_shape: tuple[int, ...]) -> int | None:
    """Side of the uniform SSIM window for an input (channels, height, width); None if it is no image.

    7 pixels, or the largest odd number that is at most half the shorter side where the image is smaller than
    14 pixels, and never less than 3. Images with a side below 4, and flat inputs, have no SSIM here.

    >>> ssim_kernel((3, 32, 32)), ssim_kernel((1, 8, 8)), ssim_kernel((64,))
    (7, 3, None)
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < 4:
        return None
    half = min(input_shape[1:]) // 2
    return min(7, max(3, half - (half + 1) % 2))


def match(reconstruction: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The one-to-one pairing of least total MSE, by the Hungarian method.

    Args:
        reconstruction: (R, *input_shape).
        truth: (T, *input_shape).

    Returns:
        Indices into the reconstruction (M,), into the truth (M,) and the MSE of each pair (M,), with
        M = min(R, T), in the order of the reconstruction.

    Raises:
        ValueError: if a side is empty or the examples' shapes differ.
    """
    if reconstruction.shape[1:] != truth.shape[1:] or not len(reconstruction) or not len(truth):
        raise ValueError(
            f"a match needs examples of one shape on both sides, got {tuple(reconstruction.shape)} and "
            f"{tuple(truth.shape)}: reshape them to (count, *input_shape)"
        )
    ours = reconstruction.detach().reshape(len(reconstruction), -1).to("cpu", torch.float64)
    theirs = truth.detach().reshape(len(truth), -1).to("cpu", torch.float64)
    # Differences rather than |a|^2 - 2ab + |b|^2: near-copies must not drown in cancellation.
    cost = torch.stack([((row - theirs) ** 2).mean(dim=1) for row in ours])  # (R, T)
    rows, columns = linear_sum_assignment(cost.numpy())
    i, j = torch.as_tensor(rows), torch.as_tensor(columns)
    return i, j, cost[i, j]


def score(
    reconstruction_x: Tensor,
    reconstruction_y: Tensor,
    truth_x: Tensor,
    truth_y: Tensor,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> dict[str, float]:
    """The success of a reconstruction against the private batch, averaged over matched pairs.

    Reconstructions are clamped to `value_range` first (an attacker would do so too) and paired with the
    truth by least total MSE, because a batch gradient has no order. Not a privacy bound: a low score shows
    that this attack failed, not that no attack can succeed. Averages are over matched pairs only: with
    fewer reconstructions than examples they speak for the matched ones, and with more the pairing is
    favourable to the attack; `matched`, `reconstructed` and `truth` say so.

    Args:
        reconstruction_x: (R, *input_shape).
        reconstruction_y: labels (R,).
        truth_x: (T, *input_shape).
        truth_y: labels (T,).
        value_range: smallest and largest value of an input.

    Returns:
        "mse" (squared input units), "psnr" (dB, per example and then averaged; at most 100),
        "psnr_best" (dB, of the best pair), "ssim" (only for images of at least 4x4; uniform window of
        `ssim_kernel` pixels), "label_pair_accuracy" (share of matched pairs whose labels agree),
        "label_accuracy" (size of the multiset overlap of the labels over T), "matched",
        "reconstructed", "truth" (counts).

    Raises:
        ValueError: if shapes or counts do not fit, the range is empty, or a reconstruction is not finite.

    >>> x, y = torch.full((1, 4), 0.5), torch.tensor([1])
    >>> round(score(x + 0.1, y, x, y)["psnr"], 3)
    20.0
    """
    _width(value_range)
    if len(reconstruction_y) != len(reconstruction_x) or len(truth_y) != len(truth_x):
        raise ValueError(
            f"each example needs one label, got {len(reconstruction_x)} reconstructions with "
            f"{len(reconstruction_y)} labels and {len(truth_x)} truths with {len(truth_y)}: pass both"
        )
    if not bool(torch.isfinite(reconstruction_x).all()):
        raise ValueError("a reconstruction must be finite, got NaN or infinity: drop it before scoring")
    clamped = reconstruction_x.detach().to("cpu", torch.float64).clamp(*value_range)
    true = truth_x.detach().to("cpu", torch.float64)
    i, j, mse = match(clamped, true)
    y, true_y = reconstruction_y.detach().cpu(), truth_y.detach().cpu()
    decibels = psnr(mse, value_range)
    result = {
        "mse": float(mse.mean()),
        "psnr": float(decibels.mean()),
        "psnr_best": float(decibels.max()),
        "label_pair_accuracy": float((y[i] == true_y[j]).double().mean()),
        "label_accuracy": label_overlap(y, true_y) / len(true_y),
        "matched": float(len(i)),
        "reconstructed": float(len(y)),
        "truth": float(len(true_y)),
    }
    kernel = ssim_kernel(tuple(true.shape[1:]))
    if kernel is not None:
        result["ssim"] = _ssim(clamped[i], true[j], kernel, _width(value_range))
    return result


def label_overlap(y: Tensor, truth_y: Tensor) -> int:
    """Size of the intersection of two multisets of labels.

    >>> label_overlap(torch.tensor([1, 1, 2]), torch.tensor([1, 2, 2, 3]))
    2
    """
    values = torch.unique(torch.cat([y, truth_y]))
    return sum(min(int((y == v).sum()), int((truth_y == v).sum())) for v in values)


def _ssim(images: Tensor, truth: Tensor, kernel: int, width: float) -> float:
    """Mean SSIM over windows that lie inside the image."""
    from fedaudit.vision import import_torchvision

    import_torchvision()  # torchmetrics imports torchvision, which may need help; both are slow to import
    from torchmetrics.functional.image import structural_similarity_index_measure

    result = structural_similarity_index_measure(
        images,
        truth,
        gaussian_kernel=False,
        kernel_size=kernel,
        reduction="none",
        data_range=width,
        return_full_image=True,
    )
    margin = kernel // 2  # windows that torchmetrics fills up by reflection
    return float(result[1][..., margin:-margin, margin:-margin].mean())


def _width(value_range: tuple[float, float]) -> float:
    low, high = value_range
    if not high > low:
        raise ValueError(f"a value range needs high > low, got {value_range}: state the inputs' true range")
    return high - low
