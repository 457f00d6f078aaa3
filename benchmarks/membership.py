"""How well each membership score tells members from others, without a defense and under DP-SGD.

    python -m benchmarks.membership

One overfitted federation, handwritten digits and a small network: few examples per client, many local epochs.
The same federation then runs under DP-SGD. Every score is computed on the recorded updates as the server
could, once in the last round and once averaged over all rounds. Members are what a client holds (all of it is
used every round without a defense), non-members the reference examples, which nobody trains on. Intervals are
a bootstrap over clients and hold for these reference examples. The control sets non-members against
non-members: per client a random half plays the members.

Then latent attributes: clients whose digits mostly have or mostly lack an attribute send one update from the
initial weights, and the server tells the two kinds apart by shadow updates made of its reference examples.
"""

import argparse
import json
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measurement import keep
from fedaudit.attacks.gaussian_envelope import gaussian_auc
from fedaudit.attacks.membership import average_over_rounds
from fedaudit.attacks.roc import Rate, auc, split_in_half, true_positives_at
from fedaudit.config import RunConfig
from fedaudit.federation.execution import execute
from fedaudit.federation.setup import Setup, setup
from fedaudit.inference.candidate_scores import SCORES, Score, candidate_scores
from fedaudit.inference.shadow_updates import infer_attribute, shadow_updates
from fedaudit.kept_files import load_update, update_file
from fedaudit.measures.attributes import latent_attribute
from fedaudit.records import Run
from fedaudit.training.local import steps_per_round
from fedaudit.types import ClientUpdate, RoundContext

DEFENSES = ("none", "dp-sgd(epsilon=8)", "dp-sgd(epsilon=1)")
ATTRIBUTES = ("brightness", "contrast")
MEASURE = "membership-inference"
Rounds = list[tuple[list[ClientUpdate], RoundContext]]


def main() -> None:
    """Run the three federations, score their updates and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--examples", type=int, default=20, help="of each client")
    parser.add_argument("--epochs", type=int, default=50, help="local epochs in a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--shadows", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            defense: federation(overfitted(options, defense, folder), options.shadows) for defense in DEFENSES
        }
    results = {
        "settings": {key: value for key, value in vars(options).items() if key != "output"}
        | {"data": "digits", "model": "mlp", "lr": 0.2, "batch-size": 16, "partition": "iid"},
        "note": "value, low, high: 95 % bootstrap over clients, one threshold for all; attributes: DeLong",
        "federations": found,
        "wall-seconds": round(time.perf_counter() - started[0], 1),
        "cpu-seconds": round(time.process_time() - started[1], 1),
    }
    keep("membership", results, options.output)


def overfitted(options: argparse.Namespace, defense: str, folder: str) -> RunConfig:
    """The federation: what the clients do not hold is the server's reference."""
    base = RunConfig()
    rest = 1797 - round(1797 * base.data.test_fraction)
    return RunConfig.from_flat(
        {
            "seed": options.seed,
            "data.name": "digits",
            "data.reference-fraction": 1 - options.clients * options.examples / rest,
            "model.name": "mlp",
            "federation.clients": options.clients,
            "federation.rounds": options.rounds,
            "federation.device": "cpu",
            "train.lr": 0.2,
            "train.batch-size": 16,
            "train.local-epochs": options.epochs,
            "defense.name": defense,
            "audit.measures": f"{MEASURE}(score=matched-filter, candidates=2000)",
            "audit.observers": "server, oracle",
            "audit.save-updates": True,
            "output.directory": folder,
        }
    )


def federation(config: RunConfig, shadows: int) -> dict[str, Any]:
    """Run one federation and say how every score does on its updates."""
    run, made = execute(config), setup(config.flat())
    rounds: Rounds = [
        (
            [load_update(update_file(run.path / "updates", number, c)) for c in range(made.clients)],
            made.context(number),
        )
        for number in range(1, config.federation.rounds + 1)
    ]
    return {
        **described(run, made),
        "scores": {score: compared(score, rounds, made) for score in SCORES},
        "attributes": {
            spec: attribute(spec, rounds[0][0][0], rounds[0][1], made, shadows) for spec in ATTRIBUTES
        },
    }


def described(run: Run, made: Setup) -> dict[str, Any]:
    """Utility, noise, and the envelope that the measure states for the last round."""
    rows = run.records
    last = rows[rows["round"] == rows["round"].max()]
    accuracy = float(last[last["quantity"] == "accuracy"]["value"].iloc[0])
    extras = [json.loads(text) for text in last[last["quantity"] == MEASURE]["extra"]]
    release = made.release(len(made.partitions[0]))
    train = [run_accuracy(made, run.path / "updates", client) for client in range(made.clients)]
    found: dict[str, Any] = {
        "accuracy-test": round(accuracy, 3),
        "accuracy-of-returned-models-on-own-examples": round(sum(train) / len(train), 3),
        "examples-of-each-client": len(made.partitions[0]),
        "reference-examples": len(made.data.reference) if made.data.reference is not None else 0,
    }
    if release.noise_std:
        found |= {
            "noise-multiplier": round(release.noise_std / (release.clip_norm or 1), 3),
            "epsilon-reached": round(float(last["epsilon"].max()), 3),
            "delta": float(last["delta"].max()),
        }
        ceiling = torch.tensor([(release.clip_norm or 1) / release.noise_std])
        steps = steps_per_round(len(made.partitions[0]), made.settings(1)) * made.config.federation.rounds
        every = gaussian_auc(ceiling, steps=steps, rate=release.sample_rate)
        found["envelope-auc (all rounds, every gradient as long as the clip norm)"] = round(every, 4)
        for key in ("envelope-auc", "envelope-tpr-at-fpr-0.01", "envelope-tpr-at-fpr-0.001"):
            found[f"{key} (last round alone)"] = round(sum(e[key] for e in extras) / len(extras), 4)
    return found


def run_accuracy(made: Setup, folder: Path, client: int) -> float:
    """Accuracy of the model a client returned in the last round on the examples it holds."""
    update = load_update(update_file(folder, made.config.federation.rounds, client))
    model = made.build_model()
    model.load_state_dict({name: value + update.delta[name] for name, value in update.before.items()})
    x, y = made.client_data(client)
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).double().mean())


def compared(score: Score, rounds: Rounds, made: Setup) -> dict[str, Any]:
    """The ROC of one score in the last round and averaged over rounds."""
    reference = made.data.reference
    assert reference is not None
    own = [made.client_data(client) for client in range(made.clients)]
    x = torch.cat([*(inputs for inputs, _ in own), reference.x])
    y = torch.cat([*(labels for _, labels in own), reference.y])
    sizes = [len(labels) for _, labels in own]
    single = [candidate_scores(score, updates, ctx, x, y) for updates, ctx in rounds]
    return {
        name: areas(scores, sizes, f"{made.config.defense.name} {score} {name}")
        for name, scores in (("last round", single[-1]), ("mean over rounds", average_over_rounds(single)))
    }


def areas(scores: Tensor, sizes: Sequence[int], purpose: str) -> dict[str, Any]:
    """Area, its start, and the control, of every client's own candidates and the reference, pooled."""
    columns = torch.split(scores, [*sizes, scores.shape[1] - sum(sizes)], dim=1)
    generator = torch.Generator().manual_seed(zlib.crc32(purpose.encode()))  # other halves for every entry
    inside = [columns[client][client] for client in range(len(sizes))]
    outside = list(columns[-1])
    halves = [split_in_half(len(row), generator) for row in outside]
    values, members, owners = pooled(inside, outside)
    control = torch.cat(outside), torch.cat(halves)
    clients = torch.arange(len(sizes)).repeat_interleave(len(outside[0]))
    return {
        "auc": shown(auc(values, members, clusters=owners)),
        "tpr-at-fpr-0.01": shown(true_positives_at(0.01, values, members, clusters=owners)),
        "tpr-at-fpr-0.001": shown(true_positives_at(0.001, values, members, clusters=owners)),
        "control-auc": shown(auc(*control, clusters=clients)),
    }


def pooled(inside: Sequence[Tensor], outside: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """All scores, whether each is a member's, and whose update it was."""
    values = torch.cat([*inside, *outside])
    members = torch.arange(len(values)) < sum(map(len, inside))
    owners = torch.cat(
        [torch.full((len(row),), c) for side in (inside, outside) for c, row in enumerate(side)]
    )
    return values, members, owners


def shown(rate: Rate) -> list[float]:
    """Value, low, high."""
    return [round(number, 4) for number in (rate.value, rate.low, rate.high)]


def attribute(spec: str, like: ClientUpdate, ctx: RoundContext, made: Setup, shadows: int) -> dict[str, Any]:
    """Area over clients with the attribute in 75 % or 25 % of their examples, told apart by one update."""
    assert ctx.reference is not None
    held, rest = made.data.train, made.data.test  # none of them is the server's
    x, y = torch.cat([held.x, rest.x]), torch.cat([held.y, rest.y])
    having = latent_attribute(spec, x, y)
    size, kinds = len(made.partitions[0]), [torch.nonzero(having == has).flatten() for has in (True, False)]
    many, few = round(0.75 * size), round(0.25 * size)
    pairs = min(map(len, kinds)) // (many + few)
    taken = [0, 0]
    rows = []
    for client in range(2 * pairs):
        counts = (many, few) if client % 2 else (few, many)
        rows.append(torch.cat([kinds[k][taken[k] : taken[k] + counts[k]] for k in (0, 1)]))
        taken = [start + count for start, count in zip(taken, counts, strict=True)]
    defense = None if made.config.defense.name == "none" else made.defense
    settings = made.settings(1)
    deltas = shadow_updates(
        like,
        replace(ctx, reference=(x, y)),
        settings,
        rows,
        defense=defense,
        seed=zlib.crc32(f"{made.config.defense.name} {spec}".encode()),
    )
    targets = [ClientUpdate(c, 1, like.before, delta, size) for c, delta in enumerate(deltas)]
    known = latent_attribute(spec, *ctx.reference)
    found = infer_attribute(targets, ctx, known, settings, defense=defense, shadows=shadows)
    area = auc(found.log_odds, torch.arange(len(targets)) % 2 == 1)
    return {
        "clients": len(targets),
        "auc": shown(area),
        "validation-shadow-auc": round(found.shadow_auc, 3),
    }


if __name__ == "__main__":
    main()
