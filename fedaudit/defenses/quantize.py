"""Quantisation: every coordinate of a client's update is sent as one of a few values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from fedaudit.claims import Claim, QuantizationLevels
from fedaudit.defenses.plain_steps import PlainSteps


def round_at_random(values: Tensor, generator: Generator) -> Tensor:
    """Each value rounded down or up to a whole number, up with probability its fractional part.

    The expectation is the value itself; float64.
    """
    exact = values.detach().double()
    floor = exact.floor()
    draws = torch.rand(exact.shape, generator=generator, dtype=torch.float64)
    return torch.where(draws < exact - floor, floor + 1, floor)


@dataclass(frozen=True)
class Sign(PlainSteps):
    """Sends every coordinate's sign times one magnitude: -s, 0 or s, where exact zeros stay zero.

    With scale "mean-abs" s is each tensor's mean magnitude, which is nearest to the update in squared error
    among all s (Karimireddy et al. 2019, arXiv 1901.09847); with "fixed" it is `step` (signSGD, Bernstein et
    al. 2018, arXiv 1802.04434), which hides how long an update is, too.

    No formal guarantee. Biased, without error feedback. Zeros tell which weights no example moved. Measures
    that reason from a step's release do not see it.

    Attributes:
        scale: where s comes from.
        step: s for scale "fixed".

    Raises:
        ValueError: for an unknown scale or a step that is not positive.

    >>> Sign().protect({"w": torch.tensor([3.0, -1.0, 0.0, 0.0])}, Generator())
    {'w': tensor([ 1., -1.,  0.,  0.])}
    """

    scale: Literal["mean-abs", "fixed"] = "mean-abs"
    step: float = 0.01

    name: ClassVar[str] = "sign"

    def __post_init__(self) -> None:
        if self.scale not in ("mean-abs", "fixed"):
            raise ValueError(f"scale must be mean-abs or fixed, got {self.scale!r}: choose one")
        if not (self.step > 0 and math.isfinite(self.step)):
            raise ValueError(f"step must be a number > 0, got {self.step}: choose e.g. 0.01")

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """Signs times the magnitude."""
        return {name: change.sign() * self._magnitude(change) for name, change in delta.items()}

    def claims(self, update: object, settings: object) -> Sequence[Claim]:
        """Three values in each tensor."""
        return [QuantizationLevels(3)]

    def _magnitude(self, change: Tensor) -> float:
        if self.scale == "fixed" or not change.numel():
            return self.step
        return float(change.detach().double().abs().mean())


@dataclass(frozen=True)
class Quantize(PlainSteps):
    """Sends every coordinate as one of 2^bits - 1 evenly spaced values, rounded at random without bias.

    With s = 2^(bits-1) - 1 and m a tensor's largest magnitude, a coordinate v is sent as m l / s, l a whole
    number from -s to s: one of the two next to s v / m, drawn so that the expectation is v. A coordinate
    moves by less than m / s.

    QSGD, Alistarh et al. 2017, arXiv 1610.02132. Differs from [1610.02132]: the scale is the largest
    magnitude of a tensor instead of its Euclidean norm, which wastes no level.

    No formal guarantee: m is exact, and rounding is no noise that hides an example. Measures that reason from
    a step's release do not see it.

    Attributes:
        bits: bits per coordinate, 2 to 16; 2 is the ternary -m, 0, m.

    Raises:
        ValueError: for bits outside 2 to 16.
    """

    bits: int = 4

    name: ClassVar[str] = "quantize"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"bits must lie between 2 and 16, got {self.bits}: for one bit use sign")

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The update on its grid."""
        return {name: self._rounded(change, generator) for name, change in delta.items()}

    def claims(self, update: object, settings: object) -> Sequence[Claim]:
        """2^bits - 1 values in each tensor."""
        return [QuantizationLevels(2**self.bits - 1)]

    def _rounded(self, change: Tensor, generator: Generator) -> Tensor:
        most = float(change.detach().abs().max()) if change.numel() else 0.0
        if most == 0:
            return change
        unit = most / (2 ** (self.bits - 1) - 1)
        levels: Tensor = round_at_random(change.detach().double() / unit, generator)
        return levels.mul(unit).to(change.dtype)
