"""A round's updates side by side, in blocks of parameters that fit in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedaudit.types import ClientUpdate, Estimate, RoundContext, Skip

BLOCK = 2**20  # numbers in one block: 8 MB in float64, which several passes over it find in the cache
_ROWS = 64  # rows of the cohort multiplied at a time: only the lower triangle is computed


def parameter_blocks(deltas: Sequence[Mapping[str, Tensor]], elements: int = BLOCK) -> Iterator[Tensor]:
    """The N updates as rows, a few columns at a time: float64 blocks (N, c) whose columns together are all P.

    Every yielded block is overwritten by the next. Beside the updates this holds about 1.5 blocks.

    Args:
        deltas: N updates by parameter name; the names may come in any order.
        elements: numbers in one block, N c.

    Raises:
        ValueError: if there is no update, or if names or shapes differ between updates.

    >>> [block.tolist() for block in parameter_blocks([{"w": torch.ones(3)}, {"w": torch.zeros(3)}], 4)]
    [[[1.0, 1.0], [0.0, 0.0]], [[1.0], [0.0]]]
    """
    shapes = shared_shapes(deltas)
    N, P = len(deltas), sum(shape.numel() for shape in shapes.values())
    width = max(1, min(P, elements // N))
    device = next(iter(deltas[0].values())).device
    block = torch.empty(N, width, dtype=torch.float64, device=device)
    filled = 0
    for name in shapes:
        rows = [delta[name].detach().reshape(-1) for delta in deltas]
        start, size = 0, len(rows[0])
        while start < size:
            taken = min(size - start, width - filled)
            whole = taken == size
            piece = torch.stack(rows if whole else [row[start : start + taken] for row in rows])
            block[:, filled : filled + taken] = piece
            start, filled = start + taken, filled + taken
            if filled == width:
                yield block
                filled = 0
    if filled:
        yield block[:, :filled]


def cohort_gram(deltas: Sequence[Mapping[str, Tensor]], *, elements: int = BLOCK) -> Tensor:
    """Inner products (N, N) of N updates, float64, accumulated over blocks of parameters.

    Memory beside the updates is about 1.5 blocks (13 MB by default), whatever N and P are.

    Args:
        deltas: N updates by parameter name.
        elements: numbers in one block (N, c) of parameters.

    Returns:
        K (N, N), float64, symmetric.

    Raises:
        ValueError: if there is no update, or names or shapes differ.

    >>> cohort_gram([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 2.0])}]).tolist()
    [[1.0, 1.0], [1.0, 5.0]]
    """
    N = len(deltas)
    lower: list[Tensor] = []
    for block in parameter_blocks(deltas, elements):
        if not lower:
            lower = [block.new_zeros(min(_ROWS, N - top), min(top + _ROWS, N)) for top in range(0, N, _ROWS)]
        for top, part in zip(range(0, N, _ROWS), lower, strict=True):
            part.addmm_(block[top : top + _ROWS], block[: top + _ROWS].T)
    gram = torch.cat([torch.nn.functional.pad(part, (0, N - part.shape[1])) for part in lower]).tril()
    return gram + gram.tril(-1).T


def shared_gram(updates: Sequence[ClientUpdate], ctx: RoundContext) -> Tensor:
    """`cohort_gram` of a round's updates, computed once for all measures that share the context."""
    key = ("cohort-gram", *map(id, updates))
    if key not in ctx.shared:
        ctx.shared[key] = cohort_gram([update.delta for update in updates])
    found: Tensor = ctx.shared[key]
    return found


def shared_shapes(deltas: Sequence[Mapping[str, Tensor]]) -> dict[str, torch.Size]:
    """Names and shapes of the parameters that all updates share.

    Raises:
        ValueError: if there is no update, or if names or shapes differ between updates.
    """
    if not deltas or not deltas[0]:
        raise ValueError(
            f"a cohort holds updates of parameters, got {len(deltas)} updates without: give some"
        )
    shapes = {name: tensor.shape for name, tensor in deltas[0].items()}
    if not any(shape.numel() for shape in shapes.values()):
        raise ValueError("a cohort holds updates of parameters, got parameters without elements: give some")
    for position, delta in enumerate(deltas):
        if delta.keys() != shapes.keys() or any(delta[name].shape != shape for name, shape in shapes.items()):
            raise ValueError(
                "all updates hold the same parameters in the same shapes, got others in update "
                f"{position} than in update 0: compare updates of one model"
            )
    return shapes


def same_weights(updates: Sequence[ClientUpdate]) -> list[list[int]]:
    """Positions of updates that started from equal weights; usually one group, the whole round."""
    groups: list[list[int]] = []
    for position, update in enumerate(updates):
        for group in groups:
            other = updates[group[0]].before
            if other is update.before or (
                other.keys() == update.before.keys()
                and all(torch.equal(value, update.before[name]) for name, value in other.items())
            ):
                group.append(position)
                break
        else:
            groups.append([position])
    return groups


def by_weights(
    updates: Sequence[ClientUpdate],
    measure: Callable[[Sequence[ClientUpdate]], Sequence[Estimate | Skip]],
) -> list[Estimate | Skip]:
    """One entry per update, in order, measured together with those that started from equal weights.

    Raises:
        ValueError: with the reasons, if every update was skipped. The sum of a round is one update: its Skip
            is handed back.
    """
    found: dict[int, Estimate | Skip] = {}
    for positions in same_weights(updates):
        found.update(zip(positions, measure([updates[i] for i in positions]), strict=True))
    done = [found[position] for position in range(len(updates))]
    reasons = dict.fromkeys(entry.reason for entry in done if isinstance(entry, Skip))
    if done and not updates[0].summed and all(isinstance(entry, Skip) for entry in done):
        raise ValueError("; ".join(reasons))
    return done
