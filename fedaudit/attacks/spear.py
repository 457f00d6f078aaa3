"""SPEAR: whole batches, exactly, from the gradient of a fully connected first layer followed by ReLU."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from fedaudit.attacks.replay import Mode, gradient_residual, intercept, labels_by_slopes, rounding
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Reconstruction, RoundContext

_log = logging.getLogger(__name__)

_AT_ONCE = 1024  # submatrices whose null vectors are computed together
_SIGMAS = 6.0  # entries within so many standard deviations of the noise count as zero
_LEVERAGE = 0.99  # a row above it alone fixes one dimension of the direction: the direction is not confirmed
_SAME = 1e-4  # sine of the angle between two directions that count as one
_REFINEMENTS = 3


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
    submatrices: int = 100_000,
    deadline: float = math.inf,
) -> Separation:
    """The inputs and output gradients of each example of a batch behind the gradient of a layer z = W x + c.

    With dL/dW = D X (D: M x b, X: b x N) of rank b, D = L Q for L = dL/dW V, V the right singular vectors, and
    an unknown Q (b x b). ReLU behind the layer makes entries of D zero, about half of each column, so b - 1
    random rows of L are all zero in column n with probability 2^-(b-1), and their null vector is then
    column n of Q up to scale. Directions with at least `tau` M zeros are kept and refitted to all their zero
    rows; b independent ones are chosen, those with most zeros first; the scale follows from L Q s = dL/dc.
    The work grows as 2^b.

    Exact up to rounding where it returns; NOT an approximation for gradients under strong noise, where it
    fails. It cannot separate examples with the same input, which count as one.

    Source: Dimitrov, Baader, Mueller, Vechev 2024, arXiv 2403.03945.
    Differs from Dimitrov et al.: a direction must pass two tests of its own, in place of a search over
    choices of b directions. No single row may be needed to fix it (leverage below 0.99 among its zero
    rows): combinations of examples fail that if their output gradients are in general position. And some
    input must switch just its non-zero units on at the known weights, a linear programme; combinations
    fail that even where output gradients are parallel, as with two classes. So `tau` can be low.

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
    alive = left[left.norm(dim=1) > 2 * tolerance]
    least = tau * M - (M - len(alive))
    features = torch.cat([weight @ right.T, bias[:, None]], dim=1)  # (M, b + 1)
    found, seen = left.new_zeros(0, rank), left.new_zeros(0, rank)
    counts: list[int] = []
    tried = 0
    if rank == 1:
        found = left.new_ones(1, 1)
    while len(found) < rank:
        if tried >= submatrices or time.monotonic() > deadline or len(alive) < rank:
            raise ValueError(
                f"spear found {len(found)} of {rank} examples within {tried} submatrices: the batch is too "
                f"large, the update too noisy or its units too few; raise submatrices or seconds"
            )
        several = min(_AT_ONCE, submatrices - tried, max(16, 2 ** (rank + 2)))
        tried += several
        for q, zeros in _directions(alive, several, tolerance, least, generator):
            shape = torch.nn.functional.normalize(q * values, dim=0)  # slopes L q have this geometry
            if bool((seen @ shape).abs().gt(1 - _SAME**2).any()):
                continue
            seen = torch.cat([seen, shape[None]])
            if _one_input_does_it((left @ q).abs() > tolerance, features):
                found, counts = _greedy(found, counts, q, zeros, values)
    mixing = found[:rank].T  # (b, b), columns are directions
    scale = torch.linalg.lstsq(left @ mixing, bias_gradient[:, None]).solution[:, 0]
    x = torch.linalg.solve(mixing * scale, right)
    slopes = left @ (mixing * scale)
    off = slopes.abs() <= tolerance * (mixing * scale).norm(dim=0)
    return Separation(x, slopes.masked_fill(off, 0.0).T, off.double().mean(dim=0), tried)


def _directions(
    rows: Tensor, several: int, tolerance: float, least: float, generator: torch.Generator
) -> Iterator[tuple[Tensor, int]]:
    """Unit directions q (b,) with their numbers of zeros, from random rows (b - 1 at a time)."""
    b = rows.shape[1]
    draws = torch.rand(several, len(rows), generator=generator).to(rows.device)
    chosen = draws.topk(b - 1, dim=1).indices
    _, values, vectors = torch.linalg.svd(rows[chosen], full_matrices=True)  # (several, b - 1), (several, b, b)
    smallest, q = values[:, -1], vectors[:, -1]
    # An error e in the rows turns the null vector by about e / smallest singular value.
    lengths = rows.norm(dim=1)
    slack = tolerance * (1 + lengths / smallest.clamp_min(1e-300)[:, None])
    zero = (q @ rows.T).abs() <= slack
    enough = (zero.sum(dim=1) >= max(least, b)) & (smallest > 4 * tolerance)
    for k in enough.nonzero()[:, 0].tolist():
        refined = _refine(rows, lengths, zero[k], tolerance)
        if refined is not None and refined[1] >= least:
            yield refined


def _refine(rows: Tensor, lengths: Tensor, zero: Tensor, tolerance: float) -> tuple[Tensor, int] | None:
    """The direction that all zero rows agree on; None if they do not, or if it hangs on a single row."""
    b = rows.shape[1]
    for _ in range(_REFINEMENTS):
        if int(zero.sum()) < b:
            return None
        left, values, vectors = torch.linalg.svd(rows[zero], full_matrices=False)
        if float(values[b - 2]) <= 4 * tolerance:  # the zero rows leave more than one direction open
            return None
        q = vectors[-1]
        again = (rows @ q).abs() <= tolerance * (1 + lengths / values[b - 2])
        if torch.equal(again, zero):
            break
        zero = again
    if float(values[-1]) > tolerance * math.sqrt(float(zero.sum())):  # they are not zero together
        return None
    if float(left[:, : b - 1].square().sum(dim=1).max()) > _LEVERAGE:
        return None
    return q, int(zero.sum())


def _one_input_does_it(on: Tensor, features: Tensor) -> bool:
    """Whether some input in the span found switches on just these units (M,), up to one in a hundred.

    Minimises sum max(0, 1 - s_i f_i u) for signs s and features f = [W V^T, c], whose last coefficient is
    not negative.
    """
    signed = (torch.where(on, 1.0, -1.0)[:, None] * features).cpu().numpy()
    M, b = signed.shape
    cost = np.concatenate([np.zeros(b), np.ones(M)])
    bounds = [(None, None)] * (b - 1) + [(0, None)] * (M + 1)
    found = linprog(cost, A_ub=np.hstack([-signed, -np.eye(M)]), b_ub=-np.ones(M), bounds=bounds)
    return bool(found.success and (signed @ found.x[:b] <= 0).sum() <= M // 100)


def _greedy(
    found: Tensor, counts: list[int], q: Tensor, zeros: int, values: Tensor
) -> tuple[Tensor, list[int]]:
    """Linearly independent directions, those with more zeros first."""
    candidates, zeros_of = torch.cat([found, q[None]]), [*counts, zeros]
    kept: list[int] = []
    basis = q.new_zeros(0, len(q))
    for i in sorted(range(len(candidates)), key=lambda i: -zeros_of[i]):
        unit = torch.nn.functional.normalize(candidates[i] * values, dim=0)
        rest = unit - basis.T @ (basis @ unit)
        rest = rest - basis.T @ (basis @ rest)
        if float(rest.norm()) > _SAME:
            kept.append(i)
            basis = torch.cat([basis, torch.nn.functional.normalize(rest, dim=0)[None]])
    return candidates[kept], [zeros_of[i] for i in kept]


@dataclass(frozen=True)
class Spear:
    """Exact recovery of a whole batch from the first fully connected layer, if ReLU follows it.

    The number of examples is the numerical rank of that layer's gradient. Known rounding of the update's
    number format sets the tolerances; where the rank exceeds the examples that can be behind the update,
    the rest is taken as noise. Labels are those whose gradient at the layer fits the slopes found. Only
    plain SGD sends the gradient assumed here. Several local steps still have this structure, one direction
    per distinct example, but weights that move between steps blur the labels and the objective.

    A failure is NOT evidence of privacy: it says that this search ended without success.

    Source: Dimitrov, Baader, Mueller, Vechev 2024, arXiv 2403.03945; see `separate` for what differs.

    Attributes:
        tau: smallest share of units that are off for an example.
        submatrices: budget of the search.
        mode: "train" or "eval": how normalisation layers ran in the client; dropout is always off.
        seconds: time budget per update; 0 is no limit.
    """

    tau: float = 0.1
    submatrices: int = 100_000
    mode: Mode = "train"
    seconds: float = 0.0

    name = "spear"
    needs = Needs.MODEL | Needs.TRAINING | Needs.SHAPE

    def __post_init__(self) -> None:
        if not 0 <= self.tau < 1:
            raise ValueError(f"tau is a share of units from 0 to below 1, got {self.tau}: use e.g. 0.1")
        if self.submatrices < 1:
            raise ValueError(f"submatrices must be positive, got {self.submatrices}: use e.g. 100000")
        if self.seconds < 0:
            raise ValueError(f"seconds must not be negative, got {self.seconds}: use 0 for no limit")

    def reconstruct(self, update: ClientUpdate, ctx: RoundContext) -> Reconstruction:
        """The batch (b, *input_shape) in no particular order; b is the numerical rank.

        Raises:
            ValueError: if the first layer is not Linear with bias and ReLU, more examples than min(M, N) can
                be behind the update, or the search ends without all of them.
        """
        deadline = time.monotonic() + self.seconds if self.seconds else math.inf
        seen = intercept(self.name, update, ctx, self.mode)
        layer = seen.seen.first_linear(self.name)
        if not seen.seen.feeds_relu_only(layer):
            raise ValueError(f"spear needs ReLU, and nothing else, behind {layer}: choose linear-layer or dlg")
        linear = seen.model.get_submodule(layer.name)
        assert isinstance(linear, torch.nn.Linear)
        weight, bias = seen.of(layer.name)
        if not bool(weight.any()):
            raise ValueError(f"the gradient of {layer} must not be zero, got zero: skip this update")
        if seen.examples > min(weight.shape):
            raise ValueError(
                f"spear separates at most min(units, inputs) = {min(weight.shape)} examples of {layer}, got "
                f"{seen.examples}: choose another attack"
            )
        key = f"{layer.name}.weight" if layer.name else "weight"
        noise = rounding(update, ctx, key)
        rank, _ = numerical_rank(weight, noise)
        stated = seen.examples
        if rank > stated:  # noise that the number format does not explain
            rest = torch.linalg.svdvals(weight)[stated:].square().sum()
            noise = math.sqrt(float(rest) / math.prod(side - stated for side in weight.shape))
            rank = min(stated, numerical_rank(weight, noise)[0])
            if rank == 0:
                raise ValueError(f"the gradient of {layer} does not stand above its noise: skip this update")
        parts = separate(
            weight,
            bias,
            linear.weight.detach(),
            linear.bias.detach(),
            rank,
            torch.Generator().manual_seed(ctx.seed),
            noise=noise,
            tau=self.tau,
            submatrices=self.submatrices,
            deadline=deadline,
        )
        x = parts.x.reshape(rank, *seen.seen.x.shape[1:])
        y = labels_by_slopes(seen, layer.name, x, parts.slopes)
        on = linear(parts.x) > 0
        agreement = float((on == (parts.slopes != 0)).double().mean())
        objective = gradient_residual(seen, x, y)
        _log.debug("spear: residual %.2e after %d submatrices", objective, parts.submatrices)
        steps = ctx.steps(update) or 1
        conditions: dict[str, float | int | str | bool] = {
            "labels": "estimated",
            "batch-size": stated,
            "local-steps": steps,
            "batchnorm-mode": self.mode,
            "layer": layer.name,
            "numerical-rank": rank,
            "sparsity": float(parts.zeros.mean()),
            "relu-agreement": agreement,
            "noise-std": noise,
            "submatrices": parts.submatrices,
        }
        if steps > 1:
            conditions["warning"] = "weights moved between local steps: labels and objective are approximate"
        return Reconstruction(
            x.cpu().to(torch.float32), y.cpu(), objective, parts.submatrices, conditions
        )
