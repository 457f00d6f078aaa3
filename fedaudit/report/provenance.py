"""Where the numbers come from: what was audited, runs, configuration, versions, and what to be wary of."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedaudit.config.overrides import flatten
from fedaudit.config.vary import written
from fedaudit.records import Run
from fedaudit.registry import ACTIVE_MODELS, AT_SERVER, changes_update, parts_of, shows_sums_only
from fedaudit.report.display import listing
from fedaudit.report.evidence import Runs, gather
from fedaudit.report.quantities import PRIVACY
from fedaudit.report.seeds import defense_of, defenses_in, last_round, seed_of
from fedaudit.report.variations import configuration_of, varied_keys

EXPECTED_TO_DIFFER = (
    "seed",
    "defense.name",
    *("compare.defenses", "compare.seeds", "compare.vary", "compare.baseline", "compare.against"),
    *("output.directory", "output.name"),
)
SHOWN = (
    ("Data", "data.name"),
    ("Partition", "data.partitioner"),
    ("Model", "model.name"),
    ("Clients", "federation.clients"),
    ("Sampled per round", "federation.fraction-train"),
    ("Rounds", "federation.rounds"),
    ("Engine", "federation.engine"),
    ("Strategy", "strategy.name"),
    ("Optimiser", "train.optimizer"),
    ("Learning rate", "train.lr"),
    ("Batch size", "train.batch-size"),
    ("Local epochs", "train.local-epochs"),
    ("Local steps", "train.local-steps"),
    ("Measures", "audit.measures"),
    ("Observers", "audit.observers"),
    ("Attacks", "attack.names"),
)


def audited(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The facts a reader needs first, as terms and values."""
    if not runs:
        return []
    pairs = []
    for label, key in SHOWN:
        if key == "train.local-steps" and not any(configuration_of(run).get(key) for run in runs):
            continue  # 0 means by epochs
        if key == "train.local-epochs" and all(
            configuration_of(run).get("train.local-steps") for run in runs
        ):
            continue
        pairs.append((label, _values(runs, key)))
    devices = dict.fromkeys(str(d) for run in runs if (d := run.info.get("run", {}).get("device")))
    seeds = dict.fromkeys(seed_of(run) for run in runs)
    return [
        *((label, value) for label, value in pairs if value),
        ("Device", ", ".join(devices)),
        ("Defenses", ", ".join(defenses_in(runs))),
        ("Seeds", listing(list(seeds), 12)),
        ("Varied", "; ".join(f"{key}: {' | '.join(_distinct(runs, key))}" for key in varied_keys(runs))),
    ]


def notices(runs: Runs) -> list[str]:
    """What a reader must know before trusting a comparison of these runs."""
    evidence = gather(runs)
    kept = evidence.runs
    found = []
    if not kept:
        found.append("No runs were given.")
    for run in kept:
        if not run.summary:
            planned = configuration_of(run).get("federation.rounds")
            of = f" of {planned}" if planned else ""
            found.append(f"{run.name} did not end: it holds records up to round {last_round(run)}{of}.")
        if configuration_of(run).get("data.validation-fraction"):
            found.append(f"{run.name} was evaluated on validation examples, not on the test set.")
        if run.info.get("run", {}).get("repeatable") is False:
            found.append(
                f"{run.name} cannot be repeated: its noise came from the operating system, not a seed."
            )
    active = [name for name in _distinct(kept, "model.name") if name.partition("(")[0] in ACTIVE_MODELS]
    if active:
        found.append(
            f"ACTIVE server: it broadcast a model changed to leak, {listing(active)}. These numbers are of "
            "a server that breaks the protocol, not about an honest but curious one."
        )
    if evidence.left_out:
        unused = listing([run.name for run in evidence.left_out])
        found.append(f"Left out, because another run has the same defense and seed: {unused}.")
    missing = [name for name in evidence.against if name not in set(evidence.rows["quantity"])]
    if missing:
        found.append(f"No run recorded what compare.against names: {listing(missing)}.")
    differing = [
        key
        for key in _keys(kept)
        if key not in (*EXPECTED_TO_DIFFER, *evidence.varied) and len(_distinct(kept, key)) > 1
    ]
    if differing:
        found.append(
            f"These runs differ in more than defense and seed: {listing(differing, 12)}. A difference "
            "between defenses can come from that."
        )
    seeds = {
        (label, name): {seed_of(run) for run in its_runs}
        for label, part in evidence.variations.items()
        for name, its_runs in part.by_defense.items()
    }
    if kept and max(map(len, seeds.values())) < 2:
        found.append("One seed per defense: no intervals, and differences may be chance.")
    elif len({frozenset(s) for s in seeds.values()}) > 1:
        found.append("The defenses were not run with the same seeds: paired differences use the common ones.")
    unseen = [name for name in evidence.defenses if changes_update(name)]
    if unseen:
        found.append(
            f"{listing(unseen)} changes the finished update. Measures that reason from how a local step is "
            "released (mutual information, example uniqueness and its bound, usable information, subspace "
            "distance, privacy tokens) do not see that: their numbers are those of the update before it. "
            "Norms, cosines, cohort uniqueness, membership inference and attacks are of what was sent."
        )
    hiding = [name for name in evidence.defenses if shows_sums_only(name)]
    if hiding:
        found.append(
            f"Under {listing(hiding)} the server can audit the sum of a round's updates, one row a round "
            "with the batch of all clients together, and no single update: what compares clients is skipped, "
            "claims about single updates cannot be verified, and numbers of the observers client and oracle "
            "are of updates that this server never sees."
        )
    central = [name for name in evidence.defenses if AT_SERVER & set(parts_of(name))]
    if central:
        found.append(
            f"{listing(central)} protects the released models against those who see nothing else. An auditor "
            "at the server sees every update before it: measures, membership scores and attacks are of raw "
            "updates, as without this defense, and must not be held against its ε."
        )
    pooled = evidence.pooled
    values = pd.to_numeric(pooled["value"], errors="coerce")
    undefined = (pooled["status"] == "ok") & ~np.isfinite(values) & (pooled["quantity"] != PRIVACY)
    if undefined.any():
        names = sorted(map(str, pooled.loc[undefined, "quantity"].unique()))
        found.append(
            f"{int(undefined.sum()):,} numbers are not finite and left out of means and figures: "
            f"{listing(names)}."
        )
    return found


def run_list(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run, as text."""
    rows = []
    for run in runs:
        about = run.info.get("run", {})
        rows.append(
            {
                "Run": run.name,
                "Defense": defense_of(run),
                "Seed": seed_of(run),
                "Rounds": str(last_round(run)),
                "Records": f"{len(run.records):,}",
                "Ended": "yes" if run.summary else "no",
                "Started": str(about.get("started", "")),
                "Engine": str(about.get("engine", "")),
                "Device": str(about.get("device", "")),
                "Git revision": str(about.get("git-revision", ""))[:12],
            }
        )
    frame = pd.DataFrame(rows)
    return frame.loc[:, (frame != "").any()] if len(frame) else frame


def configuration(runs: Sequence[Run]) -> pd.DataFrame:
    """Every configuration key and its value; where runs differ, each value with its runs."""
    return _table(runs, "config", "Key")


def versions(runs: Sequence[Run]) -> pd.DataFrame:
    """Every package and its version; where runs differ, each version with its runs."""
    return _table(runs, "versions", "Package")


def _table(runs: Sequence[Run], name: str, heading: str) -> pd.DataFrame:
    tables = [(run.name, flatten(run.info.get(name, {}))) for run in runs]
    keys = dict.fromkeys(key for _, values in tables for key in values)
    rows = []
    for key in sorted(keys):
        by_value: dict[str, list[str]] = {}
        for run_name, values in tables:
            value = written(values[key]) if key in values else "not recorded"
            by_value.setdefault(value, []).append(run_name)
        if len(by_value) == 1:
            rows.append((key, next(iter(by_value))))
        else:
            parts = (f"{value} ({listing(names, 4)})" for value, names in by_value.items())
            rows.append((key, "; ".join(parts)))
    return pd.DataFrame(rows, columns=[heading, "Value"])


def _keys(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(str(key) for run in runs for key in configuration_of(run)))


def _distinct(runs: Sequence[Run], key: str) -> list[str]:
    return list(dict.fromkeys(_text(configuration_of(run).get(key)) for run in runs))


def _values(runs: Sequence[Run], key: str) -> str:
    return ", ".join(v for v in _distinct(runs, key) if v)


def _text(value: Any) -> str:
    return "" if value is None else written(value)
