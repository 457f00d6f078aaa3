"""Progress events of a run, for whoever watches: the command line, a notebook, a test.

The engines and the auditing strategy announce; one listener at a time hears. A process-wide listener is
needed because Flower calls the ServerApp and its strategy with no room for an argument.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Stage = Literal["run", "round", "client", "audit", "evaluated"]


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        stage: run (started), round (ended), client (replied), audit (one measure or attack done), evaluated.
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
