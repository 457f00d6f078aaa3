"""What the claims about an aggregate come to: weights, clipping by the server, noise after averaging."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from fedaudit.claims import (
    HOLDS,
    UNCHECKED,
    VIOLATED,
    AdaptiveClipping,
    Claim,
    ClipNorm,
    EpsilonClaim,
    Finding,
    GaussianNoise,
    Weights,
)
from fedaudit.types import ClientUpdate
from fedaudit.verification.adaptive import adaptive_check
from fedaudit.verification.checks import Check, Scene, noise_check
from fedaudit.verification.memory import MixingEvidence
from fedaudit.verification.mixing import (
    Explanation,
    Mixture,
    claimed_clipping,
    clip_factors,
    explain,
    leanings,
)
from fedaudit.verification.residuals import Residual, vector
from fedaudit.verification.update_checks import epsilon_finding

NO_RELEASE = "nothing was released in this round: the global weights did not change"
NO_AGGREGATE = (
    "the weights after this round are not known; whoever receives the next broadcast could check it"
)


@dataclass(frozen=True, eq=False)
class Round:
    """What went into an aggregate and what came out.

    Attributes:
        claims: what is claimed about the round.
        updates: what was received; empty if the observer does not see single updates.
        before: the weights that were broadcast.
        after: the weights of the next broadcast; None if unknown.
        clip_norms: the clip norm of this round and of the next, where they are known.
    """

    claims: Sequence[Claim]
    updates: Sequence[ClientUpdate]
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor] | None
    clip_norms: tuple[float, float] | None = None

    @property
    def noise(self) -> GaussianNoise | None:
        """The noise claimed on the aggregate."""
        return next((c for c in self.claims if isinstance(c, GaussianNoise) and c.on == "aggregate"), None)

    @property
    def clip(self) -> ClipNorm | None:
        """Clipping claimed of the server."""
        return next((c for c in self.claims if isinstance(c, ClipNorm) and c.by == "server"), None)

    @property
    def weights(self) -> Weights | None:
        """The claimed weights."""
        return next((c for c in self.claims if isinstance(c, Weights)), None)


class Aggregate:
    """A round's aggregate with its explanation, found once for all checks."""

    def __init__(self, seen: Round, earlier: Mapping[str, MixingEvidence]) -> None:
        self.seen, self.earlier = seen, dict(earlier)
        self.mixture = (
            Mixture.of(seen.before, seen.after, seen.updates, seen.weights)
            if seen.after is not None and seen.updates
            else None
        )
        self.explanation = lru_cache(maxsize=4)(self._explain)
        self.residual = lru_cache(maxsize=4)(self._residual)
        self.raw = lru_cache(maxsize=4)(self._raw)

    @property
    def released(self) -> bool:
        """Whether the weights changed."""
        before, after = self.seen.before, self.seen.after
        return after is not None and any(
            not after[name].equal(before[name]) for name in before if name in after
        )

    @property
    def rule(self) -> str:
        """The claimed weights, or equal ones."""
        return self.seen.weights.rule if self.seen.weights is not None else "uniform"

    @property
    def _norm(self) -> float:
        return self.seen.clip.norm if self.seen.clip is not None else 1.0

    @property
    def tests(self) -> int:
        """Tests of the mixture: whole, tensors, each usual deviation in this round and over all rounds."""
        if self.mixture is None:
            return 0
        return 1 + 2 * (1 + len(self.mixture.others)) + len(self.mixture.wide)

    def _explain(self, level: float) -> Explanation:
        if self.mixture is None:
            raise ValueError(
                "a mixture is explained by updates and the weights after them, got neither: give both"
            )
        return explain(self.mixture, self.seen.updates, self.seen.clip, self.rule, level, self.earlier)

    def evidence(self, level: float) -> dict[str, MixingEvidence]:
        """What all rounds so far say for each usual deviation from the claimed mixture."""
        total = dict(self.earlier)
        if self.mixture is not None and self.released:
            test = self.explanation(level).test
            claimed = clip_factors(self.seen.updates, self._norm, claimed_clipping(self.seen.clip))
            for name, weights in leanings(self.mixture, self.seen.clip, self.rule, claimed).items():
                total[name] = total.get(name, MixingEvidence()) + test.evidence(weights)
        return total

    def _raw(self, level: float) -> tuple[str, ...]:
        """Tensors whose change is explained only if they were not clipped with the rest."""
        mixture, clip = self.mixture, self.seen.clip
        if mixture is None or clip is None:
            return ()
        found = self.explanation(level)
        if found.clipped == "not at all" or found.rule == "fitted":
            return ()
        clipped = mixture.left(found.weights, found.factors)
        whole = mixture.left(found.weights, clip_factors(self.seen.updates, clip.norm, "not at all"))
        std = self.seen.noise.std if self.seen.noise is not None else 0.0
        names = []
        for name, values in clipped.items():
            slack = mixture.roundings * float(np.linalg.norm(mixture.spacing[name]))
            allowed = slack + std * _chi(values.size, level)
            if float(np.linalg.norm(values)) > allowed >= float(np.linalg.norm(whole[name])):
                names.append(name)
        return tuple(names)

    def _residual(self, level: float) -> Residual | None:
        """The noise of the aggregate, everything else taken off as far as it is explained."""
        noise, mixture = self.seen.noise, self.mixture
        if noise is None or self.seen.after is None:
            return None
        if mixture is None:
            signal = self._bound()
            change = {
                name: vector(self.seen.after[name]) - vector(self.seen.before[name])
                for name in self.seen.before
                if self.seen.before[name].is_floating_point()
            }
            spacing = {n: np.abs(vector(self.seen.after[n])) * 1.2e-7 / noise.std for n in change}
            return Residual({n: d / noise.std for n, d in change.items()}, spacing, signal / noise.std)
        found, raw = self.explanation(level), self.raw(level)
        left = mixture.left(found.weights, found.factors)
        unclipped = mixture.left(
            found.weights,
            {name: np.ones(mixture.clients) for name in raw}
            | {name: f for name, f in found.factors.items() if name not in raw},
        )
        parts = {name: (unclipped if name in raw else left)[name] / noise.std for name in left}
        spacing = {name: values / noise.std for name, values in mixture.spacing.items()}
        lost = found.test.rank if found.rule == "fitted" else 0
        return Residual(parts, spacing, 0.0, mixture.roundings, lost)

    def _bound(self) -> float:
        """The longest noise-free change, as the claims have it; infinite if they do not say."""
        noise, clip = self.seen.noise, self.seen.clip
        if noise is not None and noise.signal is not None:
            return noise.signal
        any_clip = clip or next(
            (c for c in self.seen.claims if isinstance(c, ClipNorm) and c.of == "update"), None
        )
        return any_clip.norm if any_clip is not None and any_clip.over == "all" else math.inf


def _chi(size: int, level: float) -> float:
    from scipy.stats import chi2

    return math.sqrt(float(chi2.isf(level / 2, size)))


def aggregate_checks(aggregate: Aggregate, scene: Scene) -> list[Check]:
    """A check for every claim about the aggregate."""
    seen = aggregate.seen
    checks: list[Check] = []
    for claim in seen.claims:
        about_noise = isinstance(claim, (GaussianNoise, EpsilonClaim)) and claim.on == "aggregate"
        about_server = isinstance(claim, Weights) or (isinstance(claim, ClipNorm) and claim.by == "server")
        if isinstance(claim, AdaptiveClipping):
            checks.append(adaptive_check(claim, seen.updates, seen.clip_norms, scene))
        elif not (about_noise or about_server):
            continue
        elif seen.after is None:
            checks.append(scene.without_tests(claim, UNCHECKED, NO_AGGREGATE))
        elif not aggregate.released and any(u.delta for u in seen.updates):
            checks.append(scene.without_tests(claim, UNCHECKED, NO_RELEASE))
        elif about_server and aggregate.mixture is None:
            reason = "single updates are not seen; the server, which receives them, could check it"
            checks.append(scene.without_tests(claim, UNCHECKED, reason))
        elif isinstance(claim, Weights):
            checks.append(_weights(claim, aggregate, scene))
        elif isinstance(claim, ClipNorm):
            checks.append(_clip(claim, aggregate, scene))
        elif isinstance(claim, GaussianNoise):
            checks.append(_noise(claim, aggregate, scene))
        elif isinstance(claim, EpsilonClaim):
            checks.append(_epsilon(claim, aggregate, scene))
    return checks


OTHER = "more than a mixture of the updates and the claimed noise is in the aggregate"


def _unexplained(aggregate: Aggregate, level: float) -> bool:
    """Whether what is left is too large for the claimed noise: then the mixture is not understood."""
    residual = aggregate.residual(level)
    return residual is not None and residual.exact and residual.whole_interval(level)[0] > 1


FOREIGN = "the aggregate holds something that is in no update, and no noise is claimed"


def _foreign(aggregate: Aggregate, level: float) -> bool:
    """Whether an aggregate without claimed noise is more than its updates, beyond rounding."""
    mixture = aggregate.mixture
    if mixture is None or aggregate.seen.noise is not None:
        return False
    found = aggregate.explanation(level)
    left = mixture.left(found.weights, found.factors)
    return any(
        float(np.linalg.norm(values)) > mixture.roundings * float(np.linalg.norm(mixture.spacing[name]))
        for name, values in left.items()
    )


def _weights(claim: Weights, aggregate: Aggregate, scene: Scene) -> Check:
    mixture = aggregate.mixture
    assert mixture is not None

    def at(level: float) -> Finding:
        found = aggregate.explanation(level)
        test, claimed = found.test, mixture.weights(claim.rule)
        direction = "uniform" if claim.rule == "num-examples" else "num-examples"
        other = mixture.weights(direction)
        estimates, errors = test.fitted
        largest = int(np.argmax(estimates)) if found.rule == "fitted" else int(np.argmax(found.weights))
        identified = test.rank == mixture.clients
        half = test.critical(level) * float(errors[largest]) if identified else math.inf
        measured = float(estimates[largest]) if identified else float(found.weights[largest])
        ends = (measured, measured - half, measured + half) if identified else (measured, None, None)
        if found.rule != claim.rule:
            over = f" of {found.rounds} rounds" if found.rounds > 1 else ""
            how = f"no weighting of the updates as {claim.rule} explains the aggregate"
            if found.rule != "fitted":
                how = (
                    f"the aggregate{over} weights by {found.rule}, up to {found.weights.max():.4g} for one "
                    f"client instead of {claimed.max():.4g}"
                )
            return scene.finding(claim, VIOLATED, how, *ends)
        if _foreign(aggregate, level):
            return scene.finding(claim, VIOLATED, FOREIGN, *ends)
        if claim.cap is not None and float(claimed.max()) > claim.cap * (1 + 1e-9):
            reason = f"one client weighs {claimed.max():.4g}"
            return scene.finding(claim, VIOLATED, reason, *ends)
        power = aggregate.evidence(level)[direction].information ** 0.5
        if _unexplained(aggregate, level):
            return scene.finding(claim, UNCHECKED, OTHER, *ends)
        if power > test.critical(level) or half <= float(claimed[largest]):
            return scene.finding(claim, HOLDS, "no other weighting fits the aggregate better", *ends)
        if np.allclose(other, claimed):
            reason = "all clients state equally many examples, and the noise hides single weights"
        else:
            reason = f"the noise hides the difference to {direction} weights"
        return scene.finding(
            claim, UNCHECKED, f"{reason}; whoever knows the noise or sees more rounds could check it", *ends
        )

    return Check(aggregate.tests, at)


def _clip(claim: ClipNorm, aggregate: Aggregate, scene: Scene) -> Check:
    seen, mixture = aggregate.seen, aggregate.mixture
    assert mixture is not None

    def at(level: float) -> Finding:
        found, raw = aggregate.explanation(level), aggregate.raw(level)
        factors = dict(found.factors) | {name: np.ones(mixture.clients) for name in raw}
        squared = [
            np.square(mixture.updates[name] * factors[name][:, None]).sum(1) for name in mixture.updates
        ]
        entered = float(np.sqrt(np.sum(squared, axis=0)).max())
        ends = (entered, None, claim.norm)
        if raw:
            reason = f"tensor {raw[0]!r} enters the aggregate unclipped ({len(raw)} such tensors)"
            return scene.finding(claim, VIOLATED, reason, *ends)
        claimed = "over all entries" if claim.over == "all" else "in each tensor"
        if found.clipped != claimed and found.rule != "fitted":
            return scene.finding(claim, VIOLATED, f"updates are clipped {found.clipped}", *ends)
        if found.rule == "fitted":
            return scene.finding(
                claim,
                VIOLATED,
                "no mixture of updates clipped as claimed explains the aggregate",
                None,
                None,
                claim.norm,
            )
        if _unexplained(aggregate, level):
            return scene.finding(claim, UNCHECKED, OTHER, *ends)
        if all(np.allclose(found.factors[name], 1.0) for name in found.factors):
            return scene.finding(claim, HOLDS, "no update was long enough to be clipped", *ends)
        if not _clipping_shows(aggregate, found, level):
            reason = "the noise hides whether updates were clipped; whoever knows the noise could check it"
            return scene.finding(claim, UNCHECKED, reason, *ends)
        return scene.finding(claim, HOLDS, "the aggregate is made of updates clipped as claimed", *ends)

    return Check(0 if seen.weights is not None else aggregate.tests, at)


def _clipping_shows(aggregate: Aggregate, found: Explanation, level: float) -> bool:
    """Whether unclipped updates would have been noticed, in this round or in all so far."""
    mixture, clip = aggregate.mixture, aggregate.seen.clip
    assert mixture is not None and clip is not None
    if clip.over == "all":
        gathered = aggregate.evidence(level)["not clipped"].information
        return bool(gathered**0.5 > found.test.critical(level))
    raw = clip_factors(aggregate.seen.updates, clip.norm, "not at all")
    return not mixture.test(found.weights, raw).fits(level)


def _noise(claim: GaussianNoise, aggregate: Aggregate, scene: Scene) -> Check:
    seen = aggregate.seen
    size = sum(1 for tensor in seen.before.values() if tensor.is_floating_point())
    integers = [
        name
        for name, tensor in seen.before.items()
        if seen.after is not None
        and not tensor.is_floating_point()
        and name in seen.after
        and not seen.after[name].equal(tensor)
    ]

    def at(level: float) -> Finding:
        residual = aggregate.residual(level)
        assert residual is not None
        others = "the server, which sees the single updates, could check it"
        if aggregate.seen.updates:
            others = "whoever knows how they were mixed could check it"
        finding = noise_check(claim, residual, scene, others, blame_signal=not residual.exact).conclude(level)
        if finding.verdict != VIOLATED and integers:
            reason = f"integer entry {integers[0]!r} was released, and no Gaussian noise fits into it"
            return scene.finding(claim, VIOLATED, reason, finding.measured, finding.low, finding.high)
        return finding

    return Check(2 * (size + 1) + 1, at)


def _epsilon(claim: EpsilonClaim, aggregate: Aggregate, scene: Scene) -> Check:
    def at(level: float) -> Finding:
        residual = aggregate.residual(level)
        sensitivity = 1.0
        if aggregate.mixture is not None:
            found = aggregate.explanation(level)
            clipped = found.clipped == "over all entries" and not aggregate.raw(level)
            unbounded = aggregate.seen.clip is not None and not clipped
            largest = float(found.weights.max()) / aggregate.mixture.largest
            sensitivity = math.inf if unbounded else largest
        noise = None if residual is None else residual.noise_scale(level)
        return epsilon_finding(claim, scene, noise, sensitivity)

    return Check(0, at)
