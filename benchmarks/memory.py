"""Memory of a long federation of many clients, after every round: it stays flat.

    python -m benchmarks.memory

1000 clients, 100 of them a round, 50 rounds, with the always-on measures, records and checkpoints. Peak is
the process's largest resident memory so far, as the operating system counts it; resident is what it holds.
"""

import argparse
import resource
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.measurement import keep, peak_memory
from benchmarks.workload import federation
from fedaudit.federation.execution import execute
from fedaudit.progress import Event, listen


def main() -> None:
    """Run the federation and keep what it held after each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peak: list[float] = []
    resident: list[float] = []

    def hear(event: Event) -> None:
        if event.stage == "round" and event.round:
            peak.append(peak_memory())
            resident.append(_resident())

    with tempfile.TemporaryDirectory() as folder, listen(hear):
        config = federation(Path(folder), options.clients, options.examples, options.cohort)
        execute(config.with_(federation__rounds=options.rounds))
    later = slice(len(peak) // 5, None)
    results = {
        "clients": options.clients,
        "clients-per-round": options.cohort,
        "examples-per-client": options.examples,
        "rounds": options.rounds,
        "peak-mib-after-round": [round(value, 1) for value in peak],
        "resident-mib-after-round": [round(value, 1) for value in resident],
        "peak-growth-after-a-fifth-of-the-rounds-mib": round(peak[-1] - peak[later][0], 1),
        "resident-slope-mib-per-round": round(_slope(resident[later]), 4),
    }
    keep("memory", results, options.output)


def _resident() -> float:
    """Resident memory now, MiB; NaN where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return float("nan")
    return pages * resource.getpagesize() / 2**20


def _slope(values: list[float]) -> float:
    """Least-squares slope per round."""
    return statistics.linear_regression(range(len(values)), values).slope


if __name__ == "__main__":
    main()
