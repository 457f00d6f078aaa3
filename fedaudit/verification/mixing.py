"""How the aggregate was mixed from the updates: which weights, clipped in which way, and what noise is left.

The change of the global weights is D = sum_i w_i c_i + noise, c_i the updates after clipping. For given w and
c the part of D - sum_i w_i c_i inside the span of the updates, against the part outside, follows an F
distribution whatever the noise's size (the ordinary test of a linear hypothesis), so the weights are tested
without trusting the claimed noise. Tensors of one entry are left out of it: they say little about the weights
and are the first to be handled differently.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedaudit.claims import ClipNorm, Weights
from fedaudit.types import ClientUpdate
from fedaudit.verification.memory import MixingEvidence
from fedaudit.verification.noise import Vector
from fedaudit.verification.residuals import vector

Clipped = Literal["not at all", "over all entries", "in each tensor"]
Matrix = NDArray[np.float64]
Leanings = dict[str, Vector]
ALL_WAYS: tuple[Clipped, ...] = ("not at all", "in each tensor", "over all entries")
_RANK = 1e-10


def clip_factors(updates: Sequence[ClientUpdate], norm: float, over: Clipped) -> dict[str, Vector]:
    """What each update (n,) is multiplied with in each tensor, to be no longer than `norm`."""
    squared = {
        name: np.array([float(np.square(vector(update.delta[name])).sum()) for update in updates])
        for name in updates[0].delta
    }
    if over == "not at all":
        return {name: np.ones(len(updates)) for name in squared}
    if over == "over all entries":
        total = np.sqrt(np.sum(list(squared.values()), axis=0))
        return dict.fromkeys(squared, _factors(total, norm))
    return {name: _factors(np.sqrt(values), norm) for name, values in squared.items()}


def _factors(norms: Vector, norm: float) -> Vector:
    return np.minimum(1.0, norm / np.maximum(norms, 1e-300))


@dataclass(frozen=True, eq=False)
class Mixture:
    """The change of the global weights beside the updates it was made of.

    Attributes:
        change: D by tensor name, each (P,).
        updates: the updates by tensor name, each (n, P).
        spacing: spacing of floating-point numbers by tensor name, each (P,).
        examples: number of examples that each client states (n,).
        claimed: the claimed weights, for their divisor and limit.
    """

    change: Mapping[str, Vector]
    updates: Mapping[str, Matrix]
    spacing: Mapping[str, Vector]
    examples: Vector
    claimed: Weights = field(default_factory=Weights)

    @classmethod
    def of(
        cls,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        updates: Sequence[ClientUpdate],
        claimed: Weights | None = None,
    ) -> "Mixture":
        """From the weights of two rounds and what was received between them."""
        names = [name for name in updates[0].delta if name in after]
        change = {name: vector(after[name]) - vector(before[name]) for name in names}
        spacing = {}
        for name in names:
            # an average passes through numbers of the clients' size, each addition rounding once
            sizes = [before[name].detach().abs() + u.delta[name].detach().abs() for u in updates]
            eps = torch.finfo(before[name].dtype).eps
            spacing[name] = vector(torch.stack(sizes).amax(0)) * eps
        stacked = {name: np.stack([vector(update.delta[name]) for update in updates]) for name in names}
        examples = np.array([float(u.num_examples) for u in updates])
        return cls(change, stacked, spacing, examples, claimed or Weights())

    @property
    def clients(self) -> int:
        """n."""
        return len(self.examples)

    @property
    def roundings(self) -> float:
        """How many roundings an entry of the average goes through."""
        return 2.0 + self.clients / 2

    @property
    def moved(self) -> bool:
        """Whether the global weights changed at all."""
        return any(bool(values.any()) for values in self.change.values())

    @cached_property
    def wide(self) -> list[str]:
        """Tensors of more than one entry, or all where there is no other."""
        return [name for name, values in self.change.items() if values.size > 1] or list(self.change)

    def weights(self, rule: str) -> Vector:
        """The clients' weights (n,) under a rule.

        Beside those of a claim: "replies" is 1/n with the n that did reply, "uncapped examples" the claimed
        weights without their limit.
        """
        if rule == "replies":
            return np.full(self.clients, 1 / self.clients)
        if rule == "uniform":
            own = self.claimed.divisor if self.claimed.rule == "uniform" else None
            return np.full(self.clients, 1 / (own or self.clients))
        if rule in ("capped", "uncapped examples"):
            limit = self.claimed.most_examples if rule == "capped" else np.inf
            counted: Vector = np.minimum(self.examples, limit)
            return counted / (self.claimed.divisor or counted.sum())
        shares: Vector = self.examples / self.examples.sum()
        return shares

    @property
    def largest(self) -> float:
        """The largest weight that the claimed ones can have, whoever replies."""
        claimed = self.claimed
        if claimed.rule == "num-examples":
            return 1 / self.clients  # what noise scaled to a mean of equal weights assumes
        return (claimed.most_examples or 1) / (claimed.divisor or self.clients)

    @property
    def others(self) -> list[str]:
        """Rules that usually stand in the place of the claimed one."""
        if self.claimed.rule == "num-examples":
            return ["uniform"]
        if self.claimed.rule == "capped":
            return ["uncapped examples", "num-examples", "uniform"]
        planned = self.claimed.divisor or self.clients
        return ["num-examples"] if planned == self.clients else ["replies", "num-examples"]

    def left(self, weights: Vector, factors: Mapping[str, Vector]) -> dict[str, Vector]:
        """D - sum_i w_i f_i u_i by tensor name."""
        return {name: d - (weights * factors[name]) @ self.updates[name] for name, d in self.change.items()}

    def test(self, weights: Vector, factors: Mapping[str, Vector]) -> "MixTest":
        """Test that D is this mixture and noise, on the tensors of more than one entry."""
        residual = self.left(weights, factors)
        pieces = {}
        for name in self.wide:
            clipped = self.updates[name] * factors[name][:, None]
            pieces[name] = MixTest(
                weights,
                clipped @ clipped.T,
                clipped @ residual[name],
                float(residual[name] @ residual[name]),
                residual[name].size,
                float(np.square(self.roundings * self.spacing[name]).sum()),
            )
        return MixTest(
            weights,
            np.sum([piece.gram for piece in pieces.values()], axis=0),
            np.sum([piece.inner for piece in pieces.values()], axis=0),
            sum(piece.total for piece in pieces.values()),
            sum(piece.size for piece in pieces.values()),
            sum(piece.slack for piece in pieces.values()),
            pieces,
        )


@dataclass(frozen=True, eq=False)
class MixTest:
    """The residual of a hypothesis about the mixture, split by the span of the updates.

    Attributes:
        weights: the weights (n,) of the hypothesis.
        gram: inner products of the clipped updates (n, n).
        inner: inner products of the clipped updates with the residual (n,).
        total: squared norm of the residual.
        size: P.
        slack: squared bound on rounding errors.
        pieces: the same for each tensor alone.
    """

    weights: Vector
    gram: Matrix
    inner: Vector
    total: float
    size: int
    slack: float
    pieces: Mapping[str, "MixTest"] = field(default_factory=dict)

    @cached_property
    def _inverse(self) -> tuple[Matrix, int]:
        values, vectors = np.linalg.eigh(self.gram)
        kept = values > _RANK * max(float(values[-1]), 1e-300)
        inverse = np.divide(1.0, values, out=np.zeros_like(values), where=kept)
        return (vectors * inverse) @ vectors.T, int(kept.sum())

    @property
    def rank(self) -> int:
        """Dimensions that the updates span."""
        return self._inverse[1]

    @cached_property
    def inside(self) -> float:
        """Squared norm of the residual inside the span."""
        return max(0.0, float(self.inner @ self._inverse[0] @ self.inner))

    @property
    def variance(self) -> float:
        """Variance of the noise per coordinate, from outside the span."""
        return max(self.total - self.inside, self.slack, 1e-300) / max(1, self.size - self.rank)

    @property
    def p_value(self) -> float:
        """Of the hypothesis, whatever the size of the noise."""
        from scipy.stats import f

        free = self.size - self.rank
        if free < 1 or self.rank < 1 or self.inside <= self.slack:
            return 1.0
        return float(f.sf(self.inside / self.rank / self.variance, self.rank, free))

    def fits(self, level: float) -> bool:
        """Whether neither the whole nor a tensor by itself rejects the hypothesis, each at `level`.

        Tensors are tested apart because they may have been clipped apart.
        """
        return self.p_value > level and all(piece.p_value > level for piece in self.pieces.values())

    def towards(self, other: Vector) -> tuple[float, float]:
        """t statistic of the residual in the direction of other weights, and what it would be under them."""
        shift = other - self.weights
        length = math.sqrt(max(0.0, float(shift @ self.gram @ shift)))
        sigma = math.sqrt(self.variance)
        if length**2 <= self.slack:
            return 0.0, 0.0
        return float(shift @ self.inner) / length / sigma, length / sigma

    def evidence(self, other: Vector) -> MixingEvidence:
        """What this round says for other weights."""
        statistic, length = self.towards(other)
        return MixingEvidence(statistic * length, length**2, 1) if length else MixingEvidence()

    def critical(self, level: float) -> float:
        """Two-sided critical value of `towards` at a level."""
        from scipy.stats import t

        return float(t.isf(level / 2, max(1, self.size - self.rank)))

    @property
    def fitted(self) -> tuple[Vector, Vector]:
        """Least-squares weights (n,) and their standard errors (n,); meaningless where rank < n."""
        inverse = self._inverse[0]
        errors = np.sqrt(np.maximum(np.diag(inverse), 0.0) * self.variance)
        return self.weights + inverse @ self.inner, errors


@dataclass(frozen=True, eq=False)
class Explanation:
    """The first hypothesis about a mixture that the data allow, the claimed one before all others.

    Attributes:
        test: the claimed hypothesis' own test.
        weights: weights (n,) that explain the change.
        rule: what they are: one of `Mixture.weights`, or "fitted".
        clipped: how the updates entered.
        factors: factor of each client and tensor.
        rounds: rounds whose evidence was needed.
    """

    test: MixTest
    weights: Vector
    rule: str
    clipped: Clipped
    factors: Mapping[str, Vector]
    rounds: int = 1


def claimed_clipping(clip: ClipNorm | None) -> Clipped:
    """How the server clips according to its claim."""
    if clip is None:
        return "not at all"
    return "over all entries" if clip.over == "all" else "in each tensor"


def leanings(mixture: Mixture, clip: ClipNorm | None, rule: str, factors: Mapping[str, Vector]) -> Leanings:
    """The usual deviations from a claim, each as the weights of the clipped updates that it comes to.

    A direction that is named beforehand is tested with more power than the whole span, and its evidence
    adds up over rounds: single rounds of well-noised aggregates cannot show how they were weighted.
    """
    found = {other: mixture.weights(other) for other in mixture.others}
    if claimed_clipping(clip) == "over all entries":
        found["not clipped"] = mixture.weights(rule) / next(iter(factors.values()))
    return found


def explain(
    mixture: Mixture,
    updates: Sequence[ClientUpdate],
    clip: ClipNorm | None,
    rule: str,
    level: float,
    earlier: Mapping[str, MixingEvidence] | None = None,
) -> Explanation:
    """Find out how the updates entered; alternatives are tried only if the claimed mixture is rejected.

    Args:
        mixture: the change and the updates.
        updates: the same updates, for their norms.
        clip: clipping by the server, if claimed.
        rule: the claimed rule of weights.
        level: of each test of the claimed mixture.
        earlier: what earlier rounds say for each of `leanings`.
    """
    claimed = claimed_clipping(clip)
    norm = clip.norm if clip is not None else 1.0
    ways: list[Clipped] = [claimed]
    if clip is not None:
        ways += [way for way in ALL_WAYS if way != claimed]
    factors = {way: clip_factors(updates, norm, way) for way in ways}
    first = mixture.test(mixture.weights(rule), factors[claimed])
    lean = leanings(mixture, clip, rule, factors[claimed])
    now = all(abs(first.towards(weights)[0]) <= first.critical(level) for weights in lean.values())
    sums = {n: first.evidence(w) + (earlier or {}).get(n, MixingEvidence()) for n, w in lean.items()}
    towards = max(sums, key=lambda name: sums[name].z)
    if first.fits(level) and now and sums[towards].z <= _normal_limit(level):
        return Explanation(first, first.weights, rule, claimed, factors[claimed])
    candidates = []
    for way in ways:
        for name in (rule, *mixture.others):
            test = mixture.test(mixture.weights(name), factors[way])
            if test.fits(level) and (way, name) != (claimed, rule):
                found = Explanation(first, test.weights, name, way, factors[way])
                candidates.append((test.p_value, found))
    if sums[towards].z > _normal_limit(level):
        way, name = (claimed, towards) if towards in mixture.others else ("not at all", rule)
        for _, found in candidates:
            if (found.clipped, found.rule) == (way, name):
                return replace(found, rounds=sums[towards].rounds)
    if candidates:
        return max(candidates, key=lambda pair: pair[0])[1]
    return Explanation(first, first.fitted[0], "fitted", claimed, factors[claimed])


def _normal_limit(level: float) -> float:
    from scipy.special import ndtri

    return -float(ndtri(level))
