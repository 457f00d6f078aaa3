"""Pairs of a batch and the gradient released for it, matched and mismatched."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedaudit.measures.local_release import LocalTraining, mean_gradient
from fedaudit.measures.watched_gradients import LayerVectors, example_features
from fedaudit.types import Loss


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """K matched pairs of batches and gradients.

    Attributes:
        features: what the critic sees of an example (n, D).
        members: rows of `features` in each batch (K, B); entries from `sizes` on do not count.
        sizes: examples of each batch (K,).
        gradients: what was released for each batch (K, P).
        groups: party and weights of each pair (K,); mismatched pairs stay within a group.
    """

    features: Tensor
    members: Tensor
    sizes: Tensor
    gradients: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.members)

    @property
    def weights(self) -> Tensor:
        """Weights (K, B) that average over each batch: 1 / size, and 0 where an entry does not count."""
        places = torch.arange(self.members.shape[1], device=self.members.device)
        return (places < self.sizes[:, None]) / self.sizes[:, None].float()


def join_pairs(parts: Sequence[TokenPairs]) -> TokenPairs:
    """All pairs of several parties or weights; every part gets groups of its own.

    Raises:
        ValueError: if there is no part.
    """
    if not parts:
        raise ValueError("pairs are joined from at least one part, got none: give some")
    widest = max(part.members.shape[1] for part in parts)
    members, groups, rows, used = [], [], 0, 0
    for part in parts:
        missing = widest - part.members.shape[1]
        members.append(torch.nn.functional.pad(part.members, (0, missing)) + rows)
        groups.append(part.groups + used)
        rows, used = rows + len(part.features), used + int(part.groups.max()) + 1
    return TokenPairs(
        torch.cat([part.features for part in parts]),
        torch.cat(members),
        torch.cat([part.sizes for part in parts]),
        torch.cat([part.gradients for part in parts]),
        torch.cat(groups),
    )


def mismatched(groups: Tensor, generator: torch.Generator, count: int = 1) -> Tensor:
    """For each pair, other pairs of its group in random order: (count, K), no entry its own pair.

    One random cycle through each group, followed 1, 2, ... `count` places: each row is a permutation, and no
    two rows agree anywhere.

    Args:
        groups: group of each pair (K,).
        generator: source of the cycles, on the CPU.
        count: how many shuffles.

    Raises:
        ValueError: if a group has not more than `count` pairs.
    """
    partner = torch.empty(count, len(groups), dtype=torch.int64)
    for group in dict.fromkeys(groups.tolist()):
        rows = (groups.cpu() == group).nonzero().squeeze(1)
        if len(rows) <= count:
            raise ValueError(
                f"{count} shuffles without a matched pair need at least {count + 1} pairs of a party, "
                f"got {len(rows)}: use more batches"
            )
        cycle = rows[torch.randperm(len(rows), generator=generator)]
        for shift in range(count):
            partner[shift, cycle] = cycle.roll(-shift - 1)
    return partner.to(groups.device)


def draw_batches(n: int, size: int, count: int, generator: torch.Generator) -> Tensor:
    """Distinct subsets of `size` of n examples, uniform (count, size); fewer if there are not as many."""
    wanted = min(count, math.comb(n, size))
    seen: dict[tuple[int, ...], None] = {}
    while len(seen) < wanted:
        drawn = torch.rand(count, n, generator=generator).topk(size, dim=1).indices.sort(dim=1).values
        seen.update(dict.fromkeys(map(tuple, drawn.tolist())))
    return torch.tensor(list(seen)[:wanted])


def standardised(parts: Sequence[TokenPairs], widths: Sequence[int]) -> list[TokenPairs]:
    """The parts with gradients and features in the units of the first, the one the critic is fitted to.

    Gradients: minus the mean over the first part's pairs, then each layer over the root mean square of its
    centred entries, so no layer drowns the others. Features: each one minus its mean, over its standard
    deviation; one that does not vary becomes zero. Differs from [Meng et al.], who state neither.
    """
    first = parts[0]
    centre = first.gradients.mean(0)
    layers = torch.split(first.gradients - centre, list(widths), dim=1)
    spread = [layer.square().mean().sqrt() for layer in layers]
    spread = [torch.where(s > 0, s, torch.inf) for s in spread]  # a layer that does not vary becomes zero
    scale = torch.cat([s.expand(w) for s, w in zip(spread, widths, strict=True)])
    mean, std = first.features.mean(0), first.features.std(0, correction=0)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.inf)
    return [
        TokenPairs(
            (part.features - mean) / std,
            part.members,
            part.sizes,
            (part.gradients - centre) / scale,
            part.groups,
        )
        for part in parts
    ]


def one_party(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    loss: Loss,
    x: Tensor,
    y: Tensor,
    members: Tensor,
    training: LocalTraining,
    vectors: LayerVectors,
    features: tuple[str, bool],
    generator: torch.Generator,
) -> TokenPairs:
    """Pairs of one party at one set of weights, not yet standardised: each batch and what it gives away.

    Args:
        model: the architecture, in evaluation mode.
        weights: parameters and buffers by name.
        loss: SUM-reduced loss (outputs, labels).
        x: examples (n, *input_shape).
        y: labels (n,).
        members: rows of each batch (K, B).
        training: how its gradient comes about.
        vectors: the watched layers as a vector.
        features: what the critic sees of an example, see `feature_module`.
        generator: source of orders and noise, on the CPU.
    """
    rows = [
        vectors(mean_gradient(model, weights, loss, x[batch], y[batch], training, generator))
        for batch in members.to(x.device)
    ]
    count = len(members)
    return TokenPairs(
        example_features(model, weights, x, *features),
        members.to(x.device),
        torch.full((count,), members.shape[1], device=x.device),
        torch.stack(rows),
        torch.zeros(count, dtype=torch.int64, device=x.device),
    )
