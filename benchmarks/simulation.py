"""Clients per second of the in-process engine against Flower's Ray engine, a plain loop and pfl 0.6.

    python -m benchmarks.simulation [--pfl-python VENV/bin/python]

All engines do the same local work: 100 clients with 32 examples each, 10 of them a round, the 33 770
parameter network "cnn" on 1x28x28, one epoch in batches of 8 by SGD, the weighted average of the weights.
Both of fedaudit's engines run the reference apps as a user runs them, records and checkpoints written every
round, without measures and with server-side evaluation before the first and after the last round only.
The plain loop and pfl neither record nor send anything. Start-up, the first and the last round are not timed.
Ray's workers train at the same time, in-process clients one after the other. The second comparison with Ray
takes one local step instead of an epoch, and a third leaves the training out altogether: what is left of each
engine's round when the plain loop's time for the same training is taken off ("overhead").
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measurement import (
    Rounds,
    compare,
    keep,
    median_wall,
    spread,
    time_alternately,
    time_rounds,
    timed,
)
from benchmarks.plain_loop import federated_averaging, shuffled
from benchmarks.workload import federation
from fedaudit.config import RunConfig
from fedaudit.federation.execution import execute
from fedaudit.federation.folders import run_folder
from fedaudit.federation.setup import Setup, setup
from fedaudit.records import load_run

CLIENTS, EXAMPLES, COHORT = 100, 32, 10


def main() -> None:
    """Run the comparisons asked for and keep their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="repetitions against the plain loop and pfl")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of a repetition")
    parser.add_argument("--ray-pairs", type=int, default=3, help="repetitions against Ray; 0 leaves it out")
    parser.add_argument("--ray-workers", type=int, default=2)
    parser.add_argument("--pfl-python", help="an interpreter with pfl 0.6 and the same torch")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in every engine")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = federation(Path(folder), CLIENTS, EXAMPLES, COHORT, audit__measures="")
        config = config.with_(federation__rounds=options.rounds + 2)
        results = measure(config, options, Path(folder))
    keep("simulation", results, options.output)


def measure(config: RunConfig, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All comparisons; what is left out is named with the reason."""
    made = setup(config.flat())
    results: dict[str, Any] = {
        "workload": {
            "clients": CLIENTS,
            "clients-per-round": COHORT,
            "examples-per-client": EXAMPLES,
            "parameters": sum(p.numel() for p in made.build_model().parameters()),
            "batch-size": config.train.batch_size,
            "local-epochs": config.train.local_epochs,
            "data": "digits resized to 28x28, repeated with shifts",
        },
        "method": "round by round in turn (A B A B) against the plain loop and pfl, run by run against Ray; "
        "medians over the rounds of a pair; ratio = rate of in-process / rate of the other",
        "largest-weight-difference-to-plain-loop": largest_difference(config),
    }
    pairs = [time_alternately(config, _plain(made)) for _ in range(options.pairs)]
    results["plain-loop"] = compare(pairs, ("in-process", "plain-loop"), COHORT)
    results["plain-loop-two-workers"] = two_workers(config, made, options.pairs)
    if options.pfl_python is None:
        results["pfl"] = "left out: no --pfl-python"
    else:
        with _pfl(options.pfl_python, made, folder, options.threads) as (versions, one_round):
            pairs = [time_alternately(config, one_round) for _ in range(options.pairs)]
        results["pfl"] = {**versions, **compare(pairs, ("in-process", "pfl"), COHORT)}
    for name, steps in (("ray", 0), ("ray-one-local-step", 1)):
        if not options.ray_pairs:
            results[name] = "left out: --ray-pairs 0"
            continue
        mine = config.with_(train__local_steps=steps)
        ray = mine.with_(federation__engine="ray", federation__workers=options.ray_workers)
        pairs = [(time_rounds(mine), _wall_only(time_rounds(ray))) for _ in range(options.ray_pairs)]
        results[name] = {"workers": options.ray_workers, **compare(pairs, ("in-process", "ray"), COHORT)}
        if steps:
            training = [time_alternately(mine, _plain(setup(mine.flat())))[1] for _ in pairs]
            results["ray-overhead"] = overhead(pairs, training, options.ray_workers)
    return results


def two_workers(config: RunConfig, made: Setup, repetitions: int) -> dict[str, Any]:
    """The same with two clients at a time in the engine (federation.workers), one in the plain loop."""
    both = config.with_(federation__workers=2)
    pairs = [time_alternately(both, _plain(made)) for _ in range(repetitions)]
    found = compare([(_wall_only(a), _wall_only(b)) for a, b in pairs], ("in-process", "plain-loop"), COHORT)
    return {"workers": 2, **found}


def overhead(
    pairs: Sequence[tuple[Rounds, Rounds]], training: Sequence[Rounds], workers: int
) -> dict[str, Any]:
    """Milliseconds of a round that are not training, for both engines, and the ratio of the two.

    Training is what the plain loop needs for it; Ray's workers share it, so a part of it is taken off.
    """
    plain = [median_wall(rounds) for rounds in training]
    mine = [median_wall(first) - own for (first, _), own in zip(pairs, plain, strict=True)]
    ray = [median_wall(second) - own / workers for (_, second), own in zip(pairs, plain, strict=True)]
    return {
        "plain-loop-round-ms": spread([1000 * value for value in plain]),
        "in-process-ms": spread([1000 * value for value in mine]),
        "ray-ms": spread([1000 * value for value in ray]),
        "ratio": spread([theirs / ours for ours, theirs in zip(mine, ray, strict=True)]),
    }


def largest_difference(config: RunConfig, rounds: int = 1) -> float:
    """Largest difference between the weights of the engine and of the plain loop after the same rounds."""
    short = config.with_(federation__rounds=rounds, output__name="check")
    execute(short)
    made = setup(short.flat())
    rows = load_run(run_folder(short)).records.query("quantity == 'train-loss'")
    cohorts = [[int(client) for client in group] for _, group in rows.groupby("round")["client_id"]]
    *_, weights = federated_averaging(made.build_model(), _data(made), cohorts, made.batches, short.train.lr)
    from safetensors.torch import load_file

    found = load_file(run_folder(short) / "weights.safetensors")
    return max(float((found[name] - tensor).abs().max()) for name, tensor in weights.items())


def _data(made: Setup) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [made.client_data(client) for client in range(made.clients)]


def _plain(made: Setup) -> Callable[[], tuple[float, float]]:
    """One timed round of the plain loop per call."""
    generator = torch.Generator().manual_seed(made.config.seed)
    train = made.config.train

    def cohorts() -> Iterator[list[int]]:
        while True:
            yield torch.randperm(CLIENTS, generator=generator)[:COHORT].tolist()

    def batches(client: int, round_number: int) -> Any:
        return shuffled(EXAMPLES, train.batch_size, generator)[: train.local_steps or None]

    rounds = federated_averaging(made.build_model(), _data(made), cohorts(), batches, train.lr)
    return lambda: timed(lambda: next(rounds))


@contextmanager
def _pfl(
    python: str, made: Setup, folder: Path, threads: int
) -> Iterator[tuple[dict[str, str], Callable[[], tuple[float, float]]]]:
    """Versions, and one round of pfl per call, timed by pfl's own process."""
    clients = _data(made)
    weights = {f"weights/{name}": tensor.numpy() for name, tensor in made.build_model().state_dict().items()}
    file = folder / "pfl.npz"
    np.savez(
        file,
        x=torch.stack([x for x, _ in clients]).numpy(),
        y=torch.stack([y for _, y in clients]).numpy(),
        **weights,  # type: ignore[arg-type]
    )
    script = Path(__file__).with_name("pfl_federation.py")
    values = {"cohort": COHORT, "batch-size": made.config.train.batch_size, "lr": made.config.train.lr}
    arguments = [f"--{name}={value}" for name, value in {**values, "threads": threads}.items()]
    process = subprocess.Popen(
        [python, str(script), str(file), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def one_round() -> tuple[float, float]:
        requests.write("\n")
        requests.flush()
        wall, cpu = json.loads(answers.readline())
        return wall, cpu

    try:
        yield json.loads(answers.readline()), one_round
    finally:
        requests.close()
        process.wait(timeout=60)


def _wall_only(rounds: Rounds) -> Rounds:
    """Ray's work is done in other processes: this process's CPU time says nothing."""
    return [(wall, 0.0) for wall, _ in rounds]


if __name__ == "__main__":
    main()
