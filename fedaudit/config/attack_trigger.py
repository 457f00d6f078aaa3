"""When a measure's value calls for an attack: "mutual-information > 3"."""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedaudit.errors import ConfigError
from fedaudit.records import AuditRecord

_FORM = re.compile(r"\s*([a-z0-9.-]+)\s*([<>])\s*([-+0-9.eE]+)\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Trigger:
    """A threshold on a quantity of single clients.

    Attributes:
        quantity: its name in the records.
        sign: ">" or "<".
        threshold: what it is compared with.
    """

    quantity: str
    sign: str
    threshold: float

    @classmethod
    def parse(cls, text: str) -> "Trigger":
        """The trigger a text names.

        Raises:
            ConfigError: if it does not follow the grammar.

        >>> Trigger.parse("update-norm > 2.5")
        Trigger(quantity='update-norm', sign='>', threshold=2.5)
        """
        match = _FORM.fullmatch(text)
        try:
            quantity, sign, number = match.groups() if match else ("", "", "")
            return cls(quantity, sign, float(number))
        except ValueError as error:
            raise ConfigError(
                f"a trigger is written 'quantity > number' or 'quantity < number', got {text!r}: "
                "write e.g. 'mutual-information > 3'"
            ) from error

    def clients(self, rows: Sequence[AuditRecord]) -> list[int]:
        """Ids of the clients for whom it holds in these rows, most extreme first."""
        holds = _COMPARE[self.sign]
        extreme: dict[int, float] = {}
        for row in rows:
            if row.quantity == self.quantity and row.client_id is not None and row.value is not None:
                beyond = abs(row.value - self.threshold)
                if holds(row.value, self.threshold):
                    extreme[row.client_id] = max(beyond, extreme.get(row.client_id, 0.0))
        return sorted(extreme, key=lambda client: (-extreme[client], client))
