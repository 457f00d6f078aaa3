"""Several defenses of one client in a stated order: "dp-sgd(epsilon=8) then top-k(fraction=0.1)"."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from fedaudit.claims import (
    Claim,
    ClipNorm,
    GaussianNoise,
    NothingBeside,
    PoissonSampling,
    QuantizationLevels,
    Sparsity,
)
from fedaudit.defenses.base import (
    BudgetedByRound,
    CentralDefense,
    Defense,
    RemovesExamples,
    Settings,
    adaptive,
    training_under,
)
from fedaudit.defenses.plain_steps import PlainSteps
from fedaudit.defenses.secure_aggregation import SecureAggregation
from fedaudit.types import Guarantee, StepRelease

if TYPE_CHECKING:
    from fedaudit.accounting import Ledger


@dataclass(frozen=True)
class Chain:
    """Defenses applied from left to right, each to what the one before it left of the update.

    A defense of the local steps comes first, as its steps come before the finished update. At most one part
    accounts for privacy. Its guarantee is the chain's: what comes after it sees nothing but its output
    (post-processing), and what comes before it is clipped and noised like any other update. Order matters
    for what is sent: "top-k then gaussian" noises every coordinate, "gaussian then top-k" sends the largest
    noised ones. A defense of the aggregate comes last: the server acts on what clients have sent.

    Attributes:
        parts: the defenses, two or more.

    Raises:
        ValueError: for fewer than two parts, two that account for privacy, two that remove examples, one that
            does and one that protects examples in its steps, steps that do not come first, or secure
            aggregation or a defense of the aggregate that does not come last.
    """

    parts: tuple[Defense, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"a chain has two parts or more, got {len(self.parts)}: use the part itself")
        accounting = [part.name for part in self.parts if _accounts(part)]
        if len(accounting) > 1:
            raise ValueError(
                f"one part of a chain accounts for privacy, got {' and '.join(accounting)}: keep one of them"
            )
        changing = [part.name for part in self.parts if adaptive(part)]
        if changing:
            raise ValueError(f"a defense whose steps differ between rounds stands alone, got {changing[0]}")
        _check_removal(self.parts)
        late = [part.name for part in self.parts[1:] if not isinstance(part, PlainSteps)]
        if late:
            raise ValueError(
                f"{late[0]} protects local steps, got it after {self.parts[0].name}: write it first"
            )
        summed = next((part for part in self.parts[:-1] if isinstance(part, SecureAggregation)), None)
        if summed is not None:
            raise ValueError(
                f"{summed.name} sums what clients send, got {self.parts[-1].name} after it: write it last"
            )
        early = [part.name for part in self.parts[:-1] if isinstance(part, CentralDefense)]
        if early:
            raise ValueError(
                f"{early[0]} acts on the aggregate, got {self.parts[-1].name} after it: write it last"
            )

    @property
    def name(self) -> str:
        """The parts' names, joined by "then"."""
        return " then ".join(part.name for part in self.parts)

    @property
    def poisson(self) -> bool:
        """As the first part wants it."""
        return self.parts[0].poisson

    @property
    def _accounting(self) -> Defense:
        return next((part for part in self.parts if _accounts(part)), self.parts[0])

    def over_rounds(self, rounds: int) -> "Chain":
        """The same with every part told over how many rounds its budget goes."""
        return Chain(
            tuple(p.over_rounds(rounds) if isinstance(p, BudgetedByRound) else p for p in self.parts)
        )

    def settings(self, agreed: Settings) -> Settings:
        """The agreed training, changed by one part after the other."""
        for part in self.parts:
            agreed = training_under(part, agreed)
        return agreed

    def release(self, num_examples: int, batch_size: int, planned_steps: int) -> StepRelease:
        """That of the first part."""
        return self.parts[0].release(num_examples, batch_size, planned_steps)

    def charge(self, ledger: "Ledger", release: StepRelease, steps: int, num_examples: int) -> "Ledger":
        """The ledger as the accounting part keeps it."""
        return self._accounting.charge(ledger, release, steps, num_examples)

    def guarantee(self, ledger: "Ledger", num_examples: int) -> Guarantee | None:
        """That of the accounting part."""
        return self._accounting.guarantee(ledger, num_examples)

    def prepare(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        release: StepRelease,
        expected_batch_size: int,
        generator: Generator | None,
    ) -> tuple[nn.Module, Optimizer]:
        """As the first part prepares it, once the others have agreed to the model."""
        for part in self.parts[1:]:
            part.prepare(model, optimizer, release, expected_batch_size, generator)
        return self.parts[0].prepare(model, optimizer, release, expected_batch_size, generator)

    def empty_step(self, model: nn.Module) -> None:
        """As in the first part."""
        self.parts[0].empty_step(model)

    def restore(self, model: nn.Module) -> None:
        """As in the first part."""
        self.parts[0].restore(model)

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The update after all parts."""
        sent = dict(delta)
        for part in self.parts:
            sent = part.protect(sent, generator)
        return sent


def chain(parts: Sequence[Defense]) -> Defense:
    """The only part, or all of them in a chain."""
    return parts[0] if len(parts) == 1 else Chain(tuple(parts))


def secure_part(defense: Defense) -> SecureAggregation | None:
    """The part that hides single updates from the server; None if they are seen."""
    last = defense.parts[-1] if isinstance(defense, Chain) else defense
    return last if isinstance(last, SecureAggregation) else None


def central(defense: Defense) -> CentralDefense | None:
    """The part that acts on the aggregate, at the server; None if there is none."""
    last = defense.parts[-1] if isinstance(defense, Chain) else defense
    return last if isinstance(last, CentralDefense) else None


def claims_left(stages: Sequence[Sequence[Claim]]) -> tuple[list[Claim], list[Claim]]:
    """What still shows in an update after all stages, and the claims that a later stage hides.

    Noise on every coordinate hides zeros and levels; what removes or rounds coordinates hides noise and
    norms; removing coordinates leaves zeros and levels; rounding leaves zeros. What is claimed of single
    examples, of sampling and of reports stays.
    """
    left: list[Claim] = []
    hidden: list[Claim] = []
    for stage in stages:
        if not stage:
            continue
        survivors = [claim for claim in left if _survives(claim, stage)]
        hidden += [claim for claim in left if claim not in survivors]
        left = [*survivors, *(claim for claim in stage if claim not in survivors)]
    return left, hidden


def _survives(claim: Claim, later: Sequence[Claim]) -> bool:
    if isinstance(claim, (PoissonSampling, NothingBeside)):
        return True
    if isinstance(claim, ClipNorm):
        return claim.of == "example"
    noised = any(isinstance(other, GaussianNoise) for other in later)
    if isinstance(claim, Sparsity):
        return not noised
    return isinstance(claim, QuantizationLevels) and all(isinstance(other, Sparsity) for other in later)


def _check_removal(parts: Sequence[Defense]) -> None:
    """Refuse to choose examples twice, or to choose them under a guarantee that is about single examples."""
    removing = [part.name for part in parts if isinstance(part, RemovesExamples)]
    if len(removing) > 1:
        raise ValueError(f"one part of a chain removes examples, got {' and '.join(removing)}: keep one")
    private = [part.name for part in parts if not isinstance(part, PlainSteps)]
    if removing and private:
        raise ValueError(
            f"{removing[0]} voids the guarantee of {private[0]}, as one example more or less changes which "
            "others are kept: use one of them"
        )


def _accounts(part: Defense) -> bool:
    stated = not isinstance(part, PlainSteps) or type(part).guarantee is not PlainSteps.guarantee
    return stated or isinstance(part, CentralDefense)
