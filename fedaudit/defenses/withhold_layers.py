"""Withholding layers: named layers train locally, but their change is never sent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from fedaudit.claims import Claim, Sparsity
from fedaudit.defenses.plain_steps import PlainSteps
from fedaudit.types import ClientUpdate, StepRelease


@dataclass(frozen=True)
class WithholdLayers(PlainSteps):
    """Sends zeros for every parameter and buffer of the named layers, as those a measure found to leak.

    A withheld layer keeps the weights it started with in the global model: what is learnt there is lost. The
    other layers' updates still depend on the data through it.

    No formal guarantee. Measures that reason from a step's release do not see it.

    Attributes:
        layers: names of modules or parameters joined by "+", as layer-wise measures report them: "conv1+fc1".

    Raises:
        ValueError: if no layer is named.

    >>> update = {"conv1.weight": torch.ones(1), "fc1.weight": torch.ones(1)}
    >>> WithholdLayers("fc1").protect(update, Generator())
    {'conv1.weight': tensor([1.]), 'fc1.weight': tensor([0.])}
    """

    layers: str

    name: ClassVar[str] = "withhold"

    def __post_init__(self) -> None:
        if not all(self.names):
            raise ValueError(f"layers are names joined by '+', got {self.layers!r}: write e.g. conv1+fc1")

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names."""
        return tuple(name.strip() for name in self.layers.split("+"))

    def prepare(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        release: StepRelease,
        expected_batch_size: int,
        generator: Generator | None,
    ) -> tuple[nn.Module, Optimizer]:
        """Both unchanged.

        Raises:
            ValueError: if the model lacks a named layer, or nothing would be left to send.
        """
        self._withheld([name for name, entry in model.state_dict().items() if entry.is_floating_point()])
        return model, optimizer

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The update with zeros for the named layers.

        Raises:
            ValueError: as `prepare`.
        """
        withheld = self._withheld(delta)
        return {name: torch.zeros_like(c) if name in withheld else c for name, c in delta.items()}

    def claims(self, update: ClientUpdate, settings: object) -> Sequence[Claim]:
        """No more coordinates differ from zero than the other layers have."""
        withheld = self._withheld(update.delta)
        sizes = {name: change.numel() for name, change in update.delta.items()}
        return [Sparsity(sum(n for name, n in sizes.items() if name not in withheld) / sum(sizes.values()))]

    def _withheld(self, entries: Sequence[str] | Mapping[str, Tensor]) -> set[str]:
        found: set[str] = set()
        for layer in self.names:
            mine = {entry for entry in entries if entry == layer or entry.startswith(f"{layer}.")}
            if not mine:
                known = sorted({entry.rpartition(".")[0] or entry for entry in entries})
                raise ValueError(
                    f"withhold names layers of the model, got {layer!r}: choose from {', '.join(known)}"
                )
            found |= mine
        if len(found) == len(set(entries)):
            raise ValueError(f"withholding {self.layers!r} leaves nothing to send: name fewer layers")
        return found
