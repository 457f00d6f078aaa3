"""One round: what was received against what is claimed, with one error rate for all of it."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedaudit.claims import (
    HOLDS,
    UNCHECKED,
    VIOLATED,
    Claim,
    Finding,
    GaussianNoise,
    IndependentNoise,
    Watcher,
)
from fedaudit.types import ClientUpdate
from fedaudit.verification.aggregate_checks import Aggregate, Round, aggregate_checks
from fedaudit.verification.checks import Check, Scene
from fedaudit.verification.memory import (
    SMALLEST,
    NoiseMemory,
    Repetition,
    Sample,
    compare,
    compare_tensors,
    count_pairs,
    count_tensor_pairs,
    fitting,
)
from fedaudit.verification.noise import missing_p_value
from fedaudit.verification.residuals import Residual
from fedaudit.verification.update_checks import Seen, update_checks

ALPHA = 0.001
"""Probability of a false alarm in an honest round; 200 rounds then have at most 2 with probability 0.999."""


def verify_round(
    claims: Sequence[Claim],
    updates: Sequence[ClientUpdate],
    aggregate: Mapping[str, Tensor] | None = None,
    broadcast: Mapping[str, Tensor] | None = None,
    *,
    per_client: Mapping[int, Sequence[Claim]] | None = None,
    observer: Watcher = "server",
    noise_free: Mapping[int, Mapping[str, Tensor]] | None = None,
    batches: Mapping[int, Sequence[Tensor]] | None = None,
    clip_norms: tuple[float, float] | None = None,
    memory: NoiseMemory | None = None,
    alpha: float = ALPHA,
) -> list[Finding]:
    """Test every claim about one round; one finding per claim and release.

    False alarms of all tests of the round together have probability at most `alpha` if every claim is true:
    each test runs at alpha / (number of tests). Tests of clipping without noise, of zeros, levels and reports
    are exact and add nothing. "cannot be checked by this observer" means that half the noise missing (or the
    usual other weighting, or a signal of twice the clip norm) could not have been noticed.

    Args:
        claims: what is claimed of every client's update and of the aggregate.
        updates: what was received; empty for an observer that sees the global weights only.
        aggregate: the weights of the next broadcast; None if unknown.
        broadcast: the weights that were sent; the first update's `before` if left out.
        per_client: further claims by client id.
        observer: who looks; only names the findings.
        noise_free: by client id, the update without its noise, where the observer can compute it (an oracle).
        batches: by client id, the indices of the examples of each local step (a client or an oracle).
        clip_norms: clip norm of this round and of the next, for adaptive clipping.
        memory: noise of earlier rounds; give every round of a run the same object. It is added to.
        alpha: probability of a false alarm in an honest round.

    Raises:
        ValueError: if there is neither an update nor a broadcast, or alpha is outside (0, 1).
    """
    if not updates and broadcast is None:
        raise ValueError("a round is judged by updates or by a broadcast, got neither: give one of them")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}: 0.001 is one false alarm in 1000 rounds")
    before = broadcast if broadcast is not None else updates[0].before
    number = updates[0].round if updates else 0
    scene = Scene(observer, number)
    memory = memory if memory is not None else NoiseMemory()
    checks: list[Check] = []
    residuals: dict[int, Residual] = {}
    noises: dict[int, GaussianNoise] = {}
    shared: list[Claim] = list(claims)
    for update in sorted(updates, key=lambda u: u.client_id):
        own = [*claims, *(per_client or {}).get(update.client_id, ())]
        shared += [claim for claim in own if isinstance(claim, IndependentNoise) and claim not in shared]
        seen = Seen(
            update,
            own,
            (noise_free or {}).get(update.client_id),
            (batches or {}).get(update.client_id),
        )
        residual = seen.residual()
        if residual is not None and seen.noise is not None:
            residuals[update.client_id], noises[update.client_id] = residual, seen.noise
        checks += update_checks(seen, residual, scene.of(update.client_id))
    whole = Aggregate(Round(claims, updates, before, aggregate, clip_norms), memory.mixing)
    checks += aggregate_checks(whole, scene)
    checks += _pooled(residuals, noises, scene)
    fresh = {cid: Sample.of(residual, number, cid) for cid, residual in residuals.items()}
    for claim in shared:
        if isinstance(claim, IndependentNoise) and claim.on == "update":
            checks.append(_independent(claim, residuals, fresh, memory.update, scene))
        elif isinstance(claim, IndependentNoise):
            checks.append(_independent_aggregate(claim, whole, memory.aggregate, scene))
    level = alpha / max(1, sum(check.tests for check in checks))
    findings = [check.conclude(level) for check in checks]
    memory.mixing.update(whole.evidence(level))
    memory.keep("update", [fresh[cid] for cid, residual in residuals.items() if _noised(residual, level)])
    memory.keep("aggregate", [sample for sample in [_aggregate_sample(whole, scene, level)] if sample])
    return findings


def _noised(residual: Residual, level: float) -> bool:
    """Whether nothing shows that noise is missing: only then do the tests of its independence apply."""
    return residual.noise_scale(level)[1] >= 1


def _pooled(
    residuals: Mapping[int, Residual], noises: Mapping[int, GaussianNoise], scene: Scene
) -> list[Check]:
    """Noise missing in a tensor of all clients, where one client's few coordinates cannot show it."""
    if len(residuals) < 2 or not noises:
        return []
    names = list(next(iter(residuals.values())).parts)
    if any(list(residual.parts) != names for residual in residuals.values()):
        return []
    sizes = {n: sum(r.parts[n].size for r in residuals.values()) for n in names}
    squared = {n: sum((r.norms[n] + r.slacks[n]) ** 2 for r in residuals.values()) for n in names}
    claim = next(iter(noises.values()))

    def at(level: float) -> Finding:
        p_values = {n: missing_p_value(squared[n], sizes[n]) for n in names}
        worst = min(names, key=lambda n: p_values[n])
        share = (squared[worst] / sizes[worst]) ** 0.5
        if p_values[worst] <= level:
            reason = (
                f"tensor {worst!r} of all {len(residuals)} clients together holds {share:.3g} of the claimed "
                f"noise at most (p <= {p_values[worst]:.1e})"
            )
            return scene.finding(claim, VIOLATED, reason, share * claim.std)
        return scene.finding(
            claim, HOLDS, "no tensor lacks noise over all clients together", share * claim.std
        )

    return [Check(len(names), at)]


def _independent(
    claim: IndependentNoise,
    residuals: Mapping[int, Residual],
    fresh: Mapping[int, Sample],
    remembered: list[Sample],
    scene: Scene,
) -> Check:
    """Noise of updates used twice, among the clients whose noise is not known to be missing."""
    if not fresh:
        reason = "no noise is claimed that could be compared"
        return scene.without_tests(claim, UNCHECKED, reason)
    first = next(iter(fresh.values()))
    same = {cid: sample for cid, sample in fresh.items() if fitting([sample], first)}
    old = fitting(remembered, first) if claim.between == "rounds" else []
    if claim.between == "tensors":
        tests = sum(count_tensor_pairs(sample) for sample in same.values())
    else:
        tests = count_pairs(list(same.values()), old) if old or claim.between == "clients" else 0

    def at(level: float) -> Finding:
        usable = [sample for cid, sample in same.items() if _noised(residuals[cid], level)]
        if claim.between == "tensors":
            found = [f for f in (compare_tensors(sample, level) for sample in usable) if f is not None]
            repetition = max(found, key=lambda f: max(f.low, -f.high), default=None)
        elif claim.between == "rounds":
            repetition = compare(usable, old, level) if usable and old else None
        else:
            repetition = compare(usable, [], level) if len(usable) > 1 else None
        return _repetition_finding(claim, repetition, scene, bool(usable))

    return Check(tests, at)


def _aggregate_sample(whole: Aggregate, scene: Scene, level: float) -> Sample | None:
    if whole.seen.after is None or whole.seen.noise is None or not whole.released:
        return None
    residual = whole.residual(level)
    if residual is None or not _noised(residual, level):
        return None
    return Sample.of(residual, scene.round, None)


def _independent_aggregate(
    claim: IndependentNoise, whole: Aggregate, remembered: list[Sample], scene: Scene
) -> Check:
    """Noise of the aggregate used in an earlier round, or for several tensors."""
    noised = whole.seen.noise is not None and whole.seen.after is not None and whole.released
    names = [name for name, tensor in whole.seen.before.items() if tensor.is_floating_point()]
    long = [name for name in names if whole.seen.before[name].numel() >= SMALLEST]
    if not noised or claim.between == "clients":
        return scene.without_tests(claim, UNCHECKED, "no noise on an aggregate is there to be compared")
    if claim.between == "tensors":
        tests = len(long) * (len(long) - 1) // 2
    else:
        tests = len(remembered) * (1 + len(long))

    def at(level: float) -> Finding:
        sample = _aggregate_sample(whole, scene, level)
        old = fitting(remembered, sample) if sample is not None else []
        repetition: Repetition | None = None
        if sample is not None and claim.between == "tensors":
            repetition = compare_tensors(sample, level)
        elif sample is not None and old:
            repetition = compare([sample], old, level)
        return _repetition_finding(claim, repetition, scene, sample is not None)

    return Check(tests, at)


def _repetition_finding(
    claim: IndependentNoise, found: Repetition | None, scene: Scene, noised: bool
) -> Finding:
    if found is None:
        few = {
            "clients": "noise is compared between two clients or more",
            "rounds": "there is no earlier round to compare with",
            "tensors": "no two tensors are long enough to be compared",
        }[claim.between]
        reason = few if noised else "the noise is missing or too small, so its independence means nothing"
        return scene.finding(claim, UNCHECKED, reason)
    middle = (found.low + found.high) / 2
    if found.repeated:
        reason = f"{found.text} share noise: correlation between {found.low:.3g} and {found.high:.3g}"
        return scene.finding(claim, VIOLATED, reason, middle, found.low, found.high)
    if found.blind:
        reason = (
            "the signals are so large beside the noise that equal noise could go unnoticed; an oracle that "
            "can compute the noise-free updates could check it"
        )
        return scene.finding(claim, UNCHECKED, reason, middle, found.low, found.high)
    reason = f"{found.tests} comparisons; the closest are {found.text}"
    return scene.finding(claim, HOLDS, reason, middle, found.low, found.high)
