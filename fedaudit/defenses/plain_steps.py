"""Local steps as if nobody looked: what every defense shares that acts on the finished update only."""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Generator, nn
from torch.optim import Optimizer

from fedaudit.types import Guarantee, StepRelease

if TYPE_CHECKING:
    from fedaudit.accounting import Ledger


class PlainSteps:
    """Trains without clipping or noise in a step, and promises nothing.

    What such a defense does to the update afterwards is not part of `release`: measures that reason from the
    release of a local step (mutual information, uniqueness of examples and what is bounded by them) say what
    the unprotected steps would give away, and see the protection in no other way. Measures and attacks that
    read the update itself see what was sent.
    """

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
