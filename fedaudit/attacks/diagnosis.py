"""Why an inversion cannot work on an update, and which attack still may."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from fedaudit.attacks.threat_card import SMALL_BATCH, ThreatCard
from fedaudit.needs import missing
from fedaudit.registry import changes_update, shows_sums_only
from fedaudit.types import Attack, ClientUpdate, RoundContext, StepRelease

Verdict = Literal["applies", "weakened", "does not apply"]


@runtime_checkable
class KnowsItsLimits(Protocol):
    """An attack that can tell from model and settings alone that it does not apply."""

    def obstacle(self, update: ClientUpdate, ctx: RoundContext) -> str:
        """Why it does not apply, as a phrase; empty if it may."""
        ...


@dataclass(frozen=True)
class Advice:
    """Whether one attack applies to one update.

    Attributes:
        attack: its name.
        verdict: "applies"; "weakened": it runs, against the obstacles named; or "does not apply".
        reasons: the obstacles, as phrases.
    """

    attack: str
    verdict: Verdict
    reasons: tuple[str, ...] = ()


def obstacles(card: ThreatCard, release: StepRelease | None) -> tuple[str, ...]:
    """What stands between an update with these conditions and its data, whichever attack is used.

    >>> card = ThreatCard(1, 0, 4, "sgd", "train", False, False, "joint", "none", 0)
    >>> obstacles(card, None)
    ()
    """
    noise = release.noise_std if release is not None else 0.0
    changed = changes_update(card.defense)
    cases = {
        f"{' and '.join(changed)} changed the finished update": bool(changed),
        "secure aggregation: the examples of all clients share the one sum that is seen": shows_sums_only(
            card.defense
        ),
        f"noise of standard deviation {noise:.3g} on each step's sum: no input matches it": noise > 0,
        "per-example clipping: the update is not the gradient of the batch's mean loss": (
            release is not None and release.clip_norm is not None
        ),
        "batch normalisation in train mode: the batch's statistics enter every gradient": (
            card.batch_norm and card.mode == "train"
        ),
        "dropout: the masks the client drew are unknown": card.dropout and card.mode == "train",
        f"{card.batch_size} examples share each gradient: expect few of them": card.batch_size > SMALL_BATCH,
        "the model is trained: its gradients are small and carry less of the input": card.trained_rounds > 10,
    }
    return tuple(phrase for phrase, holds in cases.items() if holds)


def diagnose(
    attacks: Iterable[Attack], update: ClientUpdate, ctx: RoundContext, card: ThreatCard
) -> list[Advice]:
    """For each attack whether it applies to this update, and what stands in its way.

    From settings and model alone: nothing is attacked, and "applies" is no promise of success.

    Args:
        attacks: attacks to judge. One whose attribute `unrolls` is true follows the client through its
            local steps, one with `survives_steps` reads a layer whose gradients nearly add up over them;
            one with `KnowsItsLimits` is asked about the model.
        update: the update in question.
        ctx: what the attacker knows.
        card: its conditions.
    """
    release = ctx.release(update) if ctx.release is not None else None
    general = obstacles(card, release)
    found = []
    for attack in attacks:
        hard = []
        if lacking := missing(attack.needs, ctx.known, ctx.summed):
            hard.append(lacking)
        if ctx.lr is None and card.optimizer != "sgd":
            hard.append(f"a step of {card.optimizer} is not the learning rate times a gradient")
        soft = list(general)
        if card.local_steps > 1 and getattr(attack, "survives_steps", False):
            soft.insert(
                0, f"{card.local_steps} local steps: exact while weights move little, then approximate"
            )
        elif card.local_steps > 1 and not getattr(attack, "unrolls", False):
            hard.append(
                f"{card.local_steps} local steps: a single-gradient attack does not apply, use local-steps"
            )
        if isinstance(attack, KnowsItsLimits) and (limit := attack.obstacle(update, ctx)):
            hard.append(limit)
        verdict: Verdict = "does not apply" if hard else "weakened" if soft else "applies"
        found.append(Advice(attack.name, verdict, (*hard, *soft)))
    return found
