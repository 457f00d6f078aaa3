"""The examples behind the gradient of a fully connected layer followed by ReLU, taken apart exactly."""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from fedaudit.progress import heartbeat

_AT_ONCE = 1024  # submatrices whose null vectors are computed together
_SIGMAS = 6.0  # entries within so many standard deviations of the noise count as zero
_LEVERAGE = 0.9  # a row above it may alone fix one dimension of a direction: it is tested without the row
_FOCUS = 6.0  # how strongly, at most, rows with similar weights are preferred in a draw
_SAME = 1e-4  # sine of the angle between two directions that count as one
_REFINEMENTS = 3
_REPEATS = 64
_OTHERS = 8  # directions that may replace one of the chosen
_DOUBTFUL = 200  # directions that hang on a single row, kept for the case that the others do not suffice


@dataclass(frozen=True, eq=False)
class Separation:
    """A layer's gradient, taken apart into examples.

    Attributes:
        x: the layer's inputs (b, N).
        slopes: d loss / d output of each example in the mean loss (b, M); rows of zeros where ReLU is off.
        zeros: share of zero entries in each example's slopes (b,).
        submatrices: random submatrices that were tried.
    """

    x: Tensor
    slopes: Tensor
    zeros: Tensor
    submatrices: int


def numerical_rank(gradient: Tensor, noise: float) -> tuple[int, float]:
    """How many singular values (of M x N) stand above noise of that standard deviation per entry.

    The largest singular value of such noise is about noise (sqrt M + sqrt N); twice that counts as above, and
    so does the rounding of the decomposition.

    Returns:
        The rank, and its threshold in the gradient's unit.

    >>> numerical_rank(torch.ones(4, 3, dtype=torch.float64), noise=1e-3)[0]
    1
    """
    values = torch.linalg.svdvals(gradient)
    own = max(gradient.shape) * torch.finfo(gradient.dtype).eps * float(values[0])
    threshold = max(2 * noise * sum(math.sqrt(side) for side in gradient.shape), own)
    return int((values > threshold).sum()), threshold


def separate(
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    weight: Tensor,
    bias: Tensor,
    rank: int,
    generator: torch.Generator,
    *,
    noise: float = 0.0,
    tau: float = 0.1,
    mismatch: float = 0.003,
    submatrices: int = 30_000,
    deadline: float = math.inf,
) -> Separation:
    """The inputs and output gradients of each example of a batch behind the gradient of a layer z = W x + c.

    With dL/dW = D X (D: M x b, X: b x N) of rank b, D = L Q for L = dL/dW V, V the right singular vectors,
    and an unknown Q (b x b). ReLU behind the layer makes entries of D zero, about half of each column, so
    b - 1 random rows of L are all zero in column n with probability 2^-(b-1), and their null vector is then
    column n of Q up to scale. Directions with at least `tau` M zeros are kept and refitted to all their zero
    rows; b independent ones are chosen, those with most zeros first; the scale follows from L Q s = dL/dc.
    The work grows as 2^b.

    Exact up to rounding where it returns; NOT an approximation for gradients under strong noise, where it
    fails. It cannot separate examples with the same input, which count as one.

    Source: Dimitrov, Baader, Mueller, Vechev 2024, arXiv 2403.03945.
    Differs from Dimitrov et al.: a direction must pass two tests of its own, in place of a search over
    choices of b directions. No single row may be needed to fix it among its zero rows: combinations of
    examples fail that if their output gradients are in general position (directions that fail are tried
    last). And some input must switch just its non-zero units on at the known weights, a linear programme;
    combinations fail that even where output gradients are parallel, as with two classes. So `tau` can be low.
    And the rows of a draw have similar weights, more or less, because units that see alike are off together:
    ten times fewer draws at b = 8 and more beyond.

    Args:
        weight_gradient: dL/dW (M, N) in float64.
        bias_gradient: dL/dc (M,).
        weight: W (M, N).
        bias: c (M,).
        rank: b, see `numerical_rank`.
        generator: draws the submatrices, on the CPU.
        noise: standard deviation of the error per entry of dL/dW.
        tau: smallest share of zeros in an example's slopes. Without the two tests 0.25 would let
            combinations of two examples pass and 0.38 would not, but confident networks have denser slopes.
        mismatch: share of units that may be on or off against the slopes; a larger one is needed
            where the weights moved between local steps.
        submatrices: most that are tried.
        deadline: `time.monotonic()` after which to stop.

    Raises:
        ValueError: if the rank does not fit, or the directions were not found within the budget.
    """
    M, N = weight_gradient.shape
    if not 1 <= rank <= min(M, N):
        raise ValueError(f"separating b examples needs 1 <= b <= min(M, N) = {min(M, N)}, got b = {rank}")
    _, values, right = torch.linalg.svd(weight_gradient, full_matrices=False)
    values, right = values[:rank], right[:rank]
    left = weight_gradient @ right.T  # (M, b); the error of each entry is that of one entry of dL/dW
    tolerance = _SIGMAS * noise + 8 * torch.finfo(left.dtype).eps * float(values[0])
    active = left.norm(dim=1) > 2 * tolerance
    alive = left[active]
    least = tau * M - (M - len(alive))
    features = torch.cat([weight @ right.T, bias[:, None]], dim=1)  # (M, b + 1)
    likeness = torch.linalg.qr(features[active]).Q
    pool, seen = left.new_zeros(0, rank), left.new_zeros(0, rank)
    counts: list[int] = []
    tried = 0
    view = _View(left, right, values, weight, bias, bias_gradient, tolerance)
    if rank == 1:
        pool, counts, tried = left.new_ones(1, 1), [0], submatrices
        if _choose(view, pool, counts, mismatch) is not None:
            return _separation(view, pool, 0)
    # Few rows have few submatrices: drawing each many times over adds nothing.
    submatrices = min(submatrices, _REPEATS * math.comb(len(alive), rank - 1))
    doubtful: list[tuple[int, Tensor]] = []

    def is_new(q: Tensor, zeros: int) -> bool:
        """Whether the direction is another one, and some input goes with it; it is then in the pool."""
        nonlocal pool, seen
        shape = torch.nn.functional.normalize(q * values, dim=0)  # slopes L q have this geometry
        if bool((seen @ shape).abs().gt(1 - _SAME**2).any()):
            return False
        seen = torch.cat([seen, shape[None]])
        fits = _one_input_does_it((left @ q).abs() > tolerance, features, mismatch)
        if fits:
            pool = torch.cat([pool, q[None]])
            counts.append(zeros)
        return fits

    while tried < submatrices and time.monotonic() < deadline and len(alive) >= rank:
        heartbeat(tried, submatrices, examples=rank)
        several = min(_AT_ONCE, submatrices - tried, max(16, 2 ** (rank + 2)))
        tried += several
        fresh = False
        for q, zeros, sure in _directions(alive, likeness, several, tolerance, least, generator):
            if sure:
                fresh = is_new(q, zeros) or fresh
            else:
                doubtful.append((zeros, q))
        doubtful = sorted(doubtful, key=lambda pair: -pair[0])[:_DOUBTFUL]
        chosen = _choose(view, pool, counts, mismatch) if fresh else None
        if chosen is not None:
            return _separation(view, pool[chosen], tried)
    for zeros, q in doubtful:
        if time.monotonic() < deadline and is_new(q, zeros):
            chosen = _choose(view, pool, counts, mismatch)
            if chosen is not None:
                return _separation(view, pool[chosen], tried)
    raise ValueError(
        f"the search found {_independent(pool, counts, values)[1]} of {rank} directions, and no set that "
        f"fits the ReLUs, within {tried} submatrices: the batch is too large, the update too noisy or its "
        f"units too few; raise submatrices or seconds"
    )


@dataclass(frozen=True, eq=False)
class _View:
    """A layer's gradient in the basis of its right singular vectors, and what is known of the layer."""

    left: Tensor  # (M, b)
    right: Tensor  # (b, N)
    values: Tensor  # (b,)
    weight: Tensor  # (M, N)
    bias: Tensor  # (M,)
    bias_gradient: Tensor  # (M,)
    tolerance: float

    def examples(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (b, N) and slopes (b, M), zeros in place, for directions (b, b) in rows."""
        mixing = directions.T
        scale = torch.linalg.lstsq(self.left @ mixing, self.bias_gradient[:, None]).solution[:, 0]
        mixing = mixing * scale
        slopes = self.left @ mixing
        off = slopes.abs() <= self.tolerance * mixing.norm(dim=0)
        return torch.linalg.solve(mixing, self.right), slopes.masked_fill(off, 0.0).T

    def disagreement(self, directions: Tensor) -> int:
        """How many units are on for an example where its slope is zero, or off where it is not."""
        try:
            x, slopes = self.examples(directions)
        except RuntimeError:  # singular
            return self.left.numel()
        return int(((x @ self.weight.T + self.bias > 0) != (slopes != 0)).sum())


def _separation(view: _View, directions: Tensor, tried: int) -> Separation:
    x, slopes = view.examples(directions)
    return Separation(x, slopes, (slopes == 0).double().mean(dim=1), tried)


def _directions(
    rows: Tensor,
    likeness: Tensor,
    several: int,
    tolerance: float,
    least: float,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, int, bool]]:
    """Unit directions q (b,), numbers of zeros, and whether several rows agree, from b - 1 random rows each.

    Rows are drawn without replacement with chances exp(focus * <likeness, u>) for a random u and focus.
    """
    b, m = rows.shape[1], len(rows)
    u = torch.randn(several, likeness.shape[1], generator=generator, dtype=rows.dtype).to(rows)
    pull = u @ likeness.T * math.sqrt(m / likeness.shape[1])  # (several, m), about standard normal
    draws = torch.rand(several, m + 1, generator=generator, dtype=rows.dtype).to(rows)
    gumbel = -torch.log(-torch.log(draws[:, :m].clamp_min(1e-12)))
    chosen = (_FOCUS * draws[:, m:] * pull + gumbel).topk(b - 1, dim=1).indices
    _, values, vectors = torch.linalg.svd(
        rows[chosen], full_matrices=True
    )  # (several, b - 1), (several, b, b)
    smallest, q = values[:, -1], vectors[:, -1]
    # An error e in the rows turns the null vector by about e / smallest singular value.
    lengths = rows.norm(dim=1)
    slack = tolerance * (1 + lengths / smallest.clamp_min(1e-300)[:, None])
    zero = (q @ rows.T).abs() <= slack
    enough = (zero.sum(dim=1) >= max(least, b if b > 2 else 1)) & (smallest > 4 * tolerance)
    for k in enough.nonzero()[:, 0].tolist():
        refined = _refine(rows, lengths, zero[k], tolerance)
        if refined is not None and refined[1] >= least:
            yield refined


def _refine(rows: Tensor, lengths: Tensor, zero: Tensor, tolerance: float) -> tuple[Tensor, int, bool] | None:
    """The direction that all zero rows agree on, their number, and whether none of them is needed for it.

    None if the rows do not agree or leave more than one direction.
    """
    b = rows.shape[1]
    for _ in range(_REFINEMENTS):
        if int(zero.sum()) < b - 1:
            return None
        fitted = rows[zero]
        left, values, vectors = torch.linalg.svd(fitted, full_matrices=True)
        if float(values[b - 2]) <= 4 * tolerance:  # the zero rows leave more than one direction open
            return None
        q = vectors[-1]
        again = (rows @ q).abs() <= tolerance * (1 + lengths / values[b - 2])
        if torch.equal(again, zero):
            break
        zero = again
    if len(values) == b and float(values[-1]) > tolerance * math.sqrt(len(fitted)):  # not zero together
        return None
    leverage, hardest = left[:, : b - 1].square().sum(dim=1).max(dim=0)
    sure = len(fitted) >= b
    if sure and float(leverage) > _LEVERAGE:
        others = torch.arange(len(left), device=left.device) != hardest
        sure = float(torch.linalg.svdvals(fitted[others])[b - 2]) > 4 * tolerance
    return q, int(zero.sum()), sure


def _one_input_does_it(on: Tensor, features: Tensor, mismatch: float) -> bool:
    """Whether some input in the span found switches on just these units (M,), up to a share of mismatches.

    Minimises sum max(0, 1 - s_i f_i u) for signs s and features f = [W V^T, c], whose last coefficient is
    not negative.
    """
    signed = (torch.where(on, 1.0, -1.0)[:, None] * features).cpu().numpy()
    M, b = signed.shape
    cost = np.concatenate([np.zeros(b), np.ones(M)])
    bounds = [(None, None)] * (b - 1) + [(0, None)] * (M + 1)
    found = linprog(cost, A_ub=np.hstack([-signed, -np.eye(M)]), b_ub=-np.ones(M), bounds=bounds)
    solution = found.x
    return solution is not None and int((signed @ solution[:b] <= 0).sum()) <= mismatch * M


def _independent(pool: Tensor, counts: list[int], values: Tensor) -> tuple[list[int], int]:
    """Linearly independent directions of the pool, those with more zeros first, and how many there are."""
    kept: list[int] = []
    basis = pool.new_zeros(0, pool.shape[1])
    for i in sorted(range(len(pool)), key=lambda i: -counts[i]):
        rest = torch.nn.functional.normalize(pool[i] * values, dim=0)
        for _ in range(2):
            rest = rest - basis.T @ (basis @ rest)
        if float(rest.norm()) > _SAME:
            kept.append(i)
            basis = torch.cat([basis, torch.nn.functional.normalize(rest, dim=0)[None]])
    return kept, len(kept)


def _choose(view: _View, pool: Tensor, counts: list[int], mismatch: float) -> list[int] | None:
    """b directions whose inputs switch on just the units with a slope, up to a share; None if none.

    The greedy choice, then single exchanges with the rest of the pool as long as they help.
    """
    chosen, found = _independent(pool, counts, view.values)
    if found < len(view.values):
        return None
    enough = mismatch * view.left.numel()
    best = view.disagreement(pool[chosen])
    helps = True
    while best > enough and helps:
        helps = False
        others = sorted(set(range(len(pool))) - set(chosen), key=lambda i: -counts[i])[:_OTHERS]
        for place, new in itertools.product(range(len(chosen)), others):
            other = [*chosen[:place], new, *chosen[place + 1 :]]
            if (wrong := view.disagreement(pool[other])) < best:
                chosen, best, helps = other, wrong, True
                break
    return chosen if best <= enough else None
