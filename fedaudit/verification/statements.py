"""What clients state of their privacy, round after round: epsilon, how many rounds, and from which noise."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fedaudit.accounting import Entry, Ledger
from fedaudit.types import NOISE_MULTIPLIER, ClientUpdate, Guarantee, StepRelease

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Statement:
    """What one client has stated up to a round.

    Attributes:
        guarantee: the guarantee for everything so far.
        rounds: rounds so far in which it stated one.
        history: all steps so far as (noise multiplier, sample rate, steps); None unless the client stated the
            noise of each of these rounds.
    """

    guarantee: Guarantee
    rounds: int
    history: tuple[Entry, ...] | None

    @property
    def usable(self) -> bool:
        """Whether it claims anything: an epsilon that is no positive number does not."""
        return 0 < self.guarantee.epsilon < math.inf and 0 < self.guarantee.delta < 1


@dataclass
class Statements:
    """Adds up what clients state; holds a number for each client, and its noise only where that changes."""

    _rounds: dict[int, int] = field(default_factory=dict)
    _ledgers: dict[int, Ledger | None] = field(default_factory=dict)

    def hear(self, update: ClientUpdate, guarantee: Guarantee | None) -> Statement | None:
        """The client's statement after this update; None if it states no guarantee."""
        return self.add(update.client_id, guarantee, noise_behind(update.reported))

    def add(self, client: int, guarantee: Guarantee | None, noise: Entry | None) -> Statement | None:
        """The same from the parts of a statement."""
        if guarantee is None:
            return None
        self._rounds[client] = self._rounds.get(client, 0) + 1
        ledger = self._ledgers.get(client, Ledger()) if noise is not None else None
        if ledger is not None and noise is not None:
            ledger = ledger.add(*noise)
        self._ledgers[client] = ledger  # once unknown, unknown for ever
        return Statement(guarantee, self._rounds[client], ledger.history if ledger is not None else None)

    def recall(self, records: "pd.DataFrame") -> None:
        """Take over what a run's records hold, as after the rounds they are of."""
        for _ in self.replay(records):
            pass

    def replay(self, records: "pd.DataFrame") -> Iterator[tuple[int, int, Statement]]:
        """Round, client and statement, in the order of rounds, from a run's records."""
        usable = records[(records["status"] == "ok") & records["client_id"].notna()]
        noises = {
            (int(row["round"]), int(row["client_id"])): noise_behind(_parsed(row["extra"]))
            for row in usable[usable["quantity"] == NOISE_MULTIPLIER].to_dict("records")
        }
        stated = usable[usable["quantity"] == "epsilon"].sort_values("round", kind="stable")
        for row in stated.to_dict("records"):
            number, client = int(row["round"]), int(row["client_id"])
            unit: Literal["client", "example"] = "client" if row["privacy_unit"] == "client" else "example"
            guarantee = Guarantee(float(row["value"]), float(row["delta"]), unit, str(row["accountant"]))
            found = self.add(client, guarantee, noises.get((number, client)))
            if found is not None:
                yield number, client, found


def noise_behind(reported: Mapping[str, float]) -> Entry | None:
    """Noise multiplier, sample rate and steps of the round that scalars state; None unless they state all."""
    release, steps = StepRelease.stated(reported), reported.get("steps", math.nan)
    if release is None or not release.clip_norm or not (math.isfinite(steps) and steps >= 1):
        return None
    return release.noise_std / release.clip_norm, release.sample_rate, int(steps)


def _parsed(text: object) -> Mapping[str, float]:
    try:
        content = json.loads(str(text))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
