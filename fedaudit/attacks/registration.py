"""How close a reconstruction comes once it may be shifted a little and mirrored: registered PSNR."""

import torch
from torch import Tensor

from fedaudit.attacks.scores import psnr

MOST_SHIFT = 8
"""Pixels; the largest shift that is tried on any image."""


def reach_of(input_shape: tuple[int, ...]) -> int | None:
    """Largest shift in pixels that registration tries for (channels, height, width); None if it is no image.

    An eighth of the shorter side, at least 1 and at most 8. Images with a side below 4 and flat inputs are
    not registered, as they have no SSIM.

    >>> reach_of((3, 32, 32)), reach_of((1, 8, 8)), reach_of((64,))
    (4, 1, None)
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < 4:
        return None
    return max(1, min(MOST_SHIFT, min(input_shape[1:]) // 8))


def registered_psnr(
    reconstruction: Tensor,
    truth: Tensor,
    value_range: tuple[float, float] = (0.0, 1.0),
    *,
    reach: int | None = None,
    flips: bool = True,
) -> Tensor:
    """PSNR in dB of each pair at the best whole-pixel shift, and mirror image, of the reconstruction.

    max over |dy|, |dx| <= reach, and over the reconstruction and its left-right mirror image, of
    PSNR(MSE over the pixels where both overlap). Convolutional models hardly tell a shifted image from the
    original, so a reconstruction may show everything and still have a low plain PSNR.

    At least the plain PSNR, because no shift is one of the shifts; at most 100 dB. It is a maximum over
    2 (2 reach + 1)^2 comparisons, so a guess that shows nothing gains from it too, by parts of a decibel:
    compare it with the registered PSNR of a guess, not with a plain one. Rotation, scale and shifts by parts
    of a pixel are not undone.

    Args:
        reconstruction: (M, C, H, W), in the value range.
        truth: the image that belongs to each (M, C, H, W).
        value_range: smallest and largest value of an input.
        reach: largest shift in pixels; None is `reach_of` the image.
        flips: whether the mirror image is tried too.

    Returns:
        (M,), float64.

    Raises:
        ValueError: if these are no pairs of images, or the reach leaves no overlap.

    >>> image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> registered_psnr(image.roll(1, dims=-1), image).tolist()
    [100.0]
    """
    if reconstruction.shape != truth.shape or truth.ndim != 4:
        raise ValueError(
            f"registration needs pairs of images (M, C, H, W), got {tuple(reconstruction.shape)} and "
            f"{tuple(truth.shape)}: match them first"
        )
    height, width = truth.shape[2:]
    most = reach_of(tuple(truth.shape[1:])) if reach is None else reach
    if most is None or not 0 <= most < min(height, width):
        raise ValueError(
            f"a shift must leave an overlap, got up to {most} pixels of {height}x{width}: use a smaller reach"
        )
    ours, theirs = (side.detach().to("cpu", torch.float64) for side in (reconstruction, truth))
    least = torch.full((len(theirs),), torch.inf, dtype=torch.float64)
    for shown in (ours, ours.flip(-1)) if flips else (ours,):
        for dy in range(-most, most + 1):
            for dx in range(-most, most + 1):
                (a, b), (c, d) = _overlap(dy, height), _overlap(dx, width)
                error = (shown[:, :, a, c] - theirs[:, :, b, d]).square().flatten(1).mean(1)
                least = torch.minimum(least, error)
    return psnr(least, value_range)


def _overlap(shift: int, length: int) -> tuple[slice, slice]:
    """Positions in the shifted and in the resting row that lie on each other."""
    return slice(max(0, shift), length + min(0, shift)), slice(max(0, -shift), length + min(0, -shift))
