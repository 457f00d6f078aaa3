"""What a defense is to the code that trains and accounts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from fedaudit.types import Guarantee, StepRelease

if TYPE_CHECKING:
    from fedaudit.accounting import Ledger


@runtime_checkable
class Defense(Protocol):
    """Protects a client's local steps and keeps account of what they release.

    Attributes:
        name: the registered name.
        poisson: whether batches must be drawn by Poisson sampling for the guarantee to hold.
    """

    @property
    def name(self) -> str: ...

    @property
    def poisson(self) -> bool: ...

    def release(self, num_examples: int, batch_size: int, planned_steps: int) -> StepRelease:
        """What one local step of a client makes visible.

        Args:
            num_examples: the client's examples.
            batch_size: (expected) batch size.
            planned_steps: steps over the whole run if the client takes part in every round.
        """
        ...

    def charge(self, ledger: "Ledger", release: StepRelease, steps: int, num_examples: int) -> "Ledger":
        """The client's ledger after `steps` more steps; call it before training.

        Raises:
            BudgetExhaustedError: if these steps would exceed the budget; the client must not train.
        """
        ...

    def guarantee(self, ledger: "Ledger", num_examples: int) -> Guarantee | None:
        """The guarantee for everything in the ledger; None if there is no formal guarantee."""
        ...

    def prepare(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        release: StepRelease,
        expected_batch_size: int,
        generator: Generator | None,
    ) -> tuple[nn.Module, Optimizer]:
        """The model and the optimizer to train with; parameters stay the same objects.

        Args:
            model: the model, in training mode.
            optimizer: an optimizer of its parameters.
            release: how a step is protected.
            expected_batch_size: what the sum of gradients is divided by.
            generator: source of the noise, on the model's device.
        """
        ...

    def empty_step(self, model: nn.Module) -> None:
        """Set the gradients of a batch without examples, in place of forward and backward.

        A Poisson sampled batch may be empty; it is a step like any other, noise included.
        """
        ...

    def restore(self, model: nn.Module) -> None:
        """Undo `prepare`, whatever happened in between, given the model it returned."""
        ...

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """What a client sends of its finished update; the very same tensors where nothing changes.

        Args:
            delta: returned minus broadcast by name, for every floating-point entry, buffers included.
            generator: source of the defense's randomness, on the CPU like `delta`.
        """
        ...


@runtime_checkable
class BudgetedByRound(Protocol):
    """A defense that divides its budget over the rounds of a run, which it has to be told."""

    def over_rounds(self, rounds: int) -> Defense:
        """The same defense for a client that sends one update in each of so many rounds."""
        ...
