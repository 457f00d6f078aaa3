"""Progress on the terminal: bars for rounds, clients and audit, one line per round, and each problem once."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedaudit.claims import VERIFY
from fedaudit.progress import Event, listen
from fedaudit.records import AuditRecord

_SHOWN = {
    "mutual-information": "MI {:.2f} nats",
    "example-gradient-uniqueness": "GNQ {:.2f}",
    "cohort-gradient-uniqueness": "cohort {:.2f}",
    "dlg.psnr": "DLG {:.1f} dB",
    "epsilon": "worst epsilon {:.2f}",
}


class Watch(AbstractContextManager["Watch"]):
    """Shows what happens inside the block, and nothing else: log lines and warnings are held back.

    What a log line would say of a client or a measure stands in the records; the first of its kind is shown.

    Args:
        runs: how many runs there will be.
        quiet: show nothing.
    """

    def __init__(self, runs: int, *, quiet: bool = False) -> None:
        self.runs, self.quiet, self.started = runs, quiet, 0
        self._stack = ExitStack()
        self.console = Console(stderr=True)
        self._bars: dict[str, TaskID] = {}
        self._told: set[tuple[str, str, str]] = set()

    def __enter__(self) -> "Watch":
        self._stack.enter_context(_without_log_lines())
        if not self.quiet:
            columns = (
                TextColumn("{task.description:<24}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._progress = self._stack.enter_context(
                Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
            )
            for name in ("rounds", "clients", "audit"):
                self._bars[name] = self._progress.add_task(name, total=None)
            self._stack.enter_context(listen(self._hear))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _hear(self, event: Event) -> None:
        if event.stage == "run":
            self.started += 1
            name = escape(str(event.detail["name"]))
            self.console.print(f"[bold]run {self.started} of {self.runs}: {name}[/bold]", soft_wrap=True)
            if event.detail.get("active"):
                self._tell("  ACTIVE server: it broadcasts a model changed to leak")
            self._told.clear()
            self._show("rounds", event)
        elif event.stage == "client":
            self._show("clients", event)
        elif event.stage == "audit":
            self._show("audit", event, f"audit: {event.detail['name']}"[:24])
        elif event.stage == "attack":
            self._hear_attack(event)
        elif event.stage == "round":
            self._show("rounds", event)
            self._tell(line(event.round, event.total, event.detail, self.console.width))
            for problem in self._news(event.detail.get("records", [])):
                self._tell(f"    {problem}")

    def _hear_attack(self, event: Event) -> None:
        """A bar while an attack runs, and a line when it has ended."""
        if event.detail["ended"]:
            if "attack" in self._bars:
                self._progress.remove_task(self._bars.pop("attack"))
            self._tell(attack_line(event.round, event.detail))
            return
        if "attack" not in self._bars:
            self._bars["attack"] = self._progress.add_task("attack", total=None)
        self._show("attack", event, attack_bar(event.detail))

    def _tell(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _news(self, records: Sequence[AuditRecord]) -> Iterator[str]:
        """Each kind of problem when it first occurs; the line of the round counts the rest."""
        for record in records:
            kind = (record.quantity, record.observer, record.status)
            if record.quantity.startswith(VERIFY) and record.status == "skipped":
                continue  # that an observer cannot check a claim is no problem of the round
            if record.status != "ok" and kind not in self._told:
                self._told.add(kind)
                who = "" if record.client_id is None else f" of client {record.client_id}"
                yield f"{record.quantity}{who} {record.status}: {_short(record.reason)}"

    def _show(self, bar: str, event: Event, label: str | None = None) -> None:
        self._progress.update(
            self._bars[bar], completed=event.done, total=event.total or None, description=label or bar
        )


def _short(reason: str) -> str:
    """In one line, and of a client's exception its own text without the names Flower wraps around it."""
    return " ".join(reason.rpartition("occurred. Message: ")[2].removesuffix("'>").split())


@contextmanager
def _without_log_lines() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("flwr", "fedaudit", "strategies", "clients")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def attack_bar(detail: Mapping[str, Any]) -> str:
    """What stands beside the bar of an attack that runs.

    >>> attack_bar({"name": "dlg", "client": 3, "elapsed": 4.2, "budget": 60.0, "restarts": "2 of 4"})
    'dlg, client 3: 4 of 60 s, restarts 2 of 4'
    """
    budget = f" of {detail['budget']:g}" if detail["budget"] else ""
    parts = [f"{detail['name']}, client {detail['client']}: {detail['elapsed']:.0f}{budget} s"]
    parts += [f"{name} {detail[name]}" for name in ("restarts", "examples") if name in detail]
    return ", ".join(parts)


def attack_line(round_number: int, detail: Mapping[str, Any]) -> str:
    """One ended attack in one line: its objective, or that it failed, and the seconds it took of its budget.

    >>> attack_line(1, {"name": "dlg", "client": 3, "elapsed": 4.21, "budget": 60.0, "objective": 2.5e-9})
    '    dlg on client 3 in round 1: objective 2.5e-09 after 4.2 of 60 s'
    >>> attack_line(1, {"name": "spear", "client": 3, "elapsed": 0.01, "budget": 0.0})
    '    spear on client 3 in round 1: failed after 0.0 s'
    """
    ended = f"objective {detail['objective']:.2g}" if "objective" in detail else "failed"
    budget = f" of {detail['budget']:g}" if detail["budget"] else ""
    return (
        f"    {detail['name']} on client {detail['client']} in round {round_number}: {ended} after "
        f"{detail['elapsed']:.1f}{budget} s"
    )


def line(round_number: int, rounds: int, detail: Mapping[str, Any], width: int = 80) -> str:
    """One round in one line: accuracy, then the means of the round's main quantities.

    A line longer than `width` goes on in the next, under its second piece.

    >>> line(1, 8, {"accuracy": 0.5, "records": []})
    '  round 1/8  accuracy 0.500'
    """
    pieces = [f"  round {round_number}/{rounds}"]
    if "accuracy" in detail:
        pieces.append(f"accuracy {detail['accuracy']:.3f}")
    records: Sequence[AuditRecord] = detail.get("records", [])
    for quantity, template in _SHOWN.items():
        values = [
            r.value for r in records if r.quantity == quantity and r.status == "ok" and r.value is not None
        ]
        if values:
            pieces.append(template.format(max(values) if quantity == "epsilon" else fmean(values)))
    measured = [record for record in records if not record.quantity.startswith(VERIFY)]
    for status in ("violated", "rejected", "failed", "skipped"):
        count = sum(record.status == status for record in (records if status == "violated" else measured))
        if count:
            pieces.append(f"{count} {status}")
    rows, indent = [pieces[0]], " " * len(pieces[0])
    for piece in pieces[1:]:
        if len(rows[-1]) + 2 + len(piece) > width and rows[-1] != indent:
            rows.append(indent)
        rows[-1] += f"  {piece}"
    return "\n".join(rows)
