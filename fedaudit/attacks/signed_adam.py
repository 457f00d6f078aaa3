"""Adam on the sign of the gradient, for many restarts at once: every operation is elementwise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Signed = Literal["hard", "soft", "none"]
Schedule = Literal["step", "cosine", "constant"]

_BETAS = (0.9, 0.999)
_EPS = 1e-8
_DROPS = (3 / 8, 5 / 8, 7 / 8)


@dataclass(frozen=True)
class Descent:
    """How inputs are optimised.

    Attributes:
        iterations: of each restart that is not dropped.
        lr: step size, in the units of the variables.
        signed: feed Adam the sign of the gradient ("hard"), its hyperbolic tangent with a slope that falls
            from 1 to 0 ("soft"), or the gradient ("none").
        schedule: "step" divides the step size by ten at 3/8, 5/8 and 7/8; "cosine" lowers it to 0 after a
            linear warm-up; "constant" keeps it.
        warmup: iterations of the warm-up; only for "cosine".
    """

    iterations: int
    lr: float = 0.1
    signed: Signed = "hard"
    schedule: Schedule = "step"
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 1 or not self.lr > 0 or self.warmup < 0:
            raise ValueError(
                f"iterations and lr must be positive and warmup not negative, got {self.iterations}, "
                f"{self.lr} and {self.warmup}: use e.g. 400, 0.1 and 0"
            )


def step_size(descent: Descent, iteration: int) -> float:
    """Step size of an iteration, counted from 0.

    >>> [round(step_size(Descent(8), i), 6) for i in (2, 3, 5, 7)]
    [0.1, 0.01, 0.001, 0.0001]
    """
    share = iteration / descent.iterations
    if descent.schedule == "step":
        return descent.lr * 0.1 ** sum(share >= drop for drop in _DROPS)
    if descent.schedule == "cosine":
        warm = min(1.0, (iteration + 1) / descent.warmup) if descent.warmup else 1.0
        return descent.lr * warm * (1 + float(torch.tensor(share * torch.pi).cos())) / 2
    return descent.lr


class SignedAdam:
    """Adam's moments of stacked variables (K, ...), one row per restart.

    Source: Kingma, Ba 2014, arXiv 1412.6980; on signs as in Geiping et al. 2020, arXiv 2003.14053.
    """

    def __init__(self, variables: Sequence[Tensor]) -> None:
        self.first = [torch.zeros_like(v) for v in variables]
        self.second = [torch.zeros_like(v) for v in variables]
        self.steps = 0

    def keep(self, rows: Tensor) -> None:
        """Forget the restarts that are not in `rows`."""
        self.first = [m[rows] for m in self.first]
        self.second = [m[rows] for m in self.second]

    def step(self, slopes: Sequence[Tensor], descent: Descent) -> list[Tensor]:
        """What to add to each variable (K, ...)."""
        lr = step_size(descent, self.steps)
        softness = 1 - self.steps / descent.iterations
        self.steps += 1
        corrections = [1 - beta**self.steps for beta in _BETAS]
        moves: list[Tensor] = []
        for slope, first, second in zip(slopes, self.first, self.second, strict=True):
            g = slope.sign() if descent.signed == "hard" else slope
            if descent.signed == "soft":
                g = (slope * softness).tanh() / softness
            first.lerp_(g, 1 - _BETAS[0])
            second.mul_(_BETAS[1]).addcmul_(g, g, value=1 - _BETAS[1])
            moves.append(-lr / corrections[0] * first / ((second / corrections[1]).sqrt() + _EPS))
        return moves
