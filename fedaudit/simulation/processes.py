"""Processes that are started together and stopped together, with everything they started themselves.

Flower's commands start further ones (``flower-superexec``, ``flwr-serverapp``, ``flwr-clientapp``), some in
sessions of their own, some of which outlive their parents. So not processes but groups are remembered: every
group in which a descendant was seen. Linux gives no new process the number of a group that has members.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fedaudit.errors import ConfigError, RunFailedError

_PATIENCE = ((signal.SIGTERM, 15.0), (getattr(signal, "SIGKILL", signal.SIGTERM), 5.0))


@dataclass(frozen=True)
class Entry:
    """One running process of this machine."""

    pid: int
    parent: int
    group: int


def process_table(proc: Path = Path("/proc")) -> list[Entry]:
    """Every process of this machine that has not ended; a zombie has.

    Read from Linux's `proc` (slim containers have no ``ps``), elsewhere from ``ps``.
    """
    rows = _proc_rows(proc) if (proc / "self" / "stat").exists() else _ps_rows()
    return [Entry(int(pid), int(parent), int(group)) for pid, state, parent, group in rows if state[0] != "Z"]


def _proc_rows(proc: Path) -> list[list[str]]:
    rows = []
    for path in proc.glob("[0-9]*/stat"):
        with suppress(OSError):  # ended since
            text = path.read_text(encoding="utf-8", errors="replace")
            rows.append([path.parent.name, *text.rpartition(")")[2].split()[:3]])
    return rows


def _ps_rows() -> list[list[str]]:
    command = ["ps", "-A", "-o", "pid=,stat=,ppid=,pgid="]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return [line.split() for line in done.stdout.splitlines()]


@contextmanager
def _interruptions_held_back() -> Iterator[None]:
    """Interruptions inside the block take effect at its end, so that what it starts is remembered."""
    if threading.current_thread() is not threading.main_thread():  # only that one is interrupted
        yield
        return
    caught: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _frame: caught.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for each in caught:
            signal.raise_signal(each)


def answer_of(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> tuple[int, str, str]:
    """Exit code, output and errors of a command that ends by itself; it is killed if anything comes between.

    `subprocess.run` forgets a process if it is interrupted while it starts one.

    Raises:
        subprocess.TimeoutExpired: if it takes longer.
    """
    started: list[subprocess.Popen[str]] = []
    try:
        with _interruptions_held_back():
            started.append(
                subprocess.Popen(
                    command,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        output, errors = started[0].communicate(timeout=seconds)
        return started[0].returncode, output, errors
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()


class Processes:
    """Starts commands and, when the block ends for whatever reason, stops them and all they started.

    Args:
        logs: folder of one log file per command.
        environment: the commands' whole environment; its PATH decides where they are found.

    Raises:
        ConfigError: on a system without process groups.
    """

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        if sys.platform == "win32":
            raise ConfigError("stopping what Flower starts needs process groups: use Linux, macOS or WSL")
        self.logs, self.environment = logs, dict(environment)
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._groups: set[int] = set()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except KeyboardInterrupt:  # pressed again while waiting
            self.stop(patience=_PATIENCE[1:])
            raise

    def start(self, name: str, *command: str) -> None:
        """Start a command in a session of its own; it writes to ``<name>.log``."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("wb") as log, _interruptions_held_back():
            process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._started[name] = process
            self._groups.add(process.pid)

    def log(self, name: str) -> Path:
        """Where a command writes."""
        return self.logs / f"{name}.log"

    def ended(self) -> dict[str, int]:
        """Names and exit codes of the commands that have ended."""
        return {name: code for name, p in self._started.items() if (code := p.poll()) is not None}

    def look(self) -> set[int]:
        """The ids of all processes of the remembered groups; their descendants' groups are remembered too."""
        table = process_table()
        found = {entry.pid for entry in table if entry.group in self._groups}
        while more := {e.pid for e in table if e.parent in found} - found:
            found |= more
        self._groups |= {entry.group for entry in table if entry.pid in found}
        return found

    def stop(self, patience: Sequence[tuple[int, float]] | None = None) -> None:
        """Ask every process to end, insist after a while, and make sure that none is left.

        Args:
            patience: signals to send, one after the other, each with the seconds to wait for its effect.

        Raises:
            RunFailedError: naming the processes that could not be stopped.
        """
        for number, seconds in _PATIENCE if patience is None else patience:
            deadline, asked = time.monotonic() + seconds, set[int]()
            while left := self.look():
                for pid in left - asked:
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
                asked |= left
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
                self.ended()  # reaps
        if left := self.look():
            raise RunFailedError(
                f"every process that was started must end, got {sorted(left)} still running: kill them"
            )
        self.ended()
