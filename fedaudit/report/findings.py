"""The key findings as sentences, every word of judgement decided by the numbers."""

import math
from collections.abc import Mapping

import pandas as pd

from fedaudit.report.display import count, headline, interval, listing, number, plus_minus, signed
from fedaudit.report.evidence import Runs, gather
from fedaudit.report.guarantees import NO_GUARANTEE, WorstEpsilon
from fedaudit.report.quantities import describe
from fedaudit.report.seeds import quantities_in, shown_observer
from fedaudit.report.tables import comparison_table, paired_differences
from fedaudit.report.verification import sentences as claims_told

MAX_TOLD = 4
"""Defenses whose intervals are told in a sentence; more are sorted by what the intervals say."""


def findings(runs: Runs, baseline: str | None = None) -> list[str]:
    """What these runs show, one sentence or two each, as plain text.

    Whether a defense "lowers" a quantity is said only if the interval of the paired difference excludes
    zero; with one seed the direction is told with a warning.

    Args:
        runs: runs that differ by defense and seed.
        baseline: the defense to compare with; "none" if it is there, else the first.
    """
    evidence = gather(runs)
    rows = evidence.rows
    sentences = claims_told(evidence)
    if not len(evidence.pooled):
        return sentences or ["The runs hold no records yet."]
    table = comparison_table(evidence)
    differences = paired_differences(evidence, baseline or evidence.baseline)
    if not (differences["quantity"] == "accuracy").any():
        sentences += _accuracies(table)
    for quantity in headline(table):
        observer = shown_observer(rows, quantity)
        part = differences[(differences["quantity"] == quantity) & (differences["observer"] == observer)]
        if len(part):
            sentences.append(_difference(part.iloc[0]) if len(part) == 1 else _differences(part))
    if not len(differences):
        sentences += _levels(table)
    sentences += _exposed(rows)
    sentences += _attacks(rows)
    sentences += _guarantees(evidence.guarantees)
    sentences += _complete(evidence.pooled)
    return sentences


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


def _differences(part: pd.DataFrame) -> str:
    """One quantity under several defenses, and which of them do not protect by it."""
    first = part.iloc[0]
    known = describe(first["quantity"])
    unit = "" if first["unit"] in ("1", "") else f" {first['unit']}"
    name = known.label if known.role == "utility" else f"{known.label} ({first['observer']})"
    told: list[str] = []
    failing: list[str] = []
    by_verdict: dict[str, list[str]] = {}
    for _, row in part.iterrows():
        verdict = reading(row["difference"], row["half_width"], int(row["seeds"]))
        words = f"{signed(row['difference'])}, {_ends(row)}: {verdict}"
        if not told:
            words = f"{signed(row['difference'])} paired by seed, 95 % interval {_ends(row)}: {verdict}"
        if math.isnan(row["low"]):
            words = f"{signed(row['difference'])}, {verdict}"
        told.append(f"{number(row['defense_mean'])} under {row['defense']} ({words})")
        by_verdict.setdefault(verdict, []).append(f"{row['defense']} ({number(row['defense_mean'])})")
        favourable = "higher" if known.wanted > 0 else "lower"
        if known.role in ("leakage", "attack") and known.wanted and not verdict.startswith(favourable):
            failing.append(str(row["defense"]))
    tail = f" Not shown to protect by this measure: {listing(failing)}." if failing else ""
    start = f"{name}: {number(first['baseline_mean'])}{unit} under {first['baseline']}"
    if len(part) > MAX_TOLD:  # the intervals are in the table of differences
        words = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in by_verdict.items())
        words = words.replace("; one seed, no interval", " (one seed, no interval)")
        return f"{start}. By the differences paired by seed and their 95 % intervals, {words}.{tail}"
    return f"{start}; {'; '.join(told)}.{tail}"


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
    unit = "" if part["unit"].iloc[0] == "1" else f" {part['unit'].iloc[0]}"
    told = []
    shown = list(dict.fromkeys(part["defense"]))[:MAX_TOLD]
    for defense, mine in part[part["defense"].isin(shown)].groupby("defense", sort=False):
        means = mine.groupby(["seed", "client_id"])["value"].mean()
        if len(means) >= 3:
            seed, client = means.index[int(means.to_numpy().argmax())]
            middle = number(means.median())
            told.append(
                f"under {defense} client {client} of seed {seed} with {number(means.max())}{unit} "
                f"(median client: {middle}{unit})"
            )
    label = _lower(describe(names[0]).label)
    rest = part["defense"].nunique() - len(shown)
    more = f" (and {rest} more defenses)" if rest else ""
    start = f"Most exposed by {label} ({observer}), mean over rounds"
    return [f"{start}: {'; '.join(told)}{more}."] if told else []


def _attacks(rows: pd.DataFrame) -> list[str]:
    sentences = []
    scores = rows[rows["quantity"].str.endswith(".psnr")]
    for quantity, part in scores.groupby("quantity", sort=False):
        told = []
        for defense, mine in part.groupby("defense", sort=False):
            best = mine.iloc[int(mine["value"].to_numpy().argmax())]
            whose = "" if pd.isna(best["client_id"]) else f"client {best['client_id']}, "
            told.append(
                f"{number(best['value'])} dB under {defense} ({whose}round {best['round']}, "
                f"seed {best['seed']}; {count(len(mine), 'attacked update')})"
            )
        attack = str(quantity).removesuffix(".psnr").upper()
        sentences.append(f"Best {attack} reconstruction: {'; '.join(told)}.")
    return sentences


def _guarantees(guarantees: Mapping[str, WorstEpsilon]) -> list[str]:
    without, told, sentences = [], [], []
    for defense, worst in guarantees.items():
        if worst.epsilon is None:
            without.append(defense)
        elif math.isinf(worst.epsilon):
            sentences.append(f"{defense} has {worst}: some client trained without noise.")
        else:
            whose = "" if worst.client_id is None else f", client {worst.client_id}"
            told.append(f"{defense}: ε = {worst}{whose}")
    if told:
        sentences.append(
            f"Formal guarantee of the worst client: {'; '.join(told)}. It limits what any adversary can "
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
