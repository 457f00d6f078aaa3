"""Central differential privacy around the strategy, where the run's defense acts on the aggregate."""

import json
from dataclasses import asdict
from functools import partial

from flwr.serverapp.strategy import Strategy

from fedaudit.audit.auditor import Auditor
from fedaudit.defenses.base import CentralDefense
from fedaudit.defenses.central_dp import ADVERSARY, CentralPlan
from fedaudit.defenses.chain import central
from fedaudit.federation.setup import Setup
from fedaudit.flower.central_dp import CentralDP, CentralRound
from fedaudit.records import AuditRecord
from fedaudit.verification.configured import ConfiguredClaims

EPSILON = "epsilon"


def cohort_of(made: Setup) -> int:
    """How many clients a round asks, or is expected to ask."""
    return max(1, int(made.clients * made.config.federation.fraction_train))


def plan_of(made: Setup, defense: CentralDefense) -> CentralPlan:
    """The defense's mechanism in this federation."""
    return defense.central_plan(made.clients, cohort_of(made))


def inner_fraction(made: Setup) -> float:
    """Share of clients that the wrapped strategy asks: all where CentralDP samples them itself."""
    defense = central(made.defense)
    if defense is not None and plan_of(made, defense).sampling == "poisson":
        return 1.0
    return made.config.federation.fraction_train


def protected(strategy: Strategy, made: Setup, auditor: Auditor | None = None) -> Strategy:
    """The strategy, inside CentralDP if the run's defense acts on the aggregate.

    The auditor goes outside of it: an honest-but-curious server sees raw updates. Each release becomes a row
    of the whole round, with what it was made with as side results.

    Raises:
        ConfigError: if noise for a mean does not fit what the strategy computes.
        ValueError: if the defense does not fit the federation.
    """
    defense = central(made.defense)
    if defense is None:
        return strategy
    return CentralDP.planned(
        strategy,
        plan_of(made, defense),
        seed=made.config.seed,
        on_release=partial(_record, auditor) if auditor is not None else None,
        on_hold=partial(_record_hold, auditor) if auditor is not None else None,
    )


def _record(auditor: Auditor, done: CentralRound) -> None:
    mechanism, release, guarantee = done.plan.mechanism, done.release, done.guarantee
    extra = {
        "adversary": done.adversary,
        "sampling": done.plan.sampling,
        "clients": done.plan.clients,
        "cohort": done.plan.cohort,
        "replies": done.replies,
        "releases": done.releases,
        "noise-multiplier": mechanism.noise_multiplier,
        "clip-norm": release.clip_norm,
        "next-clip-norm": release.next_clip_norm,
        "noise-std": release.noise_std,
    }
    reached = guarantee.epsilon if guarantee is not None else float("inf")
    row = AuditRecord(
        auditor.run_id,
        done.round,
        None,
        EPSILON,
        reached,
        "1",
        "upper",
        "server",
        auditor.defense,
        epsilon=reached,
        delta=done.plan.delta,
        privacy_unit="client",
        accountant=guarantee.accountant if guarantee is not None else done.plan.accountant,
        extra=json.dumps(extra, sort_keys=True),
    )
    auditor.add(done.round, [row])
    if auditor.verifier is not None and isinstance(auditor.verifier.claims, ConfiguredClaims):
        auditor.verifier.claims.hear_release(asdict(row))


def _record_hold(auditor: Auditor, round_number: int, reason: str) -> None:
    row = AuditRecord(
        auditor.run_id,
        round_number,
        None,
        EPSILON,
        None,
        "1",
        "upper",
        "server",
        auditor.defense,
        status="skipped",
        reason=reason,
        extra=json.dumps({"adversary": ADVERSARY}),
    )
    auditor.add(round_number, [row])
