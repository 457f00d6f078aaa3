"""Larger effective batches: more examples behind each gradient, everything else as it was."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Generator, Tensor

from fedaudit.defenses.base import Settings
from fedaudit.defenses.plain_steps import PlainSteps


@dataclass(frozen=True)
class LargerBatch(PlainSteps):
    """Clients step on `factor` times as many examples, or on all they have if those are fewer.

    Trained by epochs, a client takes fewer steps then; trained by a number of steps, it sees more examples.
    Accounting, attacks and reports follow, as they read the batch size that is trained with: chained behind
    dp-sgd, the noise is planned for the larger batch ("dp-sgd(epsilon=8) then larger-batch").

    A larger batch gives less away per example to attacks that optimise inputs until their gradient matches:
    they face `factor` times as many unknowns with the same number of equations, and each example's share of
    the mean gradient falls to 1 / factor. That does not hold for SPEAR (Dimitrov et al. 2024, arXiv
    2403.03945), which reads every example of a batch off a fully connected ReLU layer exactly: its search
    grows with the batch, what it finds does not shrink until the batch exceeds the layer's rank or the search
    its budget. A server that imprints a layer is not stopped either. No formal guarantee.

    Attributes:
        factor: how many times the configured batch size, >= 1; 1 changes nothing.
        scale_lr: multiply the learning rate by `factor` too (linear rule for SGD: Goyal et al. 2017, arXiv
            1706.02677). By the whole factor, also for a client whose data is smaller than the batch: the
            server knows one learning rate for all.

    Raises:
        ValueError: for a factor below 1.

    >>> from fedaudit.training.local import TrainSettings
    >>> larger = LargerBatch(4, scale_lr=True).settings(TrainSettings(batch_size=16, lr=0.1))
    >>> larger.batch_size, larger.lr
    (64, 0.4)
    """

    factor: int = 4
    scale_lr: bool = False

    name: ClassVar[str] = "larger-batch"

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor must be a whole number >= 1, got {self.factor}: choose e.g. 4")

    def settings(self, agreed: Settings) -> Settings:
        """The agreed training with larger batches and, if asked for, a larger learning rate."""
        now: Any = agreed
        larger: dict[str, Any] = {"batch_size": now.batch_size * self.factor}
        if self.scale_lr:
            larger["lr"] = now.lr * self.factor
        return replace(agreed, **larger)

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The update itself."""
        return dict(delta)
