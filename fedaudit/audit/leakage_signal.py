"""The number a server tells its clients about leakage: what it measured last, relative to a target."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from fedaudit.records import AuditRecord


class LeakageSignal:
    """Mean over clients of the last round in which the SERVER measured a quantity, over its target.

    Only rows of the observer "server" count: they are functions of what clients released and of data the
    server owns, so that noise chosen from them is chosen from outputs (see `fedaudit.accounting.adaptive`).
    Rows of the observers "client" and "oracle" come from private examples and are passed over.

    Args:
        quantity: name of the measure.
        target: what the value is divided by; 0 means its mean over all rounds heard, the last included.

    >>> signal = LeakageSignal("mutual-information", target=2.0)
    >>> signal.value is None
    True
    """

    def __init__(self, quantity: str, target: float = 0.0) -> None:
        self.quantity = quantity
        self.target = target
        self._heard: list[float] = []

    def hear(self, rows: "Iterable[AuditRecord]") -> None:
        """Take in one round's rows; a round without the quantity leaves the last value standing."""
        self._take(
            row.value
            for row in rows
            if row.quantity == self.quantity and row.observer == "server" and row.status == "ok"
        )

    def recall(self, records: "pd.DataFrame") -> None:
        """Take in the rounds of a run's records, as if each had just been heard."""
        heard = (records["quantity"] == self.quantity) & (records["observer"] == "server")
        for _, rows in records[heard & (records["status"] == "ok")].groupby("round"):
            self._take(rows["value"].astype(float).tolist())

    def _take(self, found: "Iterable[float | None]") -> None:
        values = [value for value in found if value is not None and math.isfinite(value)]
        if values:
            self._heard.append(math.fsum(values) / len(values))

    @property
    def value(self) -> float | None:
        """The last value over the target; None before a measurement, or where the mean is not positive."""
        if not self._heard:
            return None
        target = self.target or math.fsum(self._heard) / len(self._heard)
        return self._heard[-1] / target if target > 0 else None
