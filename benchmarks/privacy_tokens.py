"""Mutual information through training, by privacy tokens: the paper's difference beside held-out InfoNCE.

    python -m benchmarks.privacy_tokens [--steps 100] [--chromium chromium]

A real federation of four clients runs in process on embedded data; at six rounds the broadcast weights are
kept, and pairs (batch, its gradient at these weights) of every client are formed, split by example into
critic-train, validation and held-out. For each of the two extractors of Meng et al.:

- "fresh": a critic trained from nothing on the pairs of that checkpoint, the same number of steps at each.
  Its InfoNCE on held-out pairs is what the measure `privacy-tokens` reports.
- "continued": one critic, trained further at every checkpoint with all pairs so far, as in the paper's
  Algorithm 1. At a checkpoint the difference is taken before and after the critic has been trained there;
  before the first, the critic has not been trained at all.
- "final": the critic after the last checkpoint, on the pairs of every checkpoint.
- "frozen": the continued critic once more, but the model stays at its initial weights. What rises here is the
  critic's own progress, not the model's.
- "unrelated": the continued critic on pairs whose gradient is another batch's. What is above 0 here is
  memory of the pairs it was trained on.

Smaller than in the paper, to take minutes on one core: 20 critic-train batches per client and checkpoint,
1024 coordinates per layer (more are hashed), fewer critic steps at ten times the learning rates (1e-3,
extractor 1e-4), and 8 matched and 8 mismatched pairs in every step, also where the pairs so far are more.
One seed.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurement import keep
from benchmarks.privacy_tokens_figure import draw
from fedaudit.config import RunConfig
from fedaudit.federation.execution import execute
from fedaudit.federation.folders import run_folder
from fedaudit.federation.setup import Setup, setup, summed_cross_entropy
from fedaudit.measures.batch_pools import split_examples
from fedaudit.measures.local_release import LocalTraining
from fedaudit.measures.mi_bounds import infonce, permutation_p_value
from fedaudit.measures.privacy_tokens import PrivacyTokens
from fedaudit.measures.token_critic import TokenCritic, train_and_validate
from fedaudit.measures.token_networks import Extractor
from fedaudit.measures.token_pairs import TokenPairs, draw_batches, join_pairs, one_party, standardised
from fedaudit.measures.watched_gradients import LayerVectors, feature_module, watched_layers
from fedaudit.needs import Needs
from fedaudit.records import load_run
from fedaudit.registry import MEASURES
from fedaudit.types import ClientUpdate, Estimate, RoundContext

EXTRACTORS: tuple[Extractor, ...] = ("autoencoder", "transformer")
CLIENTS, TRAIN, VALIDATION, HELD_OUT, COORDINATES, PER_STEP = 4, 20, 12, 24, 1024, 8
LR, EXTRACTOR_LR = 1e-3, 1e-4


@dataclass(frozen=True)
class Case:
    """One federation: what it trains, and when it is looked at."""

    name: str
    data: str
    model: str
    lr: float
    batch: int
    steps: int
    checkpoints: tuple[int, ...]
    frozen: bool = True


CASES = (
    Case("LeNet on digits", "digits", "lenet", 0.5, 16, 23, (0, 2, 5, 10, 20, 39)),
    Case("LeNet on patches", "patches", "lenet", 0.2, 8, 13, (0, 2, 5, 10, 20, 39)),
    Case("AlexNet-like on patches", "patches", "alexnet", 0.1, 4, 5, (0, 2, 5, 10, 17, 29), frozen=False),
)


@dataclass
class KeptUpdates:
    """A measure that measures nothing: it keeps the updates of some rounds for later."""

    rounds: frozenset[int] = frozenset()
    kept: dict[int, list[ClientUpdate]] = field(default_factory=dict)

    name = "kept-updates"
    unit = "1"
    scope = "round"
    observers = ("server",)

    def needs(self, observer: str) -> Needs:
        """Nothing."""
        return Needs.NOTHING

    def __call__(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Estimate]:
        """The round's number."""
        if ctx.round in self.rounds:
            self.kept[ctx.round] = list(updates)
        return [Estimate(float(ctx.round), "1", "exact")]


PROBE = KeptUpdates()
MEASURES.register(PROBE.name, "keeps the updates of some rounds", lambda: PROBE)


@dataclass(frozen=True)
class Checkpoint:
    """For each client its critic-train, validation and held-out pairs at one set of weights."""

    parts: list[list[TokenPairs]]
    widths: list[int]

    def of(self, purpose: int) -> list[TokenPairs]:
        """Every client's pairs of one purpose: 0 critic-train, 1 validation, 2 held-out."""
        return [parts[purpose] for parts in self.parts]


def main() -> None:
    """Run the cases asked for, keep results and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="critic steps at every checkpoint")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="which cases, from 0")
    parser.add_argument("--chromium", help="a browser that turns the figure into a PNG")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, cpu = time.perf_counter(), time.process_time()
    found = [run_case(CASES[index], options.steps) for index in options.cases]
    results = {
        "method": [" ".join(part.split()) for part in (__doc__ or "").split("\n\n")[2:]],
        "critic-steps-per-checkpoint": options.steps,
        "learning-rates": {"extractor": EXTRACTOR_LR, "rest": LR},
        "pairs-per-client": {"critic-train": TRAIN, "validation": VALIDATION, "held-out": HELD_OUT},
        "ceiling": math.log(HELD_OUT),
        "unit": "nats",
        "cases": found,
        "finding": finding(found),
        "seconds": round(time.perf_counter() - started),
        "cpu-seconds": round(time.process_time() - cpu),
    }
    keep("privacy_tokens", results, options.output)
    if options.output is None:
        draw(found, HELD_OUT, options.chromium)


def run_case(case: Case, steps: int) -> dict[str, Any]:
    """Train the federation, then measure at its checkpoints."""
    started = time.perf_counter()
    made, kept, accuracy = federation(case)
    trained = time.perf_counter()
    checkpoints = [pairs_at(made, kept[after], case) for after in case.checkpoints]
    frozen = [checkpoints[0]]
    if case.frozen:
        frozen += [pairs_at(made, kept[0], case, salt) for salt in range(1, len(checkpoints))]
    paired = time.perf_counter()
    rows: list[dict[str, Any]] = [
        {"after-rounds": after, "test-accuracy": round(accuracy[after], 4)} for after in case.checkpoints
    ]
    for extractor in EXTRACTORS:
        for row, checkpoint in zip(rows, checkpoints, strict=True):
            row[extractor] = {"fresh": fresh(checkpoint, extractor, steps)}
        for row, values in zip(rows, continued(checkpoints, extractor, steps), strict=True):
            row[extractor] |= values
        controls = {"unrelated": [unrelated(checkpoint) for checkpoint in checkpoints]}
        if case.frozen:
            controls["frozen"] = frozen
        for name, given in controls.items():
            for row, values in zip(rows, continued(given, extractor, steps), strict=True):
                row[extractor][name] = values["continued"]
    return {
        "case": case.name,
        "federation": {
            "clients": CLIENTS,
            "local-steps": case.steps,
            "batch": case.batch,
            "lr": case.lr,
            "rounds": case.checkpoints[-1] + 1,
        },
        "checkpoints": rows,
        "seconds": {
            "training": round(trained - started, 1),
            "pairs": round(paired - trained, 1),
            "critics": round(time.perf_counter() - paired, 1),
        },
        "registered-measure": registered(made, kept[case.checkpoints[1]], case),
    }


def federation(case: Case) -> tuple[Setup, dict[int, list[ClientUpdate]], dict[int, float]]:
    """The set-up, the updates that start from each checkpoint's weights, and these weights' accuracy."""
    PROBE.rounds, PROBE.kept = frozenset(after + 1 for after in case.checkpoints), {}
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.from_flat(
            {
                "data.name": case.data,
                "model.name": case.model,
                "federation.clients": CLIENTS,
                "federation.rounds": case.checkpoints[-1] + 1,
                "federation.device": "cpu",
                "train.lr": case.lr,
                "train.batch-size": case.batch,
                "train.local-steps": case.steps,
                "audit.measures": PROBE.name,
                "output.directory": folder,
            }
        )
        execute(config)
        rows = load_run(run_folder(config)).records.query("quantity == 'accuracy'")
    accuracy = dict(zip(rows["round"].astype(int), rows["value"].astype(float), strict=True))
    return setup(config.flat()), {number - 1: found for number, found in PROBE.kept.items()}, accuracy


def pairs_at(made: Setup, updates: Sequence[ClientUpdate], case: Case, salt: int = 0) -> Checkpoint:
    """Pairs of every client at the weights it was sent; another salt draws other batches."""
    model = made.build_model().eval()
    weights = updates[0].before
    hashing = torch.Generator().manual_seed(7)
    vectors = LayerVectors(watched_layers(model), weights, COORDINATES, hashing)
    found = []
    for update in updates:
        x, y = made.client_data(update.client_id)
        split = split_examples(len(x), 256, torch.Generator().manual_seed(update.client_id))
        draws = torch.Generator().manual_seed(1000 * update.round + 10 * update.client_id + salt)
        training = LocalTraining(1, case.batch, 1.0, made.release(len(x)))
        parts = []
        for rows, count in zip(split, (TRAIN, VALIDATION, HELD_OUT), strict=True):
            members = draw_batches(len(rows), min(case.batch, len(rows) // 2), count, draws)
            inputs = (x[rows], y[rows], members, training, vectors, feature_module(model), draws)
            parts.append(one_party(model, weights, summed_cross_entropy, *inputs))
        found.append(standardised(parts, vectors.widths))
    return Checkpoint(found, vectors.widths)


def unrelated(checkpoint: Checkpoint) -> Checkpoint:
    """The same batches, each with the gradient of the next batch of its client."""
    parts = [
        [replace(pairs, gradients=pairs.gradients.roll(1, 0)) for pairs in of_client]
        for of_client in checkpoint.parts
    ]
    return Checkpoint(parts, checkpoint.widths)


def new_critic(checkpoint: Checkpoint, extractor: Extractor) -> TokenCritic:
    """A critic that has not been trained; always the same one."""
    features = checkpoint.parts[0][0].features.shape[1]
    generator, rates = torch.Generator().manual_seed(0), {"lr": LR, "extractor_lr": EXTRACTOR_LR}
    return TokenCritic(features, checkpoint.widths, extractor, generator, **rates)


def difference(critic: TokenCritic, pairs: Sequence[TokenPairs]) -> float:
    """The paper's difference on these pairs, in nats."""
    return round(critic.paper(join_pairs(pairs), torch.Generator().manual_seed(1))[1], 5)


def fresh(checkpoint: Checkpoint, extractor: Extractor, steps: int) -> dict[str, Any]:
    """What a critic trained on this checkpoint alone finds."""
    draws = torch.Generator().manual_seed(2)
    critic = new_critic(checkpoint, extractor)
    trained = train_and_validate(critic, checkpoint.of(0), checkpoint.of(1), steps, draws)
    found: dict[str, Any] = {
        "difference": difference(critic, checkpoint.of(0)),
        "difference-held-out": difference(critic, checkpoint.of(2)),
    }
    critic.restore(trained.best)
    values, p_values = [], []
    for pairs in checkpoint.of(2):
        scores = trained.temperature * critic.pair_scores(pairs).double()
        values.append(float(infonce(scores)))
        p_values.append(permutation_p_value(scores, 999, draws)[0])
    found["infonce-held-out"] = round(sum(values) / len(values), 4)
    found["infonce-by-client"] = [round(value, 4) for value in values]
    found["p-values"] = [round(value, 4) for value in p_values]
    return found


def continued(checkpoints: Sequence[Checkpoint], extractor: Extractor, steps: int) -> list[dict[str, Any]]:
    """One critic through all checkpoints; at the end, the same critic on all of them once more."""
    draws = torch.Generator().manual_seed(3)
    critic = new_critic(checkpoints[0], extractor)
    collected: list[TokenPairs] = []
    found: list[dict[str, Any]] = []
    for checkpoint in checkpoints:
        before = difference(critic, checkpoint.of(0))
        collected += checkpoint.of(0)
        pairs = join_pairs(collected)
        critic.fit(pairs, steps, draws, share=PER_STEP / len(pairs))
        after = {
            "before-its-training": before,
            "difference": difference(critic, checkpoint.of(0)),
            "difference-held-out": difference(critic, checkpoint.of(2)),
        }
        found.append({"continued": after})
    for row, checkpoint in zip(found, checkpoints, strict=True):
        row["final"] = {
            "difference": difference(critic, checkpoint.of(0)),
            "difference-held-out": difference(critic, checkpoint.of(2)),
        }
    return found


def registered(made: Setup, updates: Sequence[ClientUpdate], case: Case) -> dict[str, Any] | str:
    """Values of the measure with its defaults at the second checkpoint, and the seconds it takes."""
    if case is not CASES[0]:
        return "left out: timed in the first case"
    found: dict[str, Any] = {}
    server = made.context(updates[0].round)
    oracle = replace(server, observer="oracle", evidence=made.evidence)
    for ctx in (oracle, server):
        wall, cpu = time.perf_counter(), time.process_time()
        values = [e for e in PrivacyTokens()(updates, ctx) if isinstance(e, Estimate)]
        found[ctx.observer] = {
            "infonce-held-out": [round(e.value, 4) for e in values],
            "p-values": [round(float(e.extra["p-value"]), 4) for e in values],
            "local-steps": values[0].extra["local-steps"],
            "wall-seconds": round(time.perf_counter() - wall, 2),
            "cpu-seconds": round(time.process_time() - cpu, 2),
        }
    return found


def finding(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the curves show, in sentences made of their numbers: first all together, then one by one."""
    pairs = [(case["checkpoints"], extractor) for case in cases for extractor in EXTRACTORS]
    each = [sentence for case in cases for e in EXTRACTORS for sentence in findings_of(case, e)]
    return [*summary([[row[extractor] for row in rows] for rows, extractor in pairs]), *each]


def summary(found: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Counts over all combinations of a case and an extractor; each is a row per checkpoint."""

    def curve(rows: Sequence[Mapping[str, Any]], name: str, key: str = "difference") -> list[float]:
        return [row[name][key] for row in rows]

    n = len(found)
    before = [curve(rows, "continued", "before-its-training") for rows in found]
    rises = sum(0 < max(range(len(v)), key=v.__getitem__) < len(v) - 1 for v in before)
    apart = sum(max(rows[0]["fresh"]["p-values"]) <= 0.05 for rows in found)
    clients = [p for rows in found for p in rows[0]["fresh"]["p-values"]]
    final = [curve(rows, "final") for rows in found]
    frozen = [curve(rows, "frozen") for rows in found if "frozen" in rows[0]]
    unrelated = [abs(value) for rows in found for value in curve(rows, "unrelated")]
    infonce = [curve(rows, "fresh", "infonce-held-out") for rows in found]
    largest_first = sum(v[0] == max(v) for v in final)
    return [
        f"Taken before the critic is trained at a checkpoint, the difference rises from {before[0][0]:.3f} "
        f"and falls again in {rises} of {n} combinations, as in the paper.",
        "At initialisation that critic has not been trained at all. One trained there tells held-out pairs "
        f"apart with p <= 0.05 for {sum(p <= 0.05 for p in clients)} of {len(clients)} clients (for every "
        f"client in {apart} of {n} combinations)"
        + (": the value near 0 is the critic's, not the gradient's." if apart > n / 2 else "."),
        "The critic after the last checkpoint gives initialisation the largest difference of all checkpoints "
        f"in {largest_first} of {n} combinations, and a larger one than the last checkpoint in "
        f"{sum(v[0] > v[-1] for v in final)}"
        + (": with one critic for all there is no rise, only the fall." if largest_first > n / 2 else "."),
        "With the model frozen at initialisation the continued critic's difference is larger at the end than "
        f"at first in {sum(v[-1] > v[0] for v in frozen)} of {len(frozen)} combinations, where "
        "only the critic was trained.",
        "On unrelated pairs, where there is nothing to find, the continued critic's difference on its own "
        f"batches is up to {max(unrelated):.3f} from 0: memory of these batches.",
        f"Held-out InfoNCE of fresh critics is lower at the last checkpoint than at initialisation in "
        f"{sum(v[-1] < v[0] for v in infonce)} of {n} combinations.",
    ]


def findings_of(case: Mapping[str, Any], extractor: Extractor) -> list[str]:
    """The curves of one extractor in one case."""
    rows, what = case["checkpoints"], f"{case['case']}, {extractor}: "
    rounds = [row["after-rounds"] for row in rows]
    first = rows[0][extractor]["fresh"]
    said = [
        f"{what}at initialisation the difference of a critic not yet trained is "
        f"{rows[0][extractor]['continued']['before-its-training']:.3f}, that of one trained there "
        f"{first['difference']:.3f}; its InfoNCE on held-out pairs is {first['infonce-held-out']:.3f}, "
        f"p <= {max(first['p-values']):.3f} for every client."
    ]
    for curve in ("continued", "frozen", "unrelated", "final", "fresh"):
        if curve in rows[0][extractor]:
            values = [row[extractor][curve]["difference"] for row in rows]
            said.append(f"{what}{curve} difference {shape(values, rounds)}.")
    values = [row[extractor]["fresh"]["infonce-held-out"] for row in rows]
    return [*said, f"{what}held-out InfoNCE {shape(values, rounds)}."]


def shape(values: Sequence[float], rounds: Sequence[int]) -> str:
    """First, largest and last value, and where the largest is.

    >>> shape([0.0, 2.0, 1.0], [0, 5, 9])
    'rises, then falls: 0.000 at first, largest 2.000 after 5 rounds, 1.000 after 9'
    """
    place = max(range(len(values)), key=values.__getitem__)
    ends = {0: "is largest at first", len(values) - 1: "is largest at the end"}
    trend = ends.get(place, "rises, then falls")
    return (
        f"{trend}: {values[0]:.3f} at first, largest {values[place]:.3f} after {rounds[place]} rounds, "
        f"{values[-1]:.3f} after {rounds[-1]}"
    )


if __name__ == "__main__":
    main()
