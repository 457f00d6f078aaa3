"""What an update holds, whatever its noise: its length, its zeros and its levels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedaudit.types import ClientUpdate
from fedaudit.verification.noise import Vector
from fedaudit.verification.residuals import resolution, vector

RELATIVE = 1e-5
"""Relative error of a norm that is computed in single precision over any number of entries."""


@dataclass(frozen=True)
class Length:
    """Norms of an update's tensors and what rounding may have added to them.

    Attributes:
        norms: by tensor name.
        slacks: bound on the norm of rounding errors, by tensor name.
    """

    norms: Mapping[str, float]
    slacks: Mapping[str, float]

    @classmethod
    def of(cls, before: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> "Length":
        """Of every floating-point entry, scalars and buffers included.

        An update is the difference of two rounded numbers, so each entry may be off by their spacing.
        """
        norms = {name: float(np.linalg.norm(vector(change))) for name, change in delta.items()}
        slacks = {
            name: float(np.linalg.norm(resolution(before[name], change))) for name, change in delta.items()
        }
        return cls(norms, slacks)

    @property
    def whole(self) -> float:
        """Norm over all tensors."""
        return math.hypot(*self.norms.values())

    def excess(self, norm: float) -> float:
        """By how much the norm over all tensors exceeds `norm` beyond rounding; at most 0 if it keeps it."""
        return self.whole - norm * (1 + RELATIVE) - math.hypot(*self.slacks.values())

    def excesses(self, norm: float) -> dict[str, float]:
        """The same for each tensor alone."""
        return {name: value - norm * (1 + RELATIVE) - self.slacks[name] for name, value in self.norms.items()}


@dataclass(frozen=True)
class Integers:
    """How far integer entries moved that a client sent back; true if any did.

    Attributes:
        moved: norm of each entry's change, by name, for those that changed.
        unknown: entries of which it is not known what came back.
    """

    moved: Mapping[str, float]
    unknown: tuple[str, ...]

    @classmethod
    def of(cls, update: ClientUpdate) -> "Integers":
        """Of every entry that is no floating-point one."""
        sent = {name: t for name, t in update.before.items() if not t.is_floating_point()}
        moved = {
            name: float(np.linalg.norm(vector(got) - vector(sent[name])))
            for name, got in update.integers.items()
            if name in sent and not got.equal(sent[name])
        }
        return cls(moved, tuple(name for name in sent if name not in update.integers))

    def __bool__(self) -> bool:
        return bool(self.moved)

    @property
    def norm(self) -> float:
        """Norm of all their changes."""
        return math.hypot(*self.moved.values())

    @property
    def most(self) -> float:
        """The largest of the changes' norms; 0 if none moved."""
        return max(self.moved.values(), default=0.0)

    @property
    def longest(self) -> str:
        """The entry that moved furthest; only if any did."""
        return max(self.moved, key=lambda name: self.moved[name])

    @property
    def names(self) -> str:
        """The unknown ones in words."""
        shown = ", ".join(self.unknown[:3])
        more = ", ..." if len(self.unknown) > 3 else ""
        return f"integer entries ({shown}{more})"


def kept_share(delta: Mapping[str, Tensor]) -> tuple[float, float]:
    """Share of coordinates that are not zero, and how much of it rounding up per tensor may explain."""
    size = sum(change.numel() for change in delta.values())
    kept = sum(int(change.count_nonzero()) for change in delta.values())
    return kept / max(1, size), len(delta) / max(1, size)


def levels(before: Tensor, delta: Tensor, most: int) -> tuple[int, bool]:
    """Number of distinct values in a tensor of an update, and whether rounding leaves `most` of them apart.

    The update is the difference of two rounded tensors: values closer than twice the spacing of
    floating-point numbers count as one. They cannot be told apart if `most` of them, spread evenly over the
    range, would be closer than four times that.
    """
    values: Vector = np.sort(vector(delta))
    if values.size < 2:
        return values.size, True
    spacing = 2 * float(resolution(before, delta).max())
    found = 1 + int((np.diff(values) > spacing).sum())
    return found, float(values[-1] - values[0]) >= 2 * spacing * (most - 1) or found > most
