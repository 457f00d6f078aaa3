"""No defense: plain local training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from fedaudit.defenses.plain_steps import PlainSteps


@dataclass(frozen=True)
class NoDefense(PlainSteps):
    """Trains as if nobody looked: no clipping, no noise, no guarantee.

    >>> NoDefense().release(num_examples=100, batch_size=10, planned_steps=1)
    StepRelease(clip_norm=None, noise_std=0.0, sample_rate=0.1)
    """

    name: ClassVar[str] = "none"

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The update itself."""
        return dict(delta)
