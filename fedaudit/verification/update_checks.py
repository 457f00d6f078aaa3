"""What the claims about one client's update come to, from the update alone or with what an oracle adds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fedaudit.claims import (
    HOLDS,
    UNCHECKED,
    VIOLATED,
    Claim,
    ClipNorm,
    EpsilonClaim,
    Finding,
    GaussianNoise,
    NothingBeside,
    PoissonSampling,
    QuantizationLevels,
    Sparsity,
)
from fedaudit.types import ClientUpdate
from fedaudit.verification.checks import NOTICED, Check, Scene, noise_check
from fedaudit.verification.contents import RELATIVE, Integers, Length, kept_share, levels
from fedaudit.verification.epsilon import epsilon_of
from fedaudit.verification.noise import signal_noticed
from fedaudit.verification.residuals import Residual, update_residual
from fedaudit.verification.sampling import TESTS, sampling_p_values

MARGIN = 0.01
"""Relative difference between two accountants that is no violation: they use different grids."""


@dataclass(frozen=True, eq=False)
class Seen:
    """One client's update and what else the observer knows of it.

    Attributes:
        update: the update.
        claims: what is claimed about it.
        noise_free: the update without its noise, where the observer can compute it (an oracle).
        batches: indices of the examples of each local step, where the observer knows them.
    """

    update: ClientUpdate
    claims: Sequence[Claim]
    noise_free: Mapping[str, Tensor] | None = None
    batches: Sequence[Tensor] | None = None

    def first(self, kind: type[Claim], **fields: str) -> Claim | None:
        """The first claim of a kind whose fields have these values."""
        return next(
            (
                claim
                for claim in self.claims
                if isinstance(claim, kind) and all(getattr(claim, key) == v for key, v in fields.items())
            ),
            None,
        )

    @property
    def noise(self) -> GaussianNoise | None:
        """The noise claimed on the update."""
        found = self.first(GaussianNoise, on="update")
        return found if isinstance(found, GaussianNoise) else None

    def residual(self) -> Residual | None:
        """What is left of the update for the claimed noise; None without a claim."""
        if self.noise is None:
            return None
        signal = self.noise.signal
        clip = self.first(ClipNorm, of="update", by="client")
        if signal is None and isinstance(clip, ClipNorm):
            tensors = 1 if clip.over == "all" else len(self.update.delta)
            signal = clip.norm * math.sqrt(tensors)
        return update_residual(
            self.update.before, self.update.delta, self.noise.std, signal=signal, known=self.noise_free
        )


def update_checks(seen: Seen, residual: Residual | None, scene: Scene) -> list[Check]:
    """A check for every claim that speaks of single updates; those about the cohort are left to others."""
    checks: list[Check] = []
    for claim in seen.claims:
        if isinstance(claim, ClipNorm) and claim.by == "client":
            checks.append(_clip_integers(claim, seen, _clip(claim, seen, residual, scene)))
        elif isinstance(claim, GaussianNoise) and claim.on == "update" and residual is not None:
            others = "an oracle that can compute the noise-free update could check it"
            check = noise_check(claim, residual, scene, others, blame_signal=not residual.exact)
            checks.append(_with_integers(claim, seen, check))
        elif isinstance(claim, Sparsity):
            checks.append(_sparsity(claim, seen, scene))
        elif isinstance(claim, QuantizationLevels):
            checks.append(_quantization(claim, seen, scene))
        elif isinstance(claim, PoissonSampling):
            checks.append(_sampling(claim, seen, scene))
        elif isinstance(claim, EpsilonClaim) and claim.on == "update":
            checks.append(_epsilon(claim, residual, scene))
        elif isinstance(claim, NothingBeside):
            checks.append(_beside(claim, seen, scene))
    return checks


def _clip(claim: ClipNorm, seen: Seen, residual: Residual | None, scene: Scene) -> Check:
    if residual is not None:
        return _clip_under_noise(claim, residual, scene)
    if claim.of == "example":
        return scene.without_tests(
            claim,
            UNCHECKED,
            "an update without noise does not bound single gradients; a client or an oracle sees them",
        )
    length = Length.of(seen.update.before, seen.update.delta)
    tensors = length.excesses(claim.norm)
    worst = max(tensors, key=lambda name: length.norms[name])
    if claim.over == "layer":
        over = {name: value for name, value in tensors.items() if value > 0}
        name = max(over or tensors, key=lambda key: length.norms[key])
        verdict = VIOLATED if over else HOLDS
        return scene.without_tests(
            claim, verdict, f"tensor {name!r} is the longest", length.norms[name], None, claim.norm
        )
    if length.excess(claim.norm) <= 0:
        return scene.without_tests(
            claim, HOLDS, "the norm over all entries keeps it", length.whole, None, claim.norm
        )
    if tensors[worst] > 0:
        rest = math.sqrt(max(0.0, length.whole**2 - length.norms[worst] ** 2))
        alone = f", all others together {rest:.4g}" if rest <= claim.norm else ""
        reason = f"tensor {worst!r} alone has norm {length.norms[worst]:.4g}{alone}"
        if alone:
            reason += ": it was left out of the clipping"
    else:
        reason = "each tensor alone keeps the norm, all together do not: clipped per tensor"
    return scene.without_tests(claim, VIOLATED, reason, length.whole, None, claim.norm)


def _clip_integers(claim: ClipNorm, seen: Seen, check: Check) -> Check:
    """Integer entries count, too: what they moved by belongs to the vector that is as long as is claimed."""
    if claim.of == "example":
        return check
    counters = Integers.of(seen.update)

    def at(level: float) -> Finding:
        finding = check.conclude(level)
        rest = 0.0 if seen.noise is not None else finding.measured or 0.0
        whole = counters.most if claim.over == "layer" else math.hypot(rest, counters.norm)
        if finding.verdict != VIOLATED and counters and whole > claim.norm * (1 + RELATIVE):
            reason = f"integer entry {counters.longest!r} moved by {counters.most:.4g} and was not clipped"
            return replace(finding, verdict=VIOLATED, measured=whole, reason=reason)
        if finding.verdict == HOLDS and counters.unknown:
            reason = (
                f"{finding.reason}; {counters.names} were not kept, and whoever receives them could check"
            )
            return replace(finding, verdict=UNCHECKED, reason=reason)
        return finding

    return Check(check.tests, at)


def _clip_under_noise(claim: ClipNorm, residual: Residual, scene: Scene) -> Check:
    """The signal cannot be longer than the clip norm where the residual is not longer than both allow."""

    def at(level: float) -> Finding:
        low, _ = residual.whole_interval(level)
        tensors = residual.tensor_intervals(level)
        worst = max(tensors, key=lambda name: tensors[name][0])
        if low > 1 or tensors[worst][0] > 1:
            where = f"tensor {worst!r}" if tensors[worst][0] > low else "the update"
            return scene.finding(
                claim,
                VIOLATED,
                f"{where} is longer than the clip norm and the claimed noise allow: only noise of "
                f"{max(low, tensors[worst][0]):.3g} times its std would explain it",
                *_lengths(residual, claim),
            )
        if claim.of == "example" and not residual.exact:
            return scene.finding(
                claim,
                UNCHECKED,
                "the update is no longer than clipped gradients can make it, but single gradients are seen "
                "by a client or an oracle only",
                *_lengths(residual, claim),
            )
        if residual.exact:
            reason = "the update is the one that clipping as claimed gives, and noise"
            return scene.finding(claim, HOLDS, reason)
        if not signal_noticed(residual.size, residual.signal, 2.0, level):
            return scene.finding(
                claim,
                UNCHECKED,
                "nothing contradicts it, but the noise would hide a signal of twice the clip norm; "
                "the client, before it adds the noise, could check it",
                *_lengths(residual, claim),
            )
        return scene.finding(
            claim,
            HOLDS,
            "the update is no longer than the clip norm and the noise",
            *_lengths(residual, claim),
        )

    # the limits from above are the upper halves of the intervals that the noise is tested with
    return Check(len(residual.parts) + 1, at)


def _lengths(residual: Residual, claim: ClipNorm) -> tuple[float | None, float | None, float | None]:
    """The length that is left for the signal once the noise's expected share is taken off."""
    unit = claim.norm / residual.signal if residual.signal and math.isfinite(residual.signal) else None
    if unit is None:
        return None, None, None
    left = max(0.0, residual.norm**2 - residual.size)
    return math.sqrt(left) * unit, None, claim.norm


def _with_integers(claim: GaussianNoise, seen: Seen, check: Check) -> Check:
    """No Gaussian noise fits into an integer entry: it hides nothing unless it comes back as it was sent."""
    counters = Integers.of(seen.update)

    def at(level: float) -> Finding:
        finding = check.conclude(level)
        if counters:
            note = (
                f"integer entry {counters.longest!r} was sent as trained, and no Gaussian noise fits into it"
            )
            reason = f"{finding.reason}; {note}" if finding.verdict == VIOLATED else note
            return replace(finding, verdict=VIOLATED, reason=reason)
        if counters.unknown and finding.verdict == HOLDS:
            note = f"{counters.names} hold no such noise, and what came back of them was not kept"
            return replace(finding, verdict=UNCHECKED, reason=f"{finding.reason}; {note}")
        return finding

    return Check(check.tests, at)


def _sparsity(claim: Sparsity, seen: Seen, scene: Scene) -> Check:
    share, rounding = kept_share(seen.update.delta)
    if share > claim.kept + rounding:
        reason = f"{share:.4g} of the coordinates are not zero"
        return scene.without_tests(claim, VIOLATED, reason, share, None, claim.kept)
    return scene.without_tests(claim, HOLDS, "counted", share, None, claim.kept)


def _quantization(claim: QuantizationLevels, seen: Seen, scene: Scene) -> Check:
    update = seen.update
    found = {n: levels(update.before[n], change, claim.levels) for n, change in update.delta.items()}
    worst = max(found, key=lambda name: found[name][0])
    most = found[worst][0]
    if most > claim.levels:
        return scene.without_tests(
            claim, VIOLATED, f"tensor {worst!r} has {most} values", float(most), None, float(claim.levels)
        )
    if not all(apart for _, apart in found.values()):
        name = next(name for name, (_, apart) in found.items() if not apart)
        return scene.without_tests(
            claim,
            UNCHECKED,
            f"rounding of the weights in {name!r} is as coarse as the levels; whoever reads the update "
            "before it is added to the weights could count them",
            float(most),
            None,
            float(claim.levels),
        )
    return scene.without_tests(claim, HOLDS, "counted", float(most), None, float(claim.levels))


def _sampling(claim: PoissonSampling, seen: Seen, scene: Scene) -> Check:
    batches = seen.batches
    if not batches:
        return scene.without_tests(
            claim,
            UNCHECKED,
            "an update does not show which examples a step used; the client, or an oracle, sees the batches",
        )
    if claim.sample_rate == 1:
        full = all(len(batch) == seen.update.num_examples for batch in batches)
        verdict, reason = (HOLDS, "every batch is all") if full else (VIOLATED, "a batch leaves examples out")
        return scene.without_tests(claim, verdict, reason)
    p_values = sampling_p_values(batches, seen.update.num_examples, claim.sample_rate)
    share = sum(len(batch) for batch in batches) / (len(batches) * seen.update.num_examples)

    def at(level: float) -> Finding:
        name = min(p_values, key=lambda key: p_values[key])
        texts = {
            "total": "batches hold more or fewer examples than the rate allows",
            "equal sizes": "too many batches have the same size: shuffled, not sampled",
            "equal uses": "too many examples are used equally often: shuffled, not sampled",
        }
        if p_values[name] <= level:
            return scene.finding(claim, VIOLATED, f"{texts[name]} (p <= {p_values[name]:.1e})", share)
        expected = round(claim.sample_rate * seen.update.num_examples)
        noticed = _shuffled_p_value(expected, len(batches), seen.update.num_examples, claim.sample_rate)
        if noticed > level:
            reason = f"so few batches ({len(batches)}) do not tell sampling from shuffling; more steps could"
            return scene.finding(claim, UNCHECKED, reason, share)
        return scene.finding(claim, HOLDS, "sizes and uses vary as sampling makes them", share)

    return Check(TESTS, at)


def _shuffled_p_value(size: int, steps: int, num_examples: int, rate: float) -> float:
    """What shuffled batches of this size would have shown."""
    import torch

    order = torch.arange(num_examples).repeat(1 + steps * size // num_examples)
    shuffled = list(torch.split(order[: steps * size], max(1, size)))
    found = sampling_p_values(shuffled, num_examples, rate)
    return min(found["equal sizes"], found["equal uses"])


def _epsilon(claim: EpsilonClaim, residual: Residual | None, scene: Scene) -> Check:
    """Its intervals are those of the noise check, so it adds no chance of a false alarm."""

    def at(level: float) -> Finding:
        return epsilon_finding(claim, scene, None if residual is None else residual.noise_scale(level), 1.0)

    return Check(0, at)


def epsilon_finding(
    claim: EpsilonClaim, scene: Scene, noise: tuple[float, float] | None, sensitivity: float
) -> Finding:
    """Compare the stated epsilon with the one the mechanism has.

    Args:
        claim: the guarantee.
        scene: who looks.
        noise: interval of the measured noise, in units of the claimed; None if it was not measured. The
            coordinates with the least noise count.
        sensitivity: largest influence of one client or example, in units of the one the claim assumes;
            infinite if something enters without limit.
    """
    planned = epsilon_of(claim)
    if planned > claim.epsilon * (1 + MARGIN):
        return scene.finding(
            claim,
            VIOLATED,
            f"the mechanism as described has epsilon {planned:.4g}, more than is stated",
            planned,
            planned,
            None,
        )
    if math.isinf(sensitivity):
        reason = "something enters without limit, so no noise bounds epsilon"
        return scene.finding(claim, VIOLATED, reason, math.inf, math.inf, None)
    if noise is None:
        reason = "the arithmetic is right; the noise itself was not measured"
        return scene.finding(claim, UNCHECKED, reason, planned)
    low, high = noise
    least, most = epsilon_of(claim, high / sensitivity), epsilon_of(claim, low / sensitivity)
    if least > claim.epsilon * (1 + MARGIN):
        reason = "even the most noise that the data allow gives a larger epsilon"
        return scene.finding(claim, VIOLATED, reason, least, least, most)
    measured = epsilon_of(claim, min(max(1.0, low), high) / sensitivity)
    if low < NOTICED:
        reason = "the arithmetic is right, but the noise it stands on could be half missing unnoticed"
        return scene.finding(claim, UNCHECKED, reason, measured, least, most)
    return scene.finding(claim, HOLDS, "recomputed from the measured noise", measured, least, most)


def _beside(claim: NothingBeside, seen: Seen, scene: Scene) -> Check:
    extra = sorted(set(seen.update.reported) - set(claim.allowed))
    if extra:
        reason = f"reported without noise: {', '.join(extra)}"
        return scene.without_tests(claim, VIOLATED, reason, float(len(extra)), None, 0.0)
    return scene.without_tests(claim, HOLDS, "nothing else is reported", 0.0, None, 0.0)
