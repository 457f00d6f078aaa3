"""How one quantity is worded, ordered and summarised."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["utility", "leakage", "attack", "update", "cost"]
Pooling = Literal["last", "mean", "sum"]

LAYER = ".layer"
"""Ends the name of the quantity that a measure gives for one layer."""

BOUND = " bound"
"""Ends the name of the quantity made of a record's extra value "bound-nats"."""


@dataclass(frozen=True)
class Quantity:
    """How one quantity is worded, ordered and summarised.

    Attributes:
        name: name in the records.
        label: name for people, without unit.
        role: utility, leakage, attack (a score of a reconstruction), update (geometry) or cost.
        pooling: a run's one number: its last round that has it, the mean of all its rows, or their sum.
        wanted: +1 if a deployer wants it high, -1 if low, 0 if neither.
        headline: whether it is a column of the comparison table.
        meaning: what it is.
        limits: what it is not.
    """

    name: str
    label: str
    role: Role = "leakage"
    pooling: Pooling = "mean"
    wanted: int = 0
    headline: bool = True
    meaning: str = ""
    limits: str = ""
