"""What an observer cannot explain of a release, in units of the noise that is claimed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedaudit.verification.noise import (
    Vector,
    crowding_p_value,
    exceeding,
    scale_interval,
    shape_p_value,
)

SAMPLED = 200_000
"""Coordinates of a tensor that are sorted to look for crowding; more of them cost time and add no power."""


def vector(tensor: Tensor) -> Vector:
    """A tensor's values (P,) in float64."""
    values: Vector = tensor.detach().to("cpu", torch.float64).reshape(-1).numpy()
    return values


def resolution(before: Tensor, change: Tensor) -> Vector:
    """Spacing of floating-point numbers at the values of `before + change` (P,): what rounding can hide."""
    spacing = torch.finfo(change.dtype).eps
    old, new = before.detach().abs(), (before.detach() + change.detach()).abs()
    return vector(torch.maximum(old, new)) * spacing


@dataclass(frozen=True, eq=False)
class Residual:
    """signal + rounding + s N(0, I), with s = 1 if the noise is as claimed.

    Attributes:
        parts: the residual by tensor name, each (P,), over the claimed standard deviation.
        spacing: spacing of floating-point numbers by tensor name, each (P,), over the same.
        signal: largest norm of the signal inside, over the same; 0 if it was subtracted, infinite if unknown.
        roundings: how many roundings of that spacing an entry went through.
        lost: dimensions of the residual that a fit has taken out.
    """

    parts: Mapping[str, Vector]
    spacing: Mapping[str, Vector]
    signal: float = math.inf
    roundings: float = 2.0
    lost: int = 0

    @property
    def size(self) -> int:
        """Number of coordinates, over all tensors."""
        return sum(part.size for part in self.parts.values())

    @property
    def exact(self) -> bool:
        """Whether the residual is noise and rounding alone."""
        return self.signal == 0

    @cached_property
    def norms(self) -> dict[str, float]:
        """Norm of each tensor's residual."""
        return {name: float(np.linalg.norm(part)) for name, part in self.parts.items()}

    @cached_property
    def slacks(self) -> dict[str, float]:
        """Bound on the norm of each tensor's rounding errors."""
        return {name: self.roundings * float(np.linalg.norm(part)) for name, part in self.spacing.items()}

    @property
    def norm(self) -> float:
        """Norm over all tensors."""
        return math.hypot(*self.norms.values())

    @property
    def slack(self) -> float:
        """Bound on the norm of all rounding errors."""
        return math.hypot(*self.slacks.values())

    def whole_interval(self, level: float) -> tuple[float, float]:
        """Interval of the noise scale over all coordinates."""
        if level not in self._whole:
            size = max(1, self.size - self.lost)
            self._whole[level] = scale_interval(self.norm, size, level, signal=self.signal, slack=self.slack)
        return self._whole[level]

    def tensor_intervals(self, level: float) -> dict[str, tuple[float, float]]:
        """Interval of the noise scale in each tensor; the bound on the signal holds in each of them.

        A lower end that does not exceed 1 is left at 0 if there is a signal: it would say little.
        """
        if level not in self._tensors:
            self._tensors[level] = {name: self._interval(name, level) for name in self.parts}
        return self._tensors[level]

    def _interval(self, name: str, level: float) -> tuple[float, float]:
        norm, size, slack = self.norms[name], self.parts[name].size, self.slacks[name]
        signal = self.signal
        if 0 < signal < math.inf and exceeding(max(0.0, norm - slack), size, signal) >= level / 2:
            signal = math.inf
        return scale_interval(norm, size, level, signal=signal, slack=slack)

    @cached_property
    def _whole(self) -> dict[float, tuple[float, float]]:
        return {}

    @cached_property
    def _tensors(self) -> dict[float, dict[str, tuple[float, float]]]:
        return {}

    def noise_scale(self, level: float) -> tuple[float, float]:
        """Interval of the scale of the least noised part: no tensor holds more noise than the upper end."""
        low, high = self.whole_interval(level)
        if self.lost:
            return low, high
        least = min([high, *(ends[1] for ends in self.tensor_intervals(level).values())])
        return min(low, least), least

    @cached_property
    def crowding(self) -> dict[str, float]:
        """p-values of coordinates crowding, of each tensor and, under "", of all together."""
        found = {}
        thin, widest = [], 0.0
        for name, part in self.parts.items():
            step = max(1, part.size // SAMPLED)
            widest = max(widest, float(self.spacing[name].max(initial=0.0)))
            thin.append(part[::step])
            found[name] = crowding_p_value(thin[-1], float(self.spacing[name].max(initial=0.0)))
        together = np.concatenate(thin) if thin else np.zeros(0)
        found[""] = crowding_p_value(together[:: max(1, together.size // SAMPLED)], widest)
        return found

    @cached_property
    def shape(self) -> float:
        """p-value of the residual's distribution against the normal one; 1 unless it is noise alone."""
        if not self.exact or self.lost:
            return 1.0
        together = np.concatenate(list(self.parts.values()))
        return shape_p_value(together[:: max(1, together.size // SAMPLED)])

    @property
    def tests(self) -> int:
        """How many tests `tensor_intervals`, `whole_interval`, `crowding` and `shape` make."""
        return 2 * (len(self.parts) + 1) + 1


def update_residual(
    before: Mapping[str, Tensor],
    delta: Mapping[str, Tensor],
    std: float,
    *,
    signal: float | None = None,
    known: Mapping[str, Tensor] | None = None,
) -> Residual:
    """The residual of one client's update.

    Args:
        before: what was broadcast.
        delta: the update.
        std: claimed standard deviation of its noise.
        signal: bound on the norm of the noise-free update; None if unknown.
        known: the noise-free update itself, where the observer can compute it.
    """
    parts, spacing = {}, {}
    for name, change in delta.items():
        values = vector(change)
        if known is not None:
            values = values - (vector(known[name]) if name in known else 0.0)
        parts[name] = values / std
        spacing[name] = resolution(before[name], change) / std
    bound = 0.0 if known is not None else math.inf if signal is None else signal / std
    # what is known was computed elsewhere, in other sums: allow it more rounding
    return Residual(parts, spacing, bound, 32.0 if known is not None else 2.0)
