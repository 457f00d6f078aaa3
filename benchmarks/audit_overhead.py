"""Round time with the always-on server measures over round time without any.

    python -m benchmarks.audit_overhead

The federation of ``benchmarks.simulation`` with the small convolutional network, 10 and 50 clients a round,
and with a multilayer perceptron of about a million parameters. Measures on and off alternate run by run
(A B A B); "share" is the part of an audited round that the measures take.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurement import compare, keep, time_rounds
from benchmarks.workload import federation
from fedaudit.audit.auditor import ALWAYS_ON
from fedaudit.federation.setup import setup

CLIENTS, EXAMPLES = 100, 32
CASES = (("cnn", 10), ("cnn", 50), ("mlp(hidden=784-448)", 10))


def main() -> None:
    """Measure both models and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of a run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(model, cohort, options, Path(folder)) for model, cohort in CASES]
    method = "run by run in turn (A B A B); ratio = round time with the measures / round time without"
    keep("audit_overhead", {"measures": ALWAYS_ON, "method": method, "cases": results}, options.output)


def measure(model: str, cohort: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Round times without and with the measures, for one model and number of clients per round."""
    config = federation(folder, CLIENTS, EXAMPLES, cohort, model__name=model)
    without = config.with_(federation__rounds=options.rounds + 2, audit__measures="", output__name="without")
    audited = without.with_(audit__measures=ALWAYS_ON, output__name="with")
    time_rounds(audited.with_(federation__rounds=3))  # imports and caches
    pairs = [(time_rounds(without), time_rounds(audited)) for _ in range(options.pairs)]
    found = compare(pairs, ("without", "with"), cohort)
    parameters = sum(p.numel() for p in setup(config.flat()).build_model().parameters())
    return {
        "model": model,
        "parameters": parameters,
        "clients-per-round": cohort,
        "examples-per-client": EXAMPLES,
        "batch-size": config.train.batch_size,
        "share": round(1 - 1 / found["ratio-wall"]["median"], 4),
        **found,
    }


if __name__ == "__main__":
    main()
