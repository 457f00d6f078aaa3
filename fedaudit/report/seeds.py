"""Runs to one number per variation, defense, seed and quantity, and from there to intervals over seeds.

The seed is the unit of replication: clients and rounds of one run share a model and are averaged first.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from fedaudit.records import AuditRecord, Run
from fedaudit.report.quantities import PRIVACY, describe, order
from fedaudit.report.quantities.quantity import BOUND
from fedaudit.report.variations import variation_of, varied_keys

OBSERVERS = ("oracle", "client", "server")
"""Whose number is shown where several observers have one: those who see the data first."""

GROUP = ["variation", "defense", "quantity", "observer"]
KEYS = [*GROUP, "seed"]


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, int]:
    """Mean, half-width of its Student-t interval, and n; the half-width is NaN for n < 2.

    half = t_{n-1, (1+level)/2} * s / sqrt(n), with s the sample standard deviation (n - 1).

    >>> mean, half, n = t_interval([1.0, 3.0])
    >>> round(mean, 3), round(half, 3), n
    (2.0, 12.706, 2)
    """
    sample = np.asarray(values, dtype=float)
    n = sample.size
    if n == 0:
        return math.nan, math.nan, 0
    if n == 1:
        return float(sample[0]), math.nan, 1
    half = stats.t.ppf((1 + level) / 2, n - 1) * sample.std(ddof=1) / math.sqrt(n)
    return float(sample.mean()), float(half), n


def defense_of(run: Run) -> str:
    """The defense a run had in force, as written in its specification."""
    records = run.records
    if len(records):
        return str(records["defense"].iloc[0])
    config = run.info.get("config", {})
    return str(run.info.get("run", {}).get("defense") or config.get("defense.name") or "unknown")


def seed_of(run: Run) -> str:
    """The run's seed as text; the run's name where no seed is recorded."""
    seed = run.info.get("run", {}).get("seed", run.info.get("config", {}).get("seed"))
    return run.name if seed is None else str(seed)


def last_round(run: Run) -> int:
    """The last round that has records; 0 if there are none."""
    return int(run.records["round"].max()) if len(run.records) else 0


def distinct_runs(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Runs to use and runs left out: one for each variation, defense and seed is used.

    Of several it is the one that got furthest, then the latest. Two runs with the same seed are not
    independent, so they may not both enter an interval over seeds.
    """
    best: dict[tuple[str, str, str], Run] = {}
    keys = varied_keys(runs)
    for run in runs:
        key = (variation_of(run, keys), defense_of(run), seed_of(run))
        if key not in best or _progress(run) >= _progress(best[key]):
            best[key] = run
    kept = [run for run in runs if any(run is other for other in best.values())]
    return kept, [run for run in runs if not any(run is other for other in kept)]


def _progress(run: Run) -> tuple[int, bool, str]:
    return last_round(run), bool(run.summary), str(run.info.get("run", {}).get("started", ""))


def pool(runs: Sequence[Run]) -> pd.DataFrame:
    """The records of all runs in one frame, with columns "run", "seed" and "variation" added."""
    keys = varied_keys(runs)
    frames = [
        run.records.assign(
            run=run.name, seed=seed_of(run), defense=defense_of(run), variation=variation_of(run, keys)
        )
        for run in runs
        if len(run.records)
    ]
    if frames:
        return pd.concat(frames, ignore_index=True)
    return pd.DataFrame(columns=[*(f.name for f in fields(AuditRecord)), "run", "seed", "variation"])


def numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that hold a finite number, epsilon excluded, plus one quantity "... bound" per extra bound.

    A record of quantity q with "bound-nats" in its extra gives a second row of quantity "q bound".
    """
    values = pd.to_numeric(frame["value"], errors="coerce")
    usable = (frame["status"] == "ok") & np.isfinite(values) & (frame["quantity"] != PRIVACY)
    rows: pd.DataFrame = frame[usable].assign(value=values[usable].astype(float))
    stated = {
        text: _number(content.get("bound-nats")) for text, content in parse_extras(rows["extra"]).items()
    }
    if all(math.isnan(bound) for bound in stated.values()):
        return rows
    bounds: pd.Series = rows["extra"].map(stated).astype(float)
    bounded = rows[bounds.notna()].assign(
        value=bounds.dropna(), unit="nats", kind="upper", low=np.nan, high=np.nan
    )
    bounded["quantity"] = bounded["quantity"] + BOUND
    both: pd.DataFrame = pd.concat([rows, bounded.astype(rows.dtypes.to_dict())], ignore_index=True)
    return both


def parse_extras(texts: pd.Series) -> dict[str, Mapping[str, Any]]:
    """Each distinct JSON text and its content; anything but a JSON object is empty."""
    parsed: dict[str, Mapping[str, Any]] = {}
    for text in texts.unique():
        try:
            content = json.loads(text)
        except (TypeError, ValueError):
            content = {}
        parsed[text] = content if isinstance(content, dict) else {}
    return parsed


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def per_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """One number per variation, defense, seed, quantity and observer.

    Pooled as the quantity asks for: mean over the last round that has it (accuracy), sum (time), else mean
    over all clients and rounds. Columns: KEYS, "unit", "kind", "value", "clients", "round" (the last used).
    """
    pieces = [
        used.groupby(KEYS, as_index=False).agg(
            unit=("unit", "first"),
            kind=("kind", "first"),
            value=("value", "sum" if pooling == "sum" else "mean"),
            clients=("client_id", "nunique"),
            round=("round", "max"),
        )
        for pooling, used in _by_pooling(rows)
    ]
    if not pieces:
        return pd.DataFrame(columns=[*KEYS, "unit", "kind", "value", "clients", "round"])
    return pd.concat(pieces, ignore_index=True)


def per_client(rows: pd.DataFrame) -> pd.DataFrame:
    """What `per_seed` averages, by client: columns KEYS, "client_id" (may be missing), "sum" and "count"."""
    pieces = []
    for pooling, used in _by_pooling(rows):
        grouped = used.groupby([*KEYS, "client_id"], dropna=False, as_index=False)
        piece = grouped.agg(sum=("value", "sum"), count=("value", "size"))
        pieces.append(piece.assign(count=1) if pooling == "sum" else piece)
    if not pieces:
        return pd.DataFrame(columns=[*KEYS, "client_id", "sum", "count"])
    return pd.concat(pieces, ignore_index=True)


def _by_pooling(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows that are pooled in one way, those of earlier rounds aside where only the last counts."""
    poolings = {name: describe(name).pooling for name in rows["quantity"].unique()}
    for pooling, part in rows.groupby(rows["quantity"].map(poolings)):
        if pooling == "last":
            part = part[part["round"] == part.groupby(KEYS)["round"].transform("max")]
        yield str(pooling), part


def over_seeds(values: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % half-width over seeds of a `per_seed` frame, in reading order.

    Columns: GROUP, "unit", "kind", "mean", "half_width", "seeds", "clients", "round".
    """
    rows = []
    for group, part in values.groupby(GROUP):
        mean, half, n = t_interval(part["value"].to_list())
        first = part.iloc[0]
        clients, last = int(part["clients"].max()), int(part["round"].max())
        rows.append((*group, first["unit"], first["kind"], mean, half, n, clients, last))
    columns = [*GROUP, "unit", "kind", "mean", "half_width", "seeds", "clients", "round"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values("quantity", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def quantities_in(rows: pd.DataFrame) -> list[str]:
    """Names of the quantities in a frame, in reading order."""
    return sorted(map(str, rows["quantity"].unique()), key=order)


def defenses_in(runs: Sequence[Run]) -> list[str]:
    """The defenses of the runs: "none" first, the others in the order given."""
    names = list(dict.fromkeys(defense_of(run) for run in runs))
    return sorted(names, key=lambda name: name != "none")


def shown_observer(rows: pd.DataFrame, quantity: str) -> str:
    """The observer whose numbers of `quantity` are compared: the first of OBSERVERS that every defense has.

    Numbers of different observers are different quantities, so one is used for all defenses; only if
    none is common to all, the first of those that most defenses have.
    """
    part = rows[rows["quantity"] == quantity]
    having = {str(name): int(n) for name, n in part.groupby("observer")["defense"].nunique().items()}
    ranked = [*(name for name in OBSERVERS if name in having), *sorted(set(having) - set(OBSERVERS))]
    most = max(having.values(), default=0)
    return next((name for name in ranked if having[name] == most), "")
