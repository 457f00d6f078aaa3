"""Under which conditions an attack's result was obtained, and how much they favoured the attacker."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from torch import nn

from fedaudit.attacks.imprint import ImprintBlock
from fedaudit.registry import AT_SERVER, parts_of
from fedaudit.types import ClientUpdate, RoundContext

Grade = Literal["realistic", "favourable", "laboratory"]
SMALL_BATCH = 8
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_DROPOUT = nn.modules.dropout._DropoutNd


@dataclass(frozen=True)
class ThreatCard:
    """What a reader must know before comparing an attack's success with another's.

    Attributes:
        local_steps: optimiser steps behind the update; 0 if unknown.
        local_epochs: passes over the local data; 0 if steps were counted instead, or unknown.
        batch_size: examples per step; 0 if unknown.
        optimizer: the clients' optimiser; "unknown".
        mode: how normalisation and dropout ran while training: "train" or "eval".
        batch_norm: whether the model normalises by batch statistics.
        dropout: whether the model has dropout that was on.
        labels: "known" to the attacker, "estimated" from the update, "joint" optimised with the inputs, or
            "not used".
        defense: the defense in force, without its options; those of a chain joined by "then".
        trained_rounds: rounds of training before this update; 0 is a model at its initialisation.
        active: whether the server changed the model or the protocol to make attacks work, whichever attack
            this card is of.
    """

    local_steps: int
    local_epochs: int
    batch_size: int
    optimizer: str
    mode: str
    batch_norm: bool
    dropout: bool
    labels: str
    defense: str
    trained_rounds: int
    active: bool = False

    @property
    def favours(self) -> tuple[str, ...]:
        """What made this easier than a usual federation, each as a phrase."""
        cases = {
            "one local step": self.local_steps == 1,
            f"at most {SMALL_BATCH} examples in a step": 0 < self.batch_size <= SMALL_BATCH,
            "plain SGD": self.optimizer == "sgd",
            "inference mode": self.mode == "eval" and (self.batch_norm or self.dropout),
            "labels known to the attacker": self.labels == "known",
            "a model at its initialisation": self.trained_rounds == 0,
            "no defense": set(self.defense.split(" then ")) <= {"none", "", *AT_SERVER},
            "an active server": self.active,
        }
        return tuple(phrase for phrase, holds in cases.items() if holds)

    @property
    def grade(self) -> Grade:
        """How close the conditions are to a deployed federation's.

        "realistic" with at most two favouring conditions, "favourable" with three or four, "laboratory"
        with five or more, or with an active server. The rule counts and does not weigh: it says how a result
        may be quoted, not how likely the attack is.

        In the spirit of the conditions that surveys found to carry most reported successes (arXiv 2404.05403,
        2508.19819): inference mode, small batches, single steps and untrained models.
        """
        count = len(self.favours)
        if self.active or count >= 5:
            return "laboratory"
        return "favourable" if count >= 3 else "realistic"

    def as_extra(self) -> dict[str, float | int | str | bool]:
        """The card as side results of a record, names with hyphens."""
        card: dict[str, float | int | str | bool] = {
            f"card-{field.name.replace('_', '-')}": getattr(self, field.name) for field in fields(self)
        }
        return card | {"grade": self.grade, "favours-attacker": ", ".join(self.favours) or "nothing"}


def threat_card(
    model: nn.Module,
    update: ClientUpdate,
    ctx: RoundContext,
    conditions: Mapping[str, float | int | str | bool],
    defense: str,
) -> ThreatCard:
    """The card of one attack on one update.

    Args:
        model: the federation's architecture.
        update: what was attacked.
        ctx: what the attacker knew.
        conditions: the reconstruction's own: "labels", "batchnorm-mode", "batch-size", "active".
        defense: the defense in force.
    """
    labels = str(conditions.get("labels", "not used"))
    mode = str(conditions.get("batchnorm-mode", "train"))
    modules = list(model.modules())
    return ThreatCard(
        local_steps=ctx.steps(update) or 0,
        local_epochs=0 if ctx.local_steps else ctx.local_epochs or 0,
        batch_size=int(conditions.get("batch-size", ctx.batch_size or 0)),
        optimizer=ctx.optimizer or "unknown",
        mode=mode,
        batch_norm=any(isinstance(module, _BATCH_NORM) for module in modules),
        dropout=any(isinstance(module, _DROPOUT) and module.p > 0 for module in modules),
        labels=labels if labels in ("known", "joint", "not used") else "estimated",
        defense=" then ".join(parts_of(defense)),
        trained_rounds=max(0, update.round - 1),
        active=bool(conditions.get("active", False)) or any(isinstance(m, ImprintBlock) for m in modules),
    )
