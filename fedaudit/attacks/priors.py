"""What an attacker believes about images before it sees an update: terms added to the objective.

Every prior takes inputs (B, *input_shape), returns a scalar, and can be differentiated and vectorised.
None of them knows the client's data; a prior that does not fit the data (total variation on noise) hurts.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 96
"""Channels of the random convolution through which epochs may be compared."""


def total_variation(x: Tensor, rounding: float = 0.0) -> Tensor:
    """Mean absolute difference of horizontal neighbours plus that of vertical ones.

    With `rounding` r every |d| becomes sqrt(d^2 + r^2) - r, which has a slope everywhere that second-order
    optimisers can follow, and differs from |d| by at most r.

    Source: Rudin, Osher, Fatemi 1992; anisotropic as in Geiping et al. 2020, arXiv 2003.14053.

    Args:
        x: (B, ..., height, width) with both sides at least 2; inputs of fewer dimensions have no
            neighbours and get 0.
        rounding: r, in the units of x.

    >>> float(total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])))
    1.0
    """
    if x.dim() < 4 or min(x.shape[-2:]) < 2:
        return x.sum() * 0
    across, down = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
    if not rounding:
        return across.abs().mean() + down.abs().mean()
    smooth = [(d.square() + rounding**2).sqrt().mean() for d in (across, down)]
    return smooth[0] + smooth[1] - 2 * rounding


def mean_square(x: Tensor) -> Tensor:
    """Mean squared entry: keeps inputs near the middle of their range.

    Source: the l2 term of Yin et al. 2021, arXiv 2104.07586.
    Differs from Yin et al.: a mean instead of a norm, so that the weight does not depend on the size.
    """
    return x.square().mean()


def clip_penalty(x: Tensor, low: float, high: float) -> Tensor:
    """Mean squared distance of the entries to [low, high]: a soft box.

    Source: Dimitrov, Balunovic, Konstantinov, Vechev 2022, arXiv 2206.12395.

    >>> float(clip_penalty(torch.tensor([0.5, 3.0]), 0.0, 1.0))
    2.0
    """
    return (x - x.clamp(low, high)).square().mean()


def epoch_disagreement(epochs: Sequence[Tensor], filters: Tensor | None = None) -> Tensor:
    """Mean over pairs of epochs of |mean_i f(x_1i) - mean_i f(x_2i)|^2 per entry.

    Each epoch visits the same examples in an order the attacker does not know, so only functions of the
    whole set can be compared. f is the identity, or a random convolution with ReLU if `filters` are given.

    Source: Dimitrov, Balunovic, Konstantinov, Vechev 2022, arXiv 2206.12395, equation 8.

    Args:
        epochs: inputs of each complete epoch (n, *input_shape).
        filters: (channels, input channels, k, k), from `random_filters`.

    Returns:
        A scalar; 0 with fewer than two epochs.
    """
    if len(epochs) < 2:
        return epochs[0].sum() * 0
    features = epochs if filters is None else [F.conv2d(x, filters).relu() for x in epochs]
    means = torch.stack([f.mean(dim=0) for f in features])  # (E, *features)
    # sum over all ordered pairs of |a - b|^2 is 2 E^2 times the variance over epochs
    pairs = len(means) * (len(means) - 1)
    return 2 * len(means) * (means - means.mean(dim=0)).square().sum(dim=0).mean() / pairs


def random_filters(input_shape: Sequence[int], seed: int) -> Tensor | None:
    """Normal 3x3 filters (96, input channels, 3, 3) of variance 1/(9 channels); None for other inputs.

    The seed is the only source of randomness.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < 3:
        return None
    generator = torch.Generator().manual_seed(seed)
    channels = int(input_shape[0])
    return torch.randn(CHANNELS, channels, 3, 3, generator=generator) / math.sqrt(9 * channels)
