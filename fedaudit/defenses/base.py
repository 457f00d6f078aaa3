"""What a defense is to the code that trains and accounts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar, cast, runtime_checkable

from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from fedaudit.types import Guarantee, StepRelease

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from fedaudit.accounting import Ledger
    from fedaudit.defenses.central_dp import CentralPlan

Settings = TypeVar("Settings", bound="DataclassInstance")
"""Settings of local training: `fedaudit.training.local.TrainSettings`, which lies above this module."""


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


@dataclass(frozen=True)
class RunPlan:
    """What is agreed before a run starts, and depends on nobody's data but the number of examples.

    Attributes:
        rounds: of the whole run.
        batch_size: (expected) batch size.
        steps: optimiser steps of one round of a client with that many examples.
    """

    rounds: int
    batch_size: int
    steps: Callable[[int], int]


@runtime_checkable
class AdaptiveDefense(Defense, Protocol):
    """A defense whose release differs from round to round, within a total that is decided in advance.

    Attributes:
        signal: the server-side quantity whose last value clients are told; empty if none is wanted.
        target: what that value is divided by; 0 means by its mean over the rounds so far.
    """

    @property
    def signal(self) -> str: ...

    @property
    def target(self) -> float: ...

    def planned(self, plan: RunPlan) -> "AdaptiveDefense":
        """The same defense for a given run; without it there is no budget to divide."""
        ...

    def release_in_round(
        self, num_examples: int, round_number: int, ledger: "Ledger", leakage: float | None
    ) -> StepRelease:
        """What one local step of a client makes visible in this round.

        Args:
            num_examples: the client's examples.
            round_number: from 1.
            ledger: what the client spent before this round.
            leakage: the signal over its target, measured on what was released before; None if unknown.
        """
        ...


def adaptive(defense: Defense) -> AdaptiveDefense | None:
    """The defense itself if it changes from round to round; a structural check costs more than an epsilon."""
    kind = type(defense)
    if kind not in _adapts:
        _adapts[kind] = isinstance(defense, AdaptiveDefense)
    return cast(AdaptiveDefense, defense) if _adapts[kind] else None


_adapts: dict[type, bool] = {}


@runtime_checkable
class ChangesTraining(Protocol):
    """A defense whose clients train with other settings than those agreed for the run."""

    def settings(self, agreed: Settings) -> Settings:
        """The same settings (`TrainSettings`) with what the defense changes in them."""
        ...


def training_under(defense: Defense, agreed: Settings) -> Settings:
    """The settings clients train with under a defense."""
    kind = type(defense)
    if kind not in _changes:
        _changes[kind] = isinstance(defense, ChangesTraining)
    return cast(ChangesTraining, defense).settings(agreed) if _changes[kind] else agreed


_changes: dict[type, bool] = {}


@runtime_checkable
class BudgetedByRound(Protocol):
    """A defense that divides its budget over the rounds of a run, which it has to be told."""

    def over_rounds(self, rounds: int) -> Defense:
        """The same defense for a client that sends one update in each of so many rounds."""
        ...


@runtime_checkable
class CentralDefense(Defense, Protocol):
    """A defense that acts on the aggregate, at the server; what a client sends is left as it is.

    The guarantee is about whole clients, against those who see the released models; the server, and an
    auditor at the server, sees every update before it.
    """

    def central_plan(self, clients: int, cohort: int) -> "CentralPlan":
        """What the server does in a federation of so many clients, `cohort` of which are asked in a round."""
        ...


@runtime_checkable
class RemovesExamples(Protocol):
    """A defense that leaves out the most unique of a client's examples.

    It says how many; `fedaudit.training.censorship` audits and chooses. How many are left follows from the
    number of examples alone, so that steps, accounting and weights do not depend on who is left.

    Attributes:
        name: the registered name.
        permanent: whether a client chooses once, by rehearsal, instead of at every round's weights.
        rehearsal: rounds of a rehearsal.
        ridge_share: ridge of the audit as a share of the gradients' mean squared norm.
    """

    @property
    def name(self) -> str: ...

    @property
    def permanent(self) -> bool: ...

    @property
    def rehearsal(self) -> int: ...

    @property
    def ridge_share(self) -> float: ...

    def removals(self, num_examples: int) -> tuple[int, ...]:
        """How many of so many examples are removed in each pass; empty if none."""
        ...


def parts_of(defense: Defense) -> tuple[Defense, ...]:
    """The parts of a chain in their order, or the defense itself."""
    parts: tuple[Defense, ...] = getattr(defense, "parts", (defense,))
    return parts


def removing(defense: Defense) -> RemovesExamples | None:
    """The part of a defense that leaves examples out, if there is one."""
    return next((part for part in parts_of(defense) if isinstance(part, RemovesExamples)), None)
