"""A release that differs between rounds: planned for a run, stated by the client, and what must drive it."""

from fedaudit.config.sections import AuditConfig
from fedaudit.defenses.base import Defense, RunPlan, adaptive
from fedaudit.errors import ConfigError
from fedaudit.registry import MEASURES
from fedaudit.spec import parse_specs
from fedaudit.training.local import TrainSettings, steps_per_round
from fedaudit.types import STATED, ClientUpdate, StepRelease


def plan(defense: Defense, settings: TrainSettings, rounds: int) -> Defense:
    """The defense, told over which rounds and steps it has to divide its budget if it does so."""
    changing = adaptive(defense)
    if changing is None:
        return defense
    return changing.planned(RunPlan(rounds, settings.batch_size, lambda n: steps_per_round(n, settings)))


def stated_release(defense: Defense, release: StepRelease) -> dict[str, float]:
    """What a client says of this round's release beside its update, if rounds differ; else nothing."""
    if adaptive(defense) is None or release.clip_norm is None:
        return {}
    return dict(zip(STATED, (release.clip_norm, release.noise_std, release.sample_rate), strict=True))


def release_behind(defense: Defense, update: ClientUpdate) -> StepRelease | None:
    """The release that a client states; None if it states none, need not, or states what cannot be."""
    return StepRelease.stated(update.reported) if adaptive(defense) is not None else None


def check_signal(defense: Defense, audit: AuditConfig) -> None:
    """Raise a ConfigError unless the server will measure what the defense wants to be told."""
    changing = adaptive(defense)
    if changing is None or not changing.signal:
        return
    listed = {spec.name: spec for spec in parse_specs(audit.measures)}
    if changing.signal not in listed or "server" not in audit.observer_names:
        raise ConfigError(
            f"its noise follows {changing.signal!r} as the server measures it: list that among "
            f"audit.measures and 'server' among audit.observers, got {audit.measures!r} and "
            f"{audit.observers!r}"
        )
    observers = MEASURES.build(listed[changing.signal]).observers
    if "server" not in observers:
        raise ConfigError(
            f"its noise follows what a server can measure, and {changing.signal!r} is for "
            f"{', '.join(observers)}: choose another measure"
        )
