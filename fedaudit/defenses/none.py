"""No defense: plain local training."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Generator, nn
from torch.optim import Optimizer

from fedaudit.types import Guarantee, StepRelease

if TYPE_CHECKING:
    from fedaudit.accounting import Ledger


@dataclass(frozen=True)
class NoDefense:
    """Trains as if nobody looked: no clipping, no noise, no guarantee.

    >>> NoDefense().release(num_examples=100, batch_size=10, planned_steps=1)
    StepRelease(clip_norm=None, noise_std=0.0, sample_rate=0.1)
    """

    name: ClassVar[str] = "none"
    poisson: ClassVar[bool] = False

    def release(self, num_examples: int, batch_size: int, planned_steps: int) -> StepRelease:
        """The plain sum of a batch's gradients."""
        return StepRelease(None, 0.0, min(1.0, batch_size / num_examples))

    def charge(self, ledger: "Ledger", release: StepRelease, steps: int, num_examples: int) -> "Ledger":
        """The ledger unchanged: steps without noise have no epsilon to add up."""
        return ledger

    def guarantee(self, ledger: "Ledger", num_examples: int) -> Guarantee | None:
        """None: no formal guarantee."""
        return None

    def prepare(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        release: StepRelease,
        expected_batch_size: int,
        generator: Generator | None,
    ) -> tuple[nn.Module, Optimizer]:
        """Both unchanged."""
        return model, optimizer

    def empty_step(self, model: nn.Module) -> None:
        """Zero gradients, so that momentum and weight decay act as in any other step."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def restore(self, model: nn.Module) -> None:
        """Nothing to undo."""
