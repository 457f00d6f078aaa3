"""Gradient uniqueness of a batch: seconds and memory beside a training step and beside other ways to get it.

    python -m benchmarks.gradient_uniqueness

Every way ends with the uniqueness of all B examples. "example-gram" makes its own passes; "in-run" is a whole
training step (forward, backward, gradients for the optimizer) that also yields the uniqueness; "plain" is
that step without it. "vmap" and "opacus" form all per-example gradients, by torch.func and by Opacus's
GradSampleModule, and multiply them in float32, where the first two multiply in float64.

Each case is a process of its own: one for the times, in turn (A B A B), and one per way for its memory: the
peak of the process's resident memory (of the device's, on a GPU) above what it held with model and batch.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurement import keep
from benchmarks.uniqueness_cases import MODELS, WAYS, memory, times
from fedaudit.models.build import build_model

BATCHES = (32, 128)
LARGE = {("resnet18", 128): "takes more than 60 s and, formed, more than 8 GB: give --large"}
TARGETS = {
    "mlp": {"over-plain-at-most": 1.5, "faster-than-vmap-at-least": 20},
    "cnn": {"over-plain-at-most": 2, "faster-than-vmap-at-least": 2},
    "lenet": {"over-plain-at-most": 2},
    "resnet18": {"over-plain-at-most": 2},
}


def main() -> None:
    """Compare in every case and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", default="1,2", help="numbers of threads, one after the other")
    parser.add_argument("--seconds", type=float, default=3.0, help="for the rounds of one case")
    parser.add_argument("--large", action="store_true", help="also what takes minutes or many gigabytes")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.uniqueness_cases"])
    threads = [int(text) for text in options.threads.split(",")] if options.device == "cpu" else [1]
    cases: dict[str, Any] = {}
    for name in options.models.split(","):
        for batch in BATCHES:
            label = f"{name}, B = {batch}"
            if (name, batch) in LARGE and not options.large:
                cases[label] = {"left out": LARGE[name, batch]}
                continue
            cases[label] = {"targets": TARGETS[name]}
            for count in threads:
                cases[label][f"{count} thread{'s' * (count > 1)}"] = _apart(
                    context, times, name, batch, count, options.device, options.seconds
                )
            cases[label]["peak-mib"] = {
                way: _apart(context, memory, name, batch, way, options.device) for way in WAYS
            }
    parameters = {
        name: sum(p.numel() for p in build_model(spec, shape, 10, 0).parameters())
        for name, (spec, shape) in MODELS.items()
    }
    device = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
    keep("gradient_uniqueness", {"device": device, "parameters": parameters, "cases": cases}, options.output)


def _apart(context: Any, work: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns, made in a fresh process."""
    with context.Pool(1) as pool:
        return pool.apply(work, arguments)


if __name__ == "__main__":
    main()
