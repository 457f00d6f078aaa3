"""Does a reconstruction point to the true example among others like it? Its nearest neighbour in a pool."""

import torch
from torch import Tensor, nn

BLOCK = 2**22  # numbers in one block of differences: 32 MB in float64


def nearest_is_own(points: Tensor, own: Tensor, pool: Tensor) -> Tensor:
    """Whether no candidate of a pool is nearer to a point than its own one: booleans (M,).

    Squared Euclidean distance; a candidate at exactly the same distance (a duplicate of the true example)
    counts as the own one.

    Averaged over reconstructions this is the image identifiability precision: of a reconstruction that says
    nothing, the share of own examples in the pool, or less. See `chance_level`.

    Source: Yin et al. 2021, arXiv 2104.07586 (there in the feature space of a trained network).

    Args:
        points: (M, *shape).
        own: position in the pool of the example each should point to (M,).
        pool: (K, *shape).

    Raises:
        ValueError: if shapes differ or the pool is empty.

    >>> pool = torch.tensor([[0.0], [1.0], [2.0]])
    >>> nearest_is_own(torch.tensor([[0.9], [1.9]]), torch.tensor([1, 0]), pool).tolist()
    [True, False]
    """
    if points.shape[1:] != pool.shape[1:] or len(points) != len(own) or not len(pool):
        raise ValueError(
            f"points need one position each in a pool of the same shape, got {tuple(points.shape)}, "
            f"{tuple(own.shape)} and {tuple(pool.shape)}: correct them"
        )
    ours, candidates = (side.detach().flatten(1).cpu() for side in (points, pool))
    parts = []
    for block in torch.split(candidates, max(1, BLOCK // max(1, candidates.shape[1]))):
        # differences, not |a|^2 - 2ab + |b|^2: near-copies must not drown in cancellation
        rows = [(block.double() - point).square().sum(1) for point in ours.double()]
        parts.append(torch.stack(rows) if rows else torch.empty(0, len(block)))
    distances = torch.cat(parts, dim=1)  # (M, K)
    return distances.gather(1, own.cpu()[:, None])[:, 0] <= distances.amin(1)


def chance_level(truth: int, pool: int) -> float:
    """What `nearest_is_own` finds on average, at most, by reconstructions that say nothing: truth / pool.

    One over the pool's size for a single example. With a batch, reconstructions are matched to the examples
    they are closest to, so one that has any of the batch nearest may be matched to just that: the level is
    the batch's share of the pool, as an upper bound.

    Args:
        truth: examples in the batch.
        pool: candidates, the batch among them.

    >>> chance_level(4, 200)
    0.02
    """
    if not 1 <= truth <= pool:
        raise ValueError(f"a pool holds the batch, got {truth} examples in a pool of {pool}: correct them")
    return truth / pool


def head_features(model: nn.Module, x: Tensor) -> Tensor:
    """What the model's last linear layer is given for each input (n, D): features to compare images by.

    Near-copies, shifted or recoloured, are closer in them than in pixels, as far as the model was trained; of
    an untrained model they are a random projection.

    Args:
        model: in evaluation mode; left as it is.
        x: (n, *input_shape), brought to the model's device and number format.

    Raises:
        ValueError: if no linear layer is called with one row per input.
    """
    kept: list[Tensor] = []
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [
        module.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0].detach()))
        for module in linear
    ]
    first = next(model.parameters(), torch.empty(0))
    found = []
    try:
        for part in torch.split(x.detach(), 64):
            kept.clear()
            with torch.no_grad():
                model(part.to(first))
            if not kept or kept[-1].ndim != 2 or len(kept[-1]) != len(part):
                raise ValueError(
                    "features are the input (n, D) of the model's last linear layer, got a model without: "
                    "compare pixels"
                )
            found.append(kept[-1].cpu())
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(found) if found else torch.empty(0, 0)
