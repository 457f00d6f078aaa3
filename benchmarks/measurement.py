"""Interleaved timings, their ratios, and the description of the machine beside them."""

import itertools
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedaudit.config import RunConfig
from fedaudit.federation.execution import execute
from fedaudit.progress import Event, listen

RESULTS = Path(__file__).parent / "results"
BUSY = 1.5  # load average of one benchmark alone is about 1
NOTE = "other work shared the machine: wall times are noisy, CPU times less so; run again when it is quiet"
_NUMBERS = itertools.count()
_VERSIONS = ("torch", "flwr", "ray", "numpy", "pyarrow")


Rounds = list[tuple[float, float]]  # wall and CPU seconds of each


def time_rounds(config: RunConfig, between: Callable[[], None] = lambda: None) -> Rounds:
    """Run a federation and time its rounds but the first (start-up, caches) and the last (evaluation).

    Args:
        config: the federation; its first and last round are not timed.
        between: called after each round; what it costs is not counted.
    """
    found: Rounds = []
    started: tuple[float, float] | None = None

    def hear(event: Event) -> None:
        nonlocal started
        if event.stage != "round":
            return
        if started is not None and event.round < config.federation.rounds:
            found.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        if 1 <= event.round < config.federation.rounds:
            between()
            started = (time.perf_counter(), time.process_time())

    with listen(hear):
        execute(config.with_(output__name=f"timed-{next(_NUMBERS)}"))  # a run keeps a folder of its own
    return found


def time_alternately(config: RunConfig, other: Callable[[], tuple[float, float]]) -> tuple[Rounds, Rounds]:
    """Times of a federation's rounds and, after each of them, of one round of something else: A B A B."""
    others: Rounds = []
    mine = time_rounds(config, lambda: others.append(other()))
    return mine, others[1:]  # the first is the other's start-up


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(pairs: Sequence[tuple[Rounds, Rounds]], names: tuple[str, str], cohort: int) -> dict[str, Any]:
    """What each of two needs for a round, and for each pair the second's median over the first's.

    A ratio of r says that the first runs r times as many clients per second. CPU seconds are left out where
    the work is done by other processes (they are 0 there).
    """
    found: dict[str, Any] = {"pairs": len(pairs), "rounds-per-pair": [len(first) for first, _ in pairs]}
    medians = [[[_median(rounds, clock) for clock in (0, 1)] for rounds in pair] for pair in pairs]
    for index, name in enumerate(names):
        found[name] = {
            "round-wall-ms": spread([1000 * pair[index][0] for pair in medians]),
            "round-cpu-ms": spread([1000 * pair[index][1] for pair in medians]),
            "clients-per-second": spread([cohort / pair[index][0] for pair in medians]),
        }
        if not all(pair[index][1] for pair in medians):
            del found[name]["round-cpu-ms"]
    for clock, name in enumerate(("wall", "cpu")):
        if all(pair[0][clock] and pair[1][clock] for pair in medians):
            found[f"ratio-{name}"] = spread([second[clock] / first[clock] for first, second in medians])
    return found


def median_wall(rounds: Rounds) -> float:
    """Median wall seconds of a round."""
    return _median(rounds, 0)


def _median(rounds: Rounds, clock: int) -> float:
    return statistics.median(seconds[clock] for seconds in rounds)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest value, to four digits."""
    numbers = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def peak_memory() -> float:
    """Largest resident memory so far, MiB; the system counts in KiB, on macOS in bytes."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def machine() -> dict[str, Any]:
    """Processor, memory and versions; no name of a host, no path."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "memory-gib": round(pages * size / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _VERSIONS},
        "torch-threads": torch.get_num_threads(),
        "omp-num-threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "load-average-at-the-end": [round(value, 2) for value in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def keep(name: str, results: Mapping[str, Any], output: Path | None = None) -> Path:
    """Write results beside the machine's description as JSON, print them, and return the file."""
    path = output or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    described = machine()
    if described["load-average-at-the-end"][0] > BUSY:
        described["note"] = NOTE
    text = json.dumps({"benchmark": name, "machine": described, **results}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    print(text)
    return path
