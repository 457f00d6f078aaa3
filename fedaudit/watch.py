"""Progress on the terminal: bars for runs, rounds, clients and audit, and one line per round."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedaudit.progress import Event, listen
from fedaudit.records import AuditRecord

_SHOWN = {
    "mutual-information": "MI {:.2f} nats",
    "example-gradient-uniqueness": "GNQ {:.2f}",
    "cohort-gradient-uniqueness": "cohort GNQ {:.2f}",
    "dlg.psnr": "DLG {:.1f} dB",
    "epsilon": "worst epsilon {:.2f}",
}


class Watch(AbstractContextManager["Watch"]):
    """Shows what happens inside the block.

    Args:
        runs: how many runs there will be.
        quiet: show nothing.
    """

    def __init__(self, runs: int, *, quiet: bool = False) -> None:
        self.runs, self.quiet, self.started = runs, quiet, 0
        self._stack = ExitStack()
        self.console = Console(stderr=True)
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> "Watch":
        if not self.quiet:
            columns = (
                TextColumn("{task.description:<24}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._progress = self._stack.enter_context(
                Progress(*columns, console=self.console, transient=True)
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
            self.console.print(f"[bold]run {self.started} of {self.runs}: {event.detail['name']}[/bold]")
            self._show("rounds", event)
        elif event.stage == "client":
            self._show("clients", event)
        elif event.stage == "audit":
            self._show("audit", event, f"audit: {event.detail['name']}"[:24])
        elif event.stage == "round":
            self._show("rounds", event)
            self.console.print(line(event.round, event.total, event.detail), highlight=False)

    def _show(self, bar: str, event: Event, label: str | None = None) -> None:
        self._progress.update(
            self._bars[bar], completed=event.done, total=event.total or None, description=label or bar
        )


def line(round_number: int, rounds: int, detail: Mapping[str, Any]) -> str:
    """One round in one line: accuracy, then the means of the round's main quantities.

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
    for status in ("rejected", "failed", "skipped"):
        count = sum(record.status == status for record in records)
        if count:
            pieces.append(f"{count} {status}")
    return "  ".join(pieces)
