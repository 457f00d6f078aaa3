"""The runs of a comparison: every combination, defense and seed in a folder of its own."""

from collections.abc import Container
from pathlib import Path

from fedaudit.config import RunConfig
from fedaudit.config.texts import ints
from fedaudit.config.vary import written
from fedaudit.federation.folders import plain, run_name


def comparisons(config: RunConfig, folder: Path) -> list[RunConfig]:
    """One configuration per combination of `compare.vary`, defense and seed, each in a folder of its own.

    A run's folder is named by its combination, defense and seed: "train.batch-size=8-none-seed0"; a name
    that is taken or over 200 characters ends in a number of its own.

    Raises:
        ConfigError: if a combination breaks the schema.
    """
    runs: list[RunConfig] = []
    names: set[str] = set()
    for values, varied in config.variations():
        prefix = plain("-".join(f"{key}={written(value)}" for key, value in values.items()))
        for spec in config.defense_specs():
            for seed in ints(config.compare.seeds):
                each = varied.with_(
                    defense__name=str(spec), seed=seed, output__directory=str(folder), output__name=""
                )
                name = _unused(f"{prefix}-{run_name(each)}".lstrip("-"), names)
                names.add(name)
                runs.append(each.with_(output__name=name))
    return runs


def _unused(name: str, taken: Container[str], longest: int = 200) -> str:
    """The name, or the first of name-2, name-3, ... that is not taken; file systems allow 255 bytes."""
    candidate, number = name[:longest], 1
    while candidate in taken or (number == 1 and len(name) > longest):
        number += 1
        candidate = f"{name[:longest]}-{number}"
    return candidate
