"""The key findings as sentences, every word of judgement decided by the numbers."""

import math
from collections.abc import Sequence

import pandas as pd

from fedaudit.records import Run
from fedaudit.report.display import count, headline, interval, listing, number, plus_minus, signed
from fedaudit.report.guarantees import NO_GUARANTEE, worst_epsilon
from fedaudit.report.quantities import describe
from fedaudit.report.seeds import defenses_in, distinct_runs, numbers, pool, quantities_in, shown_observer
from fedaudit.report.tables import comparison_table, paired_differences


def findings(runs: Sequence[Run], baseline: str | None = None) -> list[str]:
    """What these runs show, one sentence or two each, as plain text.

    Whether a defense "lowers" a quantity is said only if the interval of the paired difference excludes
    zero; with one seed the direction is told with a warning.

    Args:
        runs: runs that differ by defense and seed.
        baseline: the defense to compare with; "none" if it is there, else the first.
    """
    kept, _ = distinct_runs(runs)
    pooled = pool(kept)
    rows = numbers(pooled)
    if not len(pooled):
        return ["The runs hold no records yet."]
    table = comparison_table(kept)
    reference = baseline or baseline_of(kept)
    sentences = [*_accuracies(table)]
    differences = paired_differences(kept, reference)
    for quantity in headline(table):
        observer = shown_observer(rows, quantity)
        part = differences[(differences["quantity"] == quantity) & (differences["observer"] == observer)]
        sentences += [_difference(row) for _, row in part.iterrows()]
    if not len(differences):
        sentences += _levels(table)
    sentences += _exposed(rows)
    sentences += _attacks(rows)
    sentences += _guarantees(pooled, defenses_in(kept))
    sentences += _complete(pooled)
    return sentences


def baseline_of(runs: Sequence[Run]) -> str:
    """The defense the others are compared with: "none" if it is there, else the first; "" without runs."""
    return next(iter(defenses_in(runs)), "")


def reading(difference: float, half_width: float, seeds: int) -> str:
    """What a paired difference allows to say: lower, higher, not distinguishable, or one seed.

    >>> reading(-0.5, 0.2, 3), reading(-0.5, 0.7, 3), reading(-0.5, float("nan"), 1)
    ('lower', 'interval includes 0', 'lower; one seed, no interval')
    """
    direction = "lower" if difference < 0 else "higher" if difference > 0 else "equal"
    if seeds < 2 or math.isnan(half_width):
        return f"{direction}; one seed, no interval"
    return direction if abs(difference) > half_width or not difference else "interval includes 0"


def _accuracies(table: pd.DataFrame) -> list[str]:
    known = table[table["accuracy"].notna()]
    if not len(known):
        return ["No accuracy was recorded."]
    parts = [
        f"{plus_minus(row['accuracy'], row['accuracy ±'])} under {row['defense']}"
        for _, row in known.iterrows()
    ]
    seeds = sorted(set(known["seeds"]))
    over = " to ".join(dict.fromkeys(str(n) for n in (seeds[0], seeds[-1])))
    noun = "seed" if seeds == [1] else "seeds"
    kind = "no interval" if seeds == [1] else "mean ± half-width of the 95 % interval"
    return [f"Accuracy of the last evaluated round: {'; '.join(parts)} ({over} {noun}, {kind})."]


def _difference(row: pd.Series) -> str:
    known = describe(row["quantity"])
    defense, baseline, n = row["defense"], row["baseline"], int(row["seeds"])
    name = f"{_lower(known.label)} ({row['observer']})" if known.role != "utility" else _lower(known.label)
    unit = "" if row["unit"] in ("1", "") else f" {row['unit']}"
    move = f"{number(row['baseline_mean'])} to {number(row['defense_mean'])}{unit}"
    change = f"{signed(row['difference'])}{unit}"
    verdict = reading(row["difference"], row["half_width"], n)
    if verdict == "equal" or row["difference"] == 0:
        return f"{defense} leaves {name} where it is under {baseline}: {move} ({count(n, 'seed')})."
    if verdict == "interval includes 0":
        protects = known.role in ("leakage", "attack") and known.wanted
        verb = ("raises" if known.wanted > 0 else "lowers") if protects else "changes"
        return (
            f"These runs do not show that {defense} {verb} {name}: {move}, paired difference {change}, and "
            f"its 95 % interval {_ends(row)} includes zero ({count(n, 'seed')})."
        )
    lowered = row["difference"] < 0
    verb = "lowers" if lowered else "raises"
    against = known.wanted and (lowered == (known.wanted > 0)) and known.role in ("leakage", "attack")
    tail = " By this measure it does not protect." if against else ""
    if n < 2:
        return (
            f"{name[:1].upper()}{name[1:]} is {'lower' if lowered else 'higher'} under {defense} than "
            f"under {baseline}: {move} ({change}). One seed: no interval, and chance is not ruled out.{tail}"
        )
    return (
        f"{defense} {verb} {name} from {move}: paired difference {change}, 95 % interval {_ends(row)}, "
        f"{count(n, 'seed')}.{tail}"
    )


def _ends(row: pd.Series) -> str:
    return interval(row["low"], row["high"])


def _levels(table: pd.DataFrame) -> list[str]:
    sentences = []
    for quantity in headline(table):
        if quantity == "accuracy":
            continue
        for _, row in table[table[quantity].notna()].iterrows():
            unit = row[f"{quantity} unit"]
            value = plus_minus(row[quantity], row[f"{quantity} ±"]) + (
                "" if unit in ("1", "") else f" {unit}"
            )
            label = f"{describe(quantity).label} ({row[f'{quantity} observer']})"
            sentences.append(f"{label} under {row['defense']}: {value}, mean over clients and rounds.")
    return sentences


def _exposed(rows: pd.DataFrame) -> list[str]:
    """Who leaks most, by the first per-client measure of leakage; silent for fewer than three clients."""
    own = rows[rows["client_id"].notna()]
    names = [q for q in quantities_in(own) if describe(q).role == "leakage" and describe(q).wanted < 0]
    if not names:
        return []
    observer = shown_observer(own, names[0])
    part = own[(own["quantity"] == names[0]) & (own["observer"] == observer)]
    sentences = []
    for defense, mine in part.groupby("defense", sort=False):
        means = mine.groupby(["seed", "client_id"])["value"].mean()
        if len(means) < 3:
            continue
        seed, client = means.index[int(means.to_numpy().argmax())]
        unit = "" if mine["unit"].iloc[0] == "1" else f" {mine['unit'].iloc[0]}"
        sentences.append(
            f"Most exposed under {defense} by {_lower(describe(names[0]).label)} ({observer}): client "
            f"{client} of seed {seed} with {number(means.max())}{unit}; the median client has "
            f"{number(means.median())}{unit}."
        )
    return sentences


def _attacks(rows: pd.DataFrame) -> list[str]:
    sentences = []
    scores = rows[rows["quantity"].str.endswith(".psnr")]
    for (quantity, defense), mine in scores.groupby(["quantity", "defense"], sort=False):
        best = mine.iloc[int(mine["value"].to_numpy().argmax())]
        attack = str(quantity).removesuffix(".psnr").upper()
        whose = "" if pd.isna(best["client_id"]) else f"client {best['client_id']}, "
        sentences.append(
            f"The best {attack} reconstruction under {defense} reached {number(best['value'])} dB ({whose}"
            f"round {best['round']}, seed {best['seed']}; {count(len(mine), 'attacked update')})."
        )
    return sentences


def _guarantees(pooled: pd.DataFrame, defenses: Sequence[str]) -> list[str]:
    without, sentences = [], []
    for defense in defenses:
        worst = worst_epsilon(pooled[pooled["defense"] == defense])
        if worst.epsilon is None:
            without.append(defense)
        elif math.isinf(worst.epsilon):
            sentences.append(f"{defense} has {worst}: some client trained without noise.")
        else:
            whose = "the worst client" if worst.client_id is None else f"the worst client ({worst.client_id})"
            sentences.append(
                f"Formal guarantee of {defense} for {whose}: ε = {worst}. It limits what any adversary can "
                "learn about one unit's presence; the measured numbers are about the adversaries stated."
            )
    if without:
        sentences.append(f"{listing(without)}: {NO_GUARANTEE}, whatever the measured leakage.")
    return sentences


def _complete(pooled: pd.DataFrame) -> list[str]:
    counts = pooled["status"].value_counts()
    missing = [f"{counts[name]:,} {name}" for name in ("skipped", "failed", "rejected") if name in counts]
    total = len(pooled)
    if not missing:
        return [f"All {total:,} records hold a number: nothing was skipped, failed or rejected."]
    return [
        f"Of {total:,} records, {int(counts.get('ok', 0)):,} are ok; {', '.join(missing)}: reasons below."
    ]


def _lower(label: str) -> str:
    """A label inside a sentence: its first letter small unless it begins an abbreviation."""
    return label if label[1:2].isupper() else label[:1].lower() + label[1:]
