"""What a defense of the aggregate claims of each recorded round.

Divisor, weights, noise multiplier and the clip norm of the first round are those of the configuration; noise
and sensitivity are worked out here, not asked of the mechanism. The clip norms of later rounds, where they
adapt, and the stated epsilon are read from the records.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fedaudit.claims import (
    AdaptiveClipping,
    Claim,
    ClipNorm,
    EpsilonClaim,
    GaussianNoise,
    IndependentNoise,
    NothingBeside,
    Weights,
)
from fedaudit.config import RunConfig
from fedaudit.defenses.base import CentralDefense
from fedaudit.defenses.central_dp import CentralPlan
from fedaudit.spec import parse_spec
from fedaudit.types import Guarantee
from fedaudit.verification.derive import AVERAGES, Unstated

if TYPE_CHECKING:
    import pandas as pd

_STEPPED = "the strategy takes a step of its own with the noised mean, which only the server sees"
_NO_NORM = "the clip norm of this round is not recorded; whoever runs the strategy knows it"


def plan_claims(
    plan: CentralPlan, clip_norm: float, releases: int = 0, stated: Guarantee | None = None
) -> list[Claim]:
    """What a round of central, client-level privacy claims, and what its epsilon stands on.

    With w the largest weight before division, D the divisor and z the multiplier, a client moves the mean by
    w C / D at most, and every coordinate of it holds noise of std z_u w C / D; z_u = z, or
    (z^-2 - (2 s)^-2)^(-1/2) where a count with noise s is released too (Andrew et al. 2019).

    Args:
        plan: mechanism and accounting.
        clip_norm: C of the round.
        releases: rounds released so far, this one included.
        stated: the guarantee stated after it; None leaves the epsilon out.
    """
    mechanism, moves = plan.mechanism, plan.mechanism.adaptive
    multiplier, most = mechanism.noise_multiplier, mechanism.most_examples
    spent_on_count = (2 * moves.count_noise) ** -2 if moves is not None else 0.0
    std = (multiplier**-2 - spent_on_count) ** -0.5 * max(1, most) * clip_norm / mechanism.divisor
    claims: list[Claim] = [
        ClipNorm(clip_norm, by="server"),
        Weights("capped" if most else "uniform", divisor=mechanism.divisor, most_examples=most),
        GaussianNoise(std, on="aggregate"),
        IndependentNoise("rounds", on="aggregate"),
        IndependentNoise("tensors", on="aggregate"),
        NothingBeside(),
    ]
    if moves is not None:
        claims.append(AdaptiveClipping(moves.quantile, moves.lr, moves.count_noise, moves.cohort))
    if stated is not None and releases:
        rate = plan.cohort / plan.clients if plan.sampling == "poisson" else 1.0
        kept = (plan.accountant, multiplier, rate, releases)
        claims.append(EpsilonClaim(stated.epsilon, stated.delta, "client", *kept, on="aggregate"))
    return claims


@dataclass(frozen=True)
class _Row:
    """What a round's row states; `releases` counts the rows up to it."""

    clip_norm: float
    following: float
    releases: int
    stated: Guarantee | None


@dataclass(frozen=True)
class CentralRounds:
    """The claims of each round of a run.

    Attributes:
        plan: mechanism and accounting, as configured.
        rows: what rounds state, by number.
        averages: whether the released mean becomes the next weights as it is.
    """

    plan: CentralPlan
    rows: Mapping[int, _Row]
    averages: bool

    @classmethod
    def of(cls, defense: CentralDefense, config: RunConfig, records: "pd.DataFrame") -> "CentralRounds":
        """From a defense that knows its rounds, the configuration of the run and its records."""
        clients = config.federation.clients
        cohort = max(1, int(clients * config.federation.fraction_train))
        whole = (records["quantity"] == "epsilon") & records["client_id"].isna()
        stated = records[whole & (records["status"] == "ok")].sort_values("round")
        rows = {int(row["round"]): _row(row, n) for n, row in enumerate(stated.to_dict("records"), 1)}
        averages = parse_spec(config.strategy.name).name in AVERAGES
        return cls(defense.central_plan(clients, cohort), rows, averages)

    def clip_norms(self, number: int) -> tuple[float, float] | None:
        """Clip norm of a round and of the next, where both are known."""
        row = self.rows.get(number)
        return (row.clip_norm, row.following) if row is not None else None

    def claims(self, number: int) -> tuple[list[Claim], list[Unstated]]:
        """What is claimed of a round and can be tested, and what cannot."""
        row, initial = self.rows.get(number), self.plan.mechanism.clip_norm
        constant = self.plan.mechanism.adaptive is None
        reason = "" if self.averages else _STEPPED
        if row is None:
            claims = plan_claims(self.plan, initial)
            reason = reason or ("" if constant or number == 1 else _NO_NORM)
        else:
            norm = initial if constant or row.releases == 1 else row.clip_norm
            claims = plan_claims(self.plan, norm, row.releases, row.stated)
        hidden = [claim for claim in claims if reason and _of_aggregate(claim)]
        return [claim for claim in claims if claim not in hidden], [Unstated(c, reason) for c in hidden]


def _of_aggregate(claim: Claim) -> bool:
    if isinstance(claim, (GaussianNoise, IndependentNoise, EpsilonClaim)):
        return claim.on == "aggregate"
    return isinstance(claim, (Weights, ClipNorm))


def _row(row: Mapping[Any, Any], releases: int) -> _Row:
    extra = json.loads(str(row["extra"]))
    unit: Literal["client", "example"] = "client" if row["privacy_unit"] == "client" else "example"
    stated = Guarantee(float(row["epsilon"]), float(row["delta"]), unit, str(row["accountant"]))
    norms = float(extra.get("clip-norm", math.nan)), float(extra.get("next-clip-norm", math.nan))
    return _Row(*norms, releases, stated if math.isfinite(stated.epsilon) else None)
