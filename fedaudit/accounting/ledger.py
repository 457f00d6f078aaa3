"""What a client did: every noisy step of its life, in the order it took them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Entry = tuple[float, float, int]
"""Noise multiplier, sample rate, steps."""


@dataclass(frozen=True)
class Ledger:
    """Every noisy step a client took: entries (noise multiplier, sample rate, steps), oldest first.

    Consecutive entries with equal noise and rate are one entry; order does not change epsilon.

    Raises:
        ValueError: for a noise multiplier <= 0, a sample rate outside (0, 1] or steps < 1.

    >>> Ledger().add(1.0, 0.1, steps=4).add(1.0, 0.1, steps=4)
    Ledger(history=((1.0, 0.1, 8),))
    """

    history: tuple[Entry, ...] = ()

    def __post_init__(self) -> None:
        merged: list[Entry] = []
        for noise_multiplier, sample_rate, steps in self.history:
            check_step(noise_multiplier, sample_rate, steps)
            entry = (float(noise_multiplier), float(sample_rate), int(steps))
            if merged and merged[-1][:2] == entry[:2]:
                entry = (*entry[:2], merged.pop()[2] + entry[2])
            merged.append(entry)
        object.__setattr__(self, "history", tuple(merged))

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return sum(steps for _, _, steps in self.history)

    def add(self, noise_multiplier: float, sample_rate: float, steps: int) -> "Ledger":
        """The ledger after `steps` more steps; zero steps change nothing."""
        if steps == 0:
            return self
        return Ledger((*self.history, (noise_multiplier, sample_rate, steps)))

    def to_lists(self) -> dict[str, list[float] | list[int]]:
        """The history as three lists of plain numbers, as a Flower record can hold them."""
        return {
            "noise-multipliers": [noise for noise, _, _ in self.history],
            "sample-rates": [rate for _, rate, _ in self.history],
            "steps": [steps for _, _, steps in self.history],
        }

    @classmethod
    def from_lists(cls, lists: Mapping[str, Any]) -> "Ledger":
        """The ledger that `to_lists` wrote; missing lists are empty ones.

        Raises:
            ValueError: if the lists differ in length or hold an impossible entry.
        """
        columns: list[Sequence[float]] = [list(lists.get(name, ())) for name in Ledger().to_lists()]
        if len({len(column) for column in columns}) != 1:
            raise ValueError(
                "the three lists of a ledger have equal lengths, got "
                f"{', '.join(str(len(column)) for column in columns)}: the ledger is damaged"
            )
        return cls(tuple((n, q, int(t)) for n, q, t in zip(*columns, strict=True)))


def check_step(noise_multiplier: float, sample_rate: float, steps: int) -> None:
    """Raise a ValueError unless these are possible values of one entry."""
    if not (noise_multiplier > 0 and math.isfinite(noise_multiplier)):
        raise ValueError(
            f"a noise multiplier must be a number > 0, got {noise_multiplier}: no noise, no epsilon"
        )
    if not 0 < sample_rate <= 1:
        raise ValueError(f"a sample rate must lie in (0, 1], got {sample_rate}: use batch size / examples")
    if steps < 1 or steps != int(steps):
        raise ValueError(f"steps must be a whole number >= 1, got {steps}: count optimiser steps")


def check_delta(delta: float) -> None:
    """Raise a ValueError unless delta is a probability strictly between 0 and 1."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}: choose it well below 1 / examples")
