"""How far an imagined update is from the one a client sent: what first-order inversions minimise.

Every distance takes two flat vectors (P,), the found one first, and can be differentiated and vectorised
(`torch.func.vmap`). `layer_scale` weighs layers by scaling both vectors beforehand.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Objective = Literal["cosine", "euclidean", "layer-norms"]
LayerWeights = Literal["equal", "linear", "exponential"]
Distance = Callable[[Tensor, Tensor], Tensor]


def cosine_distance(found: Tensor, sought: Tensor) -> Tensor:
    """1 - <found, sought> / (|found| |sought|), from 0 (same direction) to 2.

    Computed as half the squared distance of the two unit vectors, which is the same number without the
    cancellation that stops the textbook form near 1e-7 in float32. It is blind to the length of an update.

    Source: Geiping, Bauermeister, Droege, Moeller 2020, arXiv 2003.14053, equation 4.

    >>> round(float(cosine_distance(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))), 4)
    0.2929
    """
    # multiplied by reciprocals: the slope of a norm or a division takes several passes over a long vector
    difference = found * found.square().sum().rsqrt() - sought * sought.square().sum().rsqrt()
    return difference.square().sum() / 2


def squared_distance(found: Tensor, sought: Tensor) -> Tensor:
    """|found - sought|^2 / |sought|^2; a zero vector gets 1.

    Source: Zhu, Liu, Han 2019, arXiv 1906.08935.
    Differs from Zhu et al.: relative to the norm sought, so that priors keep their weight for any model.
    """
    return (found - sought).square().sum() / sought.square().sum()


def layer_distance(sizes: Sequence[int]) -> Distance:
    """The distance sum_l |found_l - sought_l| / sum_l |sought_l| over parameter blocks of these sizes.

    Source: Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov 2021, arXiv 2104.07586, equation 3.
    Differs from Yin et al.: relative to the norms sought, for the reason given at `squared_distance`.
    """

    def distance(found: Tensor, sought: Tensor) -> Tensor:
        blocks = torch.split(found - sought, list(sizes))
        scale = torch.stack([block.norm() for block in torch.split(sought, list(sizes))]).sum()
        # sqrt has no slope at 0, where a layer is matched exactly (or was not trained at all)
        tiny = torch.finfo(found.dtype).tiny
        return torch.stack([(block.square().sum() + tiny).sqrt() for block in blocks]).sum() / scale

    return distance


def distance_of(objective: Objective, sizes: Sequence[int]) -> Distance:
    """The distance a user names; `sizes` are the entries of each parameter, in the vectors' order.

    Raises:
        ValueError: if no distance has that name.
    """
    if objective == "cosine":
        return cosine_distance
    if objective == "euclidean":
        return squared_distance
    if objective == "layer-norms":
        return layer_distance(sizes)
    raise ValueError(f"objective must be cosine, euclidean or layer-norms, got {objective!r}: choose one")


def layer_scale(sizes: Sequence[int], weights: LayerWeights) -> Tensor | None:
    """Square roots of the parameters' weights, one for each entry of a flat vector (P,); None if equal.

    "linear" weighs the l-th of L parameters by 1 - l/L, "exponential" by exp(-4 l/L), both counted from
    the input: early layers hold the input's gradient most directly, late ones dominate the norm.

    Raises:
        ValueError: if no scheme has that name.

    >>> layer_scale([2, 1], "linear").square().tolist()
    [1.0, 1.0, 0.5]
    """
    if weights == "equal":
        return None
    places = torch.arange(len(sizes), dtype=torch.float64) / len(sizes)
    if weights == "linear":
        values = 1 - places
    elif weights == "exponential":
        values = (-4 * places).exp()
    else:
        raise ValueError(f"layer weights must be equal, linear or exponential, got {weights!r}: choose one")
    return values.sqrt().repeat_interleave(torch.tensor(list(sizes)))
