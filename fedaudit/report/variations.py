"""Which settings a set of runs was varied by, read from their own configurations."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedaudit.config.overrides import flatten
from fedaudit.config.vary import label, split_vary, written
from fedaudit.records import Run
from fedaudit.spec import parse_spec


def configuration_of(run: Run) -> Mapping[str, Any]:
    """A run's configuration by dotted key; empty if it was not recorded."""
    return flatten(run.info.get("config", {}))


def varied_keys(runs: Sequence[Run]) -> list[str]:
    """The keys that a `compare.vary` of these runs names and that have more than one value among them."""
    named = dict.fromkeys(
        key for run in runs for key in split_vary(str(configuration_of(run).get("compare.vary", "")))
    )
    return [key for key in named if len({written(configuration_of(run).get(key, "")) for run in runs}) > 1]


def values_of(run: Run, keys: Sequence[str]) -> dict[str, str]:
    """A run's values of these keys, as text; a dash where none is recorded."""
    found = configuration_of(run)
    return {key: written(found[key]) if key in found else "–" for key in keys}


def variation_of(run: Run, keys: Sequence[str]) -> str:
    """A run's variation for people, "train.batch-size = 8"; empty without keys."""
    return label(values_of(run, keys))


def wanted_baseline(runs: Sequence[Run]) -> str:
    """The defense of `compare.baseline`, as records write it; empty if the runs name none or several."""
    named = {str(configuration_of(run).get("compare.baseline", "")) for run in runs}
    (only, *others) = named or {""}
    return "" if others or not only else str(parse_spec(only))


def wanted_against(runs: Sequence[Run]) -> list[str]:
    """The quantities that a `compare.against` of these runs names, each once."""
    texts = (str(configuration_of(run).get("compare.against", "")) for run in runs)
    return list(dict.fromkeys(name.strip() for text in texts for name in text.split(",") if name.strip()))
