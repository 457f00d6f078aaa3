"""Runs to tables: one row per defense, differences to a baseline paired by seed, a summary of one run."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import pandas as pd

from fedaudit.claims import VERIFY
from fedaudit.report.evidence import Evidence, Runs, gather
from fedaudit.report.guarantees import worst_epsilon
from fedaudit.report.quantities import describe
from fedaudit.report.resampling import bootstrap_interval
from fedaudit.report.seeds import (
    last_round,
    numbers,
    parse_extras,
    quantities_in,
    shown_observer,
    t_interval,
)
from fedaudit.report.variations import values_of

TIME = "round-seconds"
SHOWN_CLIENTS = 5


def comparison_table(runs: Runs) -> pd.DataFrame:
    """One row per variation and defense: utility, leakage, attack success, formal epsilon, time.

    First a column for every varied key, "train.batch-size", then "defense". For every headline quantity q:
    "q" (mean over seeds), "q ±" (half-width of the Student-t 95 % interval over seeds, NaN for one seed),
    "q low" and "q high" (95 % bootstrap over seeds and clients, see `resampling` for what it covers with few
    seeds), "q unit" and "q observer"; the observer is the first of oracle, client, server that all defenses
    have. Then "epsilon", "delta", "privacy-unit", "accountant" and "adversary" of the worst client over all
    seeds, "guarantee" (the five as text), "seconds", "seconds ±", "rounds" and "seeds". A measure that is new
    to the report is a headline quantity, and so is what `compare.against` names.

    The intervals cover the choice of seed only: not other data, models or settings.

    Args:
        runs: runs that differ by variation, defense and seed; of two with all three alike one is used.

    Returns:
        The table; no rows if there are no runs.
    """
    evidence = gather(runs)
    rows = evidence.rows
    names = [q for q in quantities_in(rows) if describe(q).headline or q in evidence.against]
    headline = ["accuracy", *(name for name in names if name != "accuracy")]
    observers = {quantity: shown_observer(rows, quantity) for quantity in headline}
    table = []
    for part in evidence.variations.values():
        for defense, its_runs in part.by_defense.items():
            row: dict[str, Any] = values_of(its_runs[0], evidence.varied) | {"defense": defense}
            table.append(row | _measured(part, defense, headline, observers))
    return pd.DataFrame(table)


def _measured(
    evidence: Evidence, defense: str, headline: Sequence[str], observers: Mapping[str, str]
) -> dict[str, Any]:
    """What one variation shows of one defense."""
    mine = evidence.means[evidence.means["defense"] == defense]
    row: dict[str, Any] = {}
    for quantity in headline:
        row |= _cells(mine[mine["quantity"] == quantity], quantity, observers[quantity])
    worst = evidence.guarantees[defense]
    time = mine[mine["quantity"] == TIME]
    its_runs = evidence.by_defense[defense]
    return row | {
        "epsilon": math.nan if worst.epsilon is None else worst.epsilon,
        "delta": math.nan if worst.delta is None else worst.delta,
        "privacy-unit": worst.unit or "",
        "accountant": worst.accountant or "",
        "adversary": worst.adversary or ("" if worst.epsilon is None else "anyone"),
        "guarantee": str(worst),
        "seconds": float(time["mean"].iloc[0]) if len(time) else math.nan,
        "seconds ±": float(time["half_width"].iloc[0]) if len(time) else math.nan,
        "rounds": min(last_round(run) for run in its_runs),
        "seeds": len(its_runs),
    }


def _cells(means: pd.DataFrame, quantity: str, observer: str) -> dict[str, Any]:
    chosen = means[means["observer"] == observer]
    if not len(chosen):  # no observer is common to all defenses: show whose number there is
        chosen = means.head(1)
    cell = chosen.iloc[0] if len(chosen) else None
    return {
        quantity: math.nan if cell is None else float(cell["mean"]),
        f"{quantity} ±": math.nan if cell is None else float(cell["half_width"]),
        f"{quantity} low": math.nan if cell is None else float(cell["low"]),
        f"{quantity} high": math.nan if cell is None else float(cell["high"]),
        f"{quantity} unit": "" if cell is None else str(cell["unit"]),
        f"{quantity} observer": "" if cell is None else str(cell["observer"]),
    }


def paired_differences(runs: Runs, baseline: str = "none") -> pd.DataFrame:
    """Each defense minus the baseline, paired by seed, for every quantity and observer both have.

    d_s = value(defense, seed s) - value(baseline, seed s) under the same variation; the row gives their mean
    and Student-t 95 % interval over the n common seeds. Pairing removes what a seed changes for both: data
    split and initial weights. With two seeds the t factor is 12.7 and the interval wide; with one there is
    none. The bootstrap interval draws seeds, and clients within them, for both defenses at once.

    Args:
        runs: runs that differ by variation, defense and seed.
        baseline: the defense to subtract, as written in the records.

    Returns:
        A column for every varied key, then "defense", "baseline", "quantity", "observer", "unit",
        "baseline_mean", "defense_mean", "difference", "half_width", "low", "high", "bootstrap_low",
        "bootstrap_high", "seeds"; no rows if there is nothing to pair.

    Raises:
        ValueError: if there are runs but none with the baseline.
    """
    evidence = gather(runs)
    defenses = evidence.defenses
    if defenses and baseline not in defenses:
        raise ValueError(
            f"the baseline must be one of the runs' defenses, got {baseline!r}: "
            f"choose from {', '.join(defenses)}"
        )
    columns = [
        *("defense", "baseline", "quantity", "observer", "unit", "baseline_mean", "defense_mean"),
        *("difference", "half_width", "low", "high", "bootstrap_low", "bootstrap_high", "seeds"),
    ]
    rows = [
        (*values_of(part.runs[0], evidence.varied).values(), *row)
        for part in evidence.variations.values()
        for row in _paired(part, baseline)
    ]
    return pd.DataFrame(rows, columns=[*evidence.varied, *columns])


def _paired(evidence: Evidence, baseline: str) -> Iterator[tuple[Any, ...]]:
    """The rows of `paired_differences` of one variation."""
    both = _beside(evidence.values, baseline, "value", how="inner")
    clients = _beside(evidence.by_client, baseline, "sum", "count", how="outer")
    cells = dict(list(clients.groupby(["defense", "quantity", "observer"])))
    for defense in evidence.defenses:
        mine = both[both["defense"] == defense]
        for quantity in quantities_in(mine):
            for observer, part in mine[mine["quantity"] == quantity].groupby("observer"):
                difference, half, n = t_interval((part["value"] - part["value_base"]).to_list())
                means = part["value_base"].mean(), part["value"].mean()
                ends = difference, half, difference - half, difference + half
                pairs = cells[defense, quantity, observer]
                drawn = bootstrap_interval(
                    [
                        pairs.loc[
                            pairs["seed"] == seed, ["sum", "count", "sum_base", "count_base"]
                        ].to_numpy()
                        for seed in part["seed"]
                    ]
                )
                yield defense, baseline, quantity, observer, part["unit"].iloc[0], *means, *ends, *drawn, n


def _beside(frame: pd.DataFrame, baseline: str, *names: str, how: Literal["inner", "outer"]) -> pd.DataFrame:
    """Every other defense's rows with the baseline's columns of these names beside them, "_base" added."""
    paired = [name for name in ("seed", "quantity", "observer", "client_id") if name in frame]
    ours = frame.loc[frame["defense"] == baseline, [*paired, *names]]
    found = [
        others.merge(ours, on=paired, suffixes=("", "_base"), how=how).assign(defense=defense)
        for defense, others in frame[frame["defense"] != baseline].groupby("defense")
    ]
    columns = [*frame.columns, *(f"{name}_base" for name in names)]
    joined = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)
    numbers = [*names, *(f"{name}_base" for name in names)]
    return joined.assign(**{name: joined[name].astype(float).fillna(0.0) for name in numbers})


def all_quantities(runs: Runs) -> pd.DataFrame:
    """Every quantity by every observer, one row each per variation and defense: see `Evidence.means`."""
    return gather(runs).means


def problems(runs: Runs) -> pd.DataFrame:
    """What did not become a number, by status, quantity, observer, defense and reason, most frequent first.

    Columns "status", "quantity", "observer", "defense", "reason", "count", "clients" (how many),
    "first" (a few client ids), "rounds" (from-to).
    """
    evidence = gather(runs)
    pooled = evidence.pooled
    rows = pooled[pooled["status"] != "ok"]
    keys = ["status", "quantity", "observer", "defense", "reason"]
    rounds = rows["round"].astype("int64")
    groups = rows.assign(low=rounds, high=rounds).groupby(keys, dropna=False)
    found = groups.agg(
        count=("run_id", "size"), clients=("client_id", "nunique"), low=("low", "min"), high=("high", "max")
    )
    ids = rows[[*keys, "client_id"]].dropna(subset="client_id").drop_duplicates().sort_values("client_id")
    few = ids[ids.groupby(keys, dropna=False).cumcount() < SHOWN_CLIENTS]
    written = (
        few.assign(first=few["client_id"].astype(str)).groupby(keys, dropna=False)["first"].agg(", ".join)
    )
    frame = found.join(written).reset_index().fillna({"first": ""})
    frame.loc[frame["clients"] > SHOWN_CLIENTS, "first"] += ", …"
    low, high = frame["low"].astype(str), frame["high"].astype(str)
    frame["rounds"] = low.where(low == high, low + "–" + high)
    frame = frame[[*keys, "count", "clients", "first", "rounds"]]
    frame = _in_order(frame, evidence.defenses)
    return frame.sort_values(["status", "count"], ascending=[True, False], kind="stable", ignore_index=True)


def settings(runs: Runs) -> pd.DataFrame:
    """What the numbers were computed with: each key of the extras, by quantity, observer and defense.

    Columns "quantity", "observer", "defense", "rows", "settings": a mapping from key to its value, to
    "low – high" for numbers that vary, or to the few distinct texts.
    """
    evidence = gather(runs)
    pooled = evidence.pooled
    rows = pooled[(pooled["status"] == "ok") & ~pooled["extra"].isin(["{}", ""])]
    table = []
    for (quantity, observer, defense), part in rows.groupby(["quantity", "observer", "defense"]):
        found: dict[str, list[Any]] = {}
        for content in parse_extras(part["extra"]).values():
            for key, value in content.items():
                found.setdefault(str(key), []).append(value)
        words = {key: _range(values) for key, values in sorted(found.items())}
        table.append((quantity, observer, defense, len(part), words))
    frame = pd.DataFrame(table, columns=["quantity", "observer", "defense", "rows", "settings"])
    frame = _in_order(frame, evidence.defenses)
    places = {name: place for place, name in enumerate(quantities_in(frame))}
    return frame.sort_values(
        "quantity", key=lambda names: names.map(places), kind="stable", ignore_index=True
    )


def _in_order(frame: pd.DataFrame, defenses: Sequence[str]) -> pd.DataFrame:
    """Rows by the defense's place among all, otherwise as they were."""
    places = {name: place for place, name in enumerate(defenses)}
    return frame.sort_values("defense", key=lambda names: names.map(places), kind="stable")


def _range(values: Sequence[Any]) -> str:
    plain = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    if len(plain) == len(values):
        low, high = min(plain), max(plain)
        return f"{low:.4g}" if math.isclose(low, high) else f"{low:.3g} – {high:.3g}"
    texts = list(dict.fromkeys(str(v).lower() if isinstance(v, bool) else str(v) for v in values))
    return ", ".join(texts[:4]) + (f" and {len(texts) - 4} more" if len(texts) > 4 else "")


def records_summary(records: pd.DataFrame) -> dict[str, Any]:
    """One run's records in short, for summary.json; kebab-case keys, plain values.

    Returns:
        "rounds" (last one), "records", "status" (counts), "accuracy" (last value and its round, or None),
        "quantities" (by name and observer: mean, min, max, count, clients, unit, kind), "claims" (how many
        tests found them to hold, violated, or not to be checked), "epsilon" (the worst client's with delta,
        unit, accountant and client; None without a guarantee) and "seconds".
    """
    tested = records["quantity"].astype(str).str.startswith(VERIFY)
    rows = numbers(records[records["layer"].isna() & ~tested])
    verdicts = records.loc[tested, "status"].value_counts()
    accuracy = rows[rows["quantity"] == "accuracy"].sort_values("round", kind="stable")
    quantities: dict[str, dict[str, Any]] = {}
    for quantity in quantities_in(rows):
        for observer, part in rows[rows["quantity"] == quantity].groupby("observer"):
            quantities.setdefault(quantity, {})[str(observer)] = _spread(part)
    worst = worst_epsilon(records)
    return {
        "rounds": int(records["round"].max()) if len(records) else 0,
        "records": len(records),
        "status": {str(name): int(n) for name, n in records["status"].value_counts().sort_index().items()},
        "accuracy": _last(accuracy),
        "quantities": quantities,
        "claims": {
            name: int(verdicts.get(status, 0))
            for name, status in (("holds", "ok"), ("violated", "violated"), ("unchecked", "skipped"))
        },
        "epsilon": None
        if worst.epsilon is None
        else {
            "worst": worst.epsilon,
            "delta": worst.delta,
            "unit": worst.unit,
            "accountant": worst.accountant,
            "adversary": worst.adversary or "anyone",
            "client": worst.client_id,
            "clients-without": max(0, worst.clients - worst.covered),
        },
        "seconds": float(rows.loc[rows["quantity"] == TIME, "value"].sum()),
    }


def _last(rows: pd.DataFrame) -> Mapping[str, Any] | None:
    if not len(rows):
        return None
    return {"value": float(rows["value"].iloc[-1]), "round": int(rows["round"].iloc[-1])}


def _spread(part: pd.DataFrame) -> dict[str, Any]:
    return {
        "mean": float(part["value"].mean()),
        "min": float(part["value"].min()),
        "max": float(part["value"].max()),
        "count": len(part),
        "clients": int(part["client_id"].nunique()),
        "unit": str(part["unit"].iloc[0]),
        "kind": str(part["kind"].iloc[0]),
    }
