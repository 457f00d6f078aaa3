"""From examples and a release to the pools a critic is trained, stopped and evaluated on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fedaudit.measures.batch_critic import Pool
from fedaudit.measures.gradient_coordinates import (
    GradientCoordinates,
    clipped_gradients,
    principal_coordinates,
)
from fedaudit.types import Loss, RoundContext, Skip, StepRelease

_BLOCK = 2**25  # entries of one block of per-example gradients
_CACHE = 2**26  # entries of all of them up to which they are kept instead of computed twice


@dataclass(frozen=True, eq=False)
class Holding:
    """Examples that one party holds, how its steps are released, and which example serves what.

    Attributes:
        x: the used examples (n, *input_shape), critic-train ones first, then validation, then held-out.
        y: their labels (n,).
        sizes: how many of each.
        release: how a step of this party is clipped and noised.
        batch: examples per batch b.
    """

    x: Tensor
    y: Tensor
    sizes: tuple[int, int, int]
    release: StepRelease
    batch: int


def no_batch_of_sum(batch: int, ctx: RoundContext) -> Skip | None:
    """A Skip where a server sees the sum of clients' steps and not as many examples stand in for theirs.

    Information about a smaller batch under the noise of all clients would be another quantity.
    """
    wanted = ctx.batch_size or 0
    if not ctx.summed or batch == wanted:
        return None
    return Skip(
        f"the sum of {ctx.summed} clients' steps holds {wanted} examples, got {batch} to stand in for them: "
        "give the server more reference examples, or leave the measure's own batch to it"
    )


def split_examples(n: int, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Disjoint positions among n examples: 40 % critic-train, 20 % validation, 40 % held-out.

    >>> [len(part) for part in split_examples(50, 256, torch.Generator().manual_seed(0))]
    [20, 10, 20]
    """
    used = min(n, most)
    order = torch.randperm(n, generator=generator)[:used]
    train, validation = round(0.4 * used), round(0.2 * used)
    return order[:train], order[train : train + validation], order[train + validation :]


def gradient_coordinates(
    holdings: Sequence[Holding],
    model: nn.Module,
    weights: Mapping[str, Tensor],
    loss: Loss,
    dims: int,
    generator: torch.Generator,
) -> tuple[list[Tensor], list[float]]:
    """Clipped per-example gradients of every holding in one orthonormal basis of at most `dims` directions.

    The basis depends on critic-train examples alone. Memory is bounded by blocks of examples and by the
    sketch of the basis, so models with millions of parameters fit.

    Returns:
        Per holding coordinates (n, d), and the fraction of its gradients' squared norm they hold.
    """
    P = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    size = max(1, min(256, _BLOCK // P))
    keep = P * sum(len(holding.x) for holding in holdings) <= _CACHE
    blocks: list[Callable[[], Tensor]] = []
    fit: list[Tensor] = []
    owned: list[list[int]] = []
    for holding in holdings:
        owned.append([])
        for start in range(0, len(holding.x), size):

            def block(holding: Holding = holding, start: int = start) -> Tensor:
                x, y = holding.x[start : start + size], holding.y[start : start + size]
                release = holding.release
                return clipped_gradients(model, weights, loss, x, y, release.clip_norm, release.per_layer)

            owned[-1].append(len(blocks))
            blocks.append(_once(block) if keep else block)
            rows = torch.arange(start, min(start + size, len(holding.x)), device=holding.x.device)
            fit.append(rows < holding.sizes[0])
    found: GradientCoordinates = principal_coordinates(blocks, fit, dims, generator)
    rows_of = [torch.cat([found.coordinates[b] for b in mine]) for mine in owned]
    return rows_of, [found.energy(mine) for mine in owned]


def build_pools(
    holdings: Sequence[Holding], coordinates: Sequence[Tensor], classes: int, dims: int, informed: bool
) -> list[tuple[Pool, Pool, Pool]]:
    """Critic-train, validation and held-out pool per holding.

    Everything is in units of the root mean square norm of a holding's critic-train gradients, so parties
    with different clipping are alike to the critic, and every mean and scale comes from critic-train
    examples. Features are whitened pixel components, centred one-hot labels and, if `informed`, the
    example's own coordinates in units of their standard deviation. In float64, so that sums that differ
    by little beside a large gradient they share are told apart.
    """
    scales, scaled = [], []
    for holding, rows in zip(holdings, coordinates, strict=True):
        scales.append(float(rows[: holding.sizes[0]].square().sum(1).mean().sqrt().clamp_min(1e-30)))
        scaled.append(rows.double() / scales[-1])
    trained = torch.cat([rows[: h.sizes[0]] for rows, h in zip(scaled, holdings, strict=True)])
    mean, variance = trained.mean(0), trained.var(0, correction=0).clamp_min(1e-12)
    whiten = _whitening(torch.cat([h.x[: h.sizes[0]].flatten(1) for h in holdings]), dims)
    pools = []
    for holding, scale, rows in zip(holdings, scales, scaled, strict=True):
        centred = rows - mean
        pieces = [whiten(holding.x.flatten(1)), one_hot(holding.y.long(), classes) - 1 / classes]
        if informed:
            pieces.append(centred / variance.sqrt())
        features = torch.cat([piece.double() for piece in pieces], 1)
        noise = holding.release.noise_std / scale
        split: list[Pool] = []
        start = 0
        for size in holding.sizes:
            here = slice(start, start + size)
            batch = min(holding.batch, size - 1)  # a whole part would leave one batch to choose from
            split.append(Pool(features[here], centred[here], variance, noise, batch))
            start += size
        pools.append((split[0], split[1], split[2]))
    return pools


def _once(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    kept: list[Tensor] = []

    def cached() -> Tensor:
        if not kept:
            kept.append(function())
        return kept[0]

    return cached


def _whitening(x: Tensor, dims: int) -> Callable[[Tensor], Tensor]:
    """Standardises columns like those of x (n, D), then maps to at most `dims` whitened components."""
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-6, std, torch.inf)
    _, singular, directions = torch.linalg.svd((x - mean) / std, full_matrices=False)
    keep = singular > 1e-3 * singular[:1].clamp_min(1e-30)
    keep[dims:] = False
    components = directions[keep].T * (len(x) ** 0.5 / singular[keep])
    return lambda rows: ((rows - mean) / std) @ components
