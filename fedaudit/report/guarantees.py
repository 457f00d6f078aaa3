"""The worst client's formal guarantee, read from the records' privacy columns."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

NO_GUARANTEE = "no formal guarantee"


@dataclass(frozen=True)
class WorstEpsilon:
    """The largest epsilon any client reached, with what it is stated with; all None if nobody has one.

    Attributes:
        epsilon: the largest over clients, rounds and seeds; infinity if noise was missing.
        delta: the delta of that row.
        unit: "example" or "client".
        accountant: how it was composed.
        adversary: whom it holds against; None means everybody, the server included.
        client_id: the client it belongs to.
        covered: clients with a guarantee.
        clients: clients that sent updates or have a guarantee.
    """

    epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None
    accountant: str | None = None
    adversary: str | None = None
    client_id: int | None = None
    covered: int = 0
    clients: int = 0

    def __str__(self) -> str:
        if self.epsilon is None:
            return NO_GUARANTEE
        if not math.isfinite(self.epsilon):
            return f"{NO_GUARANTEE} (ε = ∞)"
        stated = [
            f"δ={_short(self.delta)}" if self.delta is not None else "",
            self.unit or "",
            self.accountant or "",
            f"against an {self.adversary}" if self.adversary else "",
        ]
        text = f"{self.epsilon:.3g} ({', '.join(filter(None, stated))})"
        missing = self.clients - self.covered
        return text if missing <= 0 else f"{text}; {missing} of {self.clients} clients without guarantee"


def worst_epsilon(records: pd.DataFrame) -> WorstEpsilon:
    """The worst client's epsilon in these records; clients hold disjoint data, so it is a maximum, not a sum.

    Every row that carries epsilon counts, whatever its quantity: epsilon only grows with the rounds. A client
    with accepted numbers of its own but no epsilon is counted as having no guarantee.
    """
    own = records["client_id"].notna()
    active = own & (records["status"] == "ok")
    epsilons = pd.to_numeric(records["epsilon"], errors="coerce")
    stated = epsilons.notna()
    clients = set(_members(records[active | (own & stated)]))
    if not stated.any():
        return WorstEpsilon(clients=len(clients))
    at = int(np.argmax(epsilons.fillna(-math.inf).to_numpy()))
    row = records.iloc[at]
    return WorstEpsilon(
        epsilon=float(epsilons.iloc[at]),
        delta=None if pd.isna(row["delta"]) else float(row["delta"]),
        unit=None if pd.isna(row["privacy_unit"]) else str(row["privacy_unit"]),
        accountant=None if pd.isna(row["accountant"]) else str(row["accountant"]),
        adversary=_adversary(row["extra"]) if "extra" in row else None,
        client_id=None if pd.isna(row["client_id"]) else int(row["client_id"]),
        covered=len(set(_members(records[own & stated]))) if (own & stated).any() else len(clients),
        clients=len(clients),
    )


def _adversary(extra: object) -> str | None:
    """Whom a central guarantee holds against: those who see the released models and nothing else."""
    content = json.loads(extra) if isinstance(extra, str) and '"adversary"' in extra else {}
    return str(content["adversary"]) if "adversary" in content else None


def _members(rows: pd.DataFrame) -> list[tuple[str, int]]:
    run = "run" if "run" in rows else "run_id"
    pairs = rows[[run, "client_id"]].drop_duplicates()
    return list(zip(pairs[run].astype(str), pairs["client_id"].astype("int64"), strict=True))


def _short(value: float) -> str:
    """A power of ten as people write it: 1e-3, not 1e-03."""
    mantissa, _, exponent = f"{value:.2g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else _plain(value)


def _plain(value: float) -> str:
    digits, exponent = f"{value:.1e}".split("e")
    power = int(exponent)
    return f"{float(digits):g}e{power}" if power <= -3 else f"{value:.2g}"
