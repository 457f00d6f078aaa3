"""Progress events of a run, for whoever watches: the command line, a notebook, a test.

The engines and the auditing strategy announce; one listener at a time hears. A process-wide listener is
needed because Flower calls the ServerApp and its strategy with no room for an argument.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Stage = Literal["run", "round", "client", "audit", "attack", "evaluated"]
HEARTBEAT = 1.0
"""Seconds between two events from inside one attack, at least."""


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        stage: run (started), round (ended), client (replied), audit (one measure or attack done), attack
            (on one update: began, goes on, ended), evaluated.
        done: how many of `total` are done.
        total: how many there are; 0 if unknown.
        round: server round.
        detail: what to show beside it.
    """

    stage: Stage
    done: int
    total: int
    round: int = 0
    detail: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]
_listeners: list[Listener] = []


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Send every event inside the block to `listener`."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def announce(stage: Stage, done: int, total: int, round_number: int = 0, **detail: Any) -> None:
    """Tell the innermost listener, if there is one.

    >>> with listen(lambda event: print(event.stage, event.done, event.total)):
    ...     announce("client", 1, 3)
    client 1 3
    """
    if _listeners:
        _listeners[-1](Event(stage, done, total, round_number, detail))


@dataclass
class _Attack:
    """The attack that runs, and when it was last heard of."""

    round: int
    detail: dict[str, Any]
    started: float
    told: float


_attacks: list[_Attack] = []


@contextmanager
def attacking(name: str, client: int, round_number: int, budget: float = 0.0) -> Iterator[dict[str, Any]]:
    """Announce that an attack on one client's update begins and ends; inside, `heartbeat` says how far it is.

    Every event tells the attack's name, the client, the seconds since it began ("elapsed"), its time budget
    in seconds ("budget", 0 if there is none) and whether it has ended ("ended"), also after an exception.

    Yields:
        What is put into it is part of the details from then on.

    >>> with listen(lambda event: print(event.stage, event.detail["ended"])):
    ...     with attacking("dlg", client=3, round_number=1) as detail:
    ...         detail["objective"] = 0.5
    attack False
    attack True
    """
    now = time.monotonic()
    attack = _Attack(round_number, {"name": name, "client": client, "budget": budget}, now, now)
    _attacks.append(attack)
    try:
        _tell_of(attack, 0, 0, ended=False)
        yield attack.detail
    finally:
        _attacks.remove(attack)
        _tell_of(attack, 1, 1, ended=True)


def heartbeat(done: int, total: int, **detail: Any) -> None:
    """Say how far the attack is that runs, at most once every `HEARTBEAT` seconds; nothing outside one.

    It reads the clock and changes no number of the attack.

    Args:
        done: how many of `total` iterations, or whatever the attack counts, are done.
        total: how many there are.
        **detail: remembered for the attack's later events.
    """
    if not _attacks:
        return
    attack = _attacks[-1]
    attack.detail |= detail
    if time.monotonic() - attack.told >= HEARTBEAT:
        _tell_of(attack, done, total, ended=False)


def _tell_of(attack: _Attack, done: int, total: int, ended: bool) -> None:
    attack.told = time.monotonic()
    elapsed = attack.told - attack.started
    announce("attack", done, total, attack.round, **attack.detail, elapsed=elapsed, ended=ended)
