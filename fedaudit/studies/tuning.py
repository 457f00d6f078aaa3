"""A defense with tuned settings: a small, documented search over learning rate, clip norm and batch size.

Every combination (or `tune.trials` of them, drawn by the seed) is one training per seed, scored by accuracy
after the last round on VALIDATION examples: a share of the clients' data that no client trains on in the
search. The test and the reference examples are those of the final runs with the same seed; the search
touches neither. A final run with another seed draws another test set, unless the data has one of its own.

Trials run all their rounds: under a target epsilon the noise follows from the planned rounds, so that a
training cut short, as in successive halving, would tell of another mechanism.

What the search costs is not part of any run's epsilon. `search_cost` says what it would be.
"""

import itertools
import json
import logging
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedaudit.accounting import Ledger, search_epsilon
from fedaudit.config import RunConfig
from fedaudit.config.texts import ints, numbers
from fedaudit.defenses.base import adaptive
from fedaudit.errors import ConfigError, RunFailedError
from fedaudit.federation.checks import check
from fedaudit.federation.execution import execute
from fedaudit.federation.setup import Setup, setup
from fedaudit.records import write_text
from fedaudit.spec import Scalar, parse_spec, parse_specs
from fedaudit.training.local import steps_per_round
from fedaudit.types import Guarantee

logger = logging.getLogger(__name__)
_PLACE = re.compile(r"\{([^{}]*)\}")
_KEYS = {"lr": "train.lr", "batch-size": "train.batch-size"}
"""What is changed in the run where the defense has no place for it."""


@dataclass(frozen=True)
class Setting:
    """One combination, as a defense and what it changes in the run.

    Attributes:
        values: what was chosen, by placeholder.
        defense: the defense's spec with the values in it.
        overrides: keys of the configuration that hold the values the defense has no place for.
    """

    values: dict[str, Scalar]
    defense: str
    overrides: dict[str, Scalar]


@dataclass(frozen=True)
class Trial:
    """What one setting achieved on validation data.

    Attributes:
        setting: what was tried.
        accuracies: after the last round, one per seed; empty if a training failed.
        epsilon: largest over clients and seeds, of each training by itself; None without a guarantee.
        seconds: of all its trainings.
        reason: why it failed; empty if it did not.
    """

    setting: Setting
    accuracies: tuple[float, ...]
    epsilon: float | None
    seconds: float
    reason: str = ""

    @property
    def accuracy(self) -> float:
        """Mean over the seeds, in [0, 1]; NaN for a failed trial."""
        return sum(self.accuracies) / len(self.accuracies) if self.accuracies else math.nan

    def row(self) -> dict[str, Any]:
        """The trial as one row of a table."""
        per_seed = ", ".join(f"{value:.4f}" for value in self.accuracies)
        status = "failed" if self.reason else "ok"
        shown = {"defense": self.setting.defense, "validation-accuracy": self.accuracy, "per-seed": per_seed}
        rest = {"epsilon": self.epsilon, "seconds": self.seconds, "status": status, "reason": self.reason}
        return {**self.setting.values, **shown, **rest}


@dataclass(frozen=True)
class SearchCost:
    """What a search took, and the epsilon it would have if it were released with its outcome.

    Attributes:
        trainings: how many there were.
        seconds: of all of them.
        delta: what the epsilons are stated at; None where no example-level guarantee is to be had.
        one: epsilon of one trial, the largest over settings and clients.
        all_released: of all trials together.
        poisson: of the best trial had their number been Poisson with as many expected.
        geometric: the same for a geometric number.
    """

    trainings: int
    seconds: float
    delta: float | None = None
    one: float | None = None
    all_released: float | None = None
    poisson: float | None = None
    geometric: float | None = None

    def sentences(self) -> list[str]:
        """What a reader has to know of it."""
        found = [f"the search took {self.trainings} trainings and {self.seconds:.0f} s"]
        if self.one is None:
            return [*found, "no example-level guarantee: nothing to account for"]
        return [
            *found,
            "its epsilon is not counted in any run's: validation examples and the choice are not protected",
            f"one trial {self.one:.3g} at delta={self.delta:.1e}; the best of a random number of trials "
            f"{self.poisson:.3g} (Poisson) or {self.geometric:.3g} (geometric), all trials released "
            f"{self.all_released:.3g} (Papernot, Steinke 2021; per example, by Rényi accounting)",
        ]


def settings_of(config: RunConfig) -> list[Setting]:
    """The combinations of `[tune]`, in order, or `tune.trials` of them drawn by the run's seed.

    Raises:
        ConfigError: if a placeholder has no values, or values have no place.
    """
    tune = config.tune
    lists = {"lr": numbers(tune.lr), "clip": numbers(tune.clip), "batch-size": numbers(tune.batch_size)}
    places = set(_PLACE.findall(tune.defense))
    if places - set(lists):
        raise ConfigError(
            f"tune.defense may hold {{lr}}, {{clip}} and {{batch-size}}, got {tune.defense!r}: "
            f"replace {', '.join(sorted(places - set(lists)))}"
        )
    empty = sorted(name for name in places if not lists[name])
    if empty:
        raise ConfigError(f"tune.defense holds {{{empty[0]}}}, got no values: list some in tune.{empty[0]}")
    if lists["clip"] and "clip" not in places:
        raise ConfigError(
            f"tune.clip needs {{clip}} in tune.defense, got {tune.defense!r}: write e.g. clip-norm={{clip}}, "
            "or set tune.clip to ''"
        )
    if any(value != int(value) for value in lists["batch-size"]):
        raise ConfigError(f"tune.batch-size lists whole numbers, got {tune.batch_size!r}: round them")
    varied = {name: values for name, values in lists.items() if values}
    grid = [
        dict(zip(varied, combination, strict=True)) for combination in itertools.product(*varied.values())
    ]
    if 0 < tune.trials < len(grid):
        drawn = np.random.default_rng([config.seed, 3]).choice(len(grid), tune.trials, replace=False)
        grid = [grid[i] for i in sorted(drawn)]
    return [_setting(tune.defense, values, places) for values in grid]


def _setting(template: str, combination: dict[str, float], places: set[str]) -> Setting:
    values: dict[str, Scalar] = {
        name: int(value) if name == "batch-size" else value for name, value in combination.items()
    }
    defense = _PLACE.sub(lambda match: f"{values[match[1]]:g}", template)
    return Setting(
        values, defense, {_KEYS[name]: value for name, value in values.items() if name not in places}
    )


def trial_config(config: RunConfig, setting: Setting, seed: int, folder: Path) -> RunConfig:
    """One training of a setting: nothing measured or attacked, scored once, on validation data."""
    rounds = config.tune.rounds or config.federation.rounds
    name = "-".join(f"{key}={value:g}" for key, value in setting.values.items()) or "only"
    return RunConfig.from_flat(
        {
            **config.flat(),
            **setting.overrides,
            "seed": seed,
            "defense.name": setting.defense,
            "data.validation-fraction": config.tune.validation_fraction,
            "federation.rounds": rounds,
            "federation.evaluate-every": rounds,
            "audit.measures": "",
            "audit.save-updates": False,
            "attack.names": "",
            "output.directory": str(folder),
            "output.name": f"{name}-seed{seed}",
            "output.resume": False,
        }
    )


def tune(config: RunConfig, folder: Path) -> list[Trial]:
    """Try every setting with every seed of `[tune]`.

    All settings are checked before the first training. A training that fails, as one whose weights overflow,
    makes a failed trial and the search goes on.

    Args:
        config: what is tuned; `[compare]` plays no part.
        folder: where the trials' runs go.

    Raises:
        ConfigError: if a setting cannot be run at all.
    """
    settings = settings_of(config)
    seeds = ints(config.tune.seeds)
    for setting, seed in itertools.product(settings, seeds):
        check(trial_config(config, setting, seed, folder))
    return [_try(config, setting, seeds, folder) for setting in settings]


def _try(config: RunConfig, setting: Setting, seeds: Sequence[int], folder: Path) -> Trial:
    started = time.perf_counter()
    accuracies: list[float] = []
    epsilons: list[float] = []
    for seed in seeds:
        try:
            summary = execute(trial_config(config, setting, seed, folder)).summary
        except RunFailedError as error:
            logger.warning("a trial failed: %s", error)
            return Trial(setting, (), None, time.perf_counter() - started, str(error))
        accuracies.append(summary["accuracy"]["value"])
        if summary["epsilon"] is not None:
            epsilons.append(summary["epsilon"]["worst"])
    seconds = time.perf_counter() - started
    return Trial(setting, tuple(accuracies), max(epsilons, default=None), seconds)


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest mean accuracy, the first of equals.

    Raises:
        RunFailedError: if every trial failed.
    """
    done = [trial for trial in trials if not trial.reason]
    if not done:
        raise RunFailedError(
            f"a search needs a trial that ends, got {len(trials)} failed ones, the first because "
            f"{trials[0].reason}: lower tune.lr"
        )
    return max(done, key=lambda trial: trial.accuracy)


def search_cost(config: RunConfig, trials: Sequence[Trial]) -> SearchCost:
    """What the search took, and its epsilon for the client for whom it is largest.

    A trial is all trainings of one setting, over the seeds. Epsilon is computed for defenses of the examples
    whose noise is planned in advance; for others it is left out.
    """
    seeds = ints(config.tune.seeds)
    counted = SearchCost(len(trials) * len(seeds), sum(trial.seconds for trial in trials))
    folder = Path(config.output.directory)
    made = [setup(trial_config(config, t.setting, seeds[0], folder).flat()) for t in trials]
    worst: SearchCost | None = None
    for size in sorted({len(rows) for rows in made[0].partitions}):
        spent = [_spent(each, size, len(seeds)) for each in made]
        ledgers = [ledger for ledger, _ in spent]
        guarantee = spent[0][1]
        if guarantee is None or guarantee.unit != "example" or any(adaptive(each.defense) for each in made):
            return counted
        found = replace(
            counted,
            delta=guarantee.delta,
            one=max(search_epsilon([ledger], guarantee.delta, "all released") for ledger in ledgers),
            all_released=search_epsilon(ledgers, guarantee.delta, "all released"),
            poisson=search_epsilon(ledgers, guarantee.delta, "poisson"),
            geometric=search_epsilon(ledgers, guarantee.delta, "geometric"),
        )
        if worst is None or (found.one or 0) > (worst.one or 0):
            worst = found
    return worst or counted


def _spent(made: Setup, size: int, seeds: int) -> tuple[Ledger, Guarantee | None]:
    """What all rounds of all seeds' trainings spend of a client with this many examples."""
    steps = steps_per_round(size, made.settings(1)) * made.config.federation.rounds
    ledger = made.defense.charge(Ledger(), made.release(size), steps, size)
    repeated = Ledger(tuple((noise, rate, count * seeds) for noise, rate, count in ledger.history))
    return repeated, made.defense.guarantee(ledger, size)


def tuned_toml(config: RunConfig, best: Trial) -> str:
    """The configuration with the best setting, for `fedaudit run` and `fedaudit compare`.

    Everything that differs from the defaults stays; validation examples go back to the clients. The tuned
    defense takes the place of every compared one of the same name, or joins them.
    """
    tuned = str(parse_spec(best.setting.defense))
    kept = [str(spec) for spec in parse_specs(config.compare.defenses) if spec.name != parse_spec(tuned).name]
    changes = {
        **best.setting.overrides,
        "defense.name": tuned,
        "compare.defenses": ", ".join([*kept, tuned]),
    }
    defaults = RunConfig().flat()
    flat = RunConfig.from_flat({**config.flat(), **changes}).flat()
    tables: dict[str, dict[str, Scalar]] = {}
    for key, value in flat.items():
        table, _, leaf = key.rpartition(".")
        if (value != defaults[key] or key in changes) and table != "tune":
            tables.setdefault(table, {})[leaf] = value
    lines = [
        f"# the best of a search: accuracy {best.accuracy:.4f} on validation data ({best.setting.defense})"
    ]
    for table, values in sorted(tables.items()):
        lines += ["", f"[{table}]"] if table else []
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def write_tuning(
    config: RunConfig, trials: Sequence[Trial], cost: SearchCost, folder: Path
) -> dict[str, Any]:
    """Write trials.csv, tuned.toml and tuning.json, and return what the last one holds."""
    import pandas as pd

    from fedaudit.records import write_json

    best = best_of(trials)
    rows = [trial.row() for trial in trials]
    pd.DataFrame(rows).to_csv(folder / "trials.csv", index=False)
    write_text(folder / "tuned.toml", tuned_toml(config, best))
    found = {
        "trials": rows,
        "best": best.row(),
        "cost": asdict(cost),
        "notes": cost.sentences(),
        "tuned": str(folder / "tuned.toml"),
    }
    write_json(folder / "tuning.json", found)
    return found
