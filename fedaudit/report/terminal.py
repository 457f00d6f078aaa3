"""The comparison table for a terminal and for Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from fedaudit.report.display import headline, plus_minus
from fedaudit.report.quantities import describe

INTERVALS = "mean ± half-width of the Student-t 95 % interval over seeds; one seed has no interval"
SHORT = {
    "accuracy": "Acc.",
    "mutual-information": "MI",
    "example-gradient-uniqueness": "GNQ",
    "example-gradient-uniqueness bound": "GNQ\nbound",
    "cohort-gradient-uniqueness": "cohort\nGNQ",
    "psnr": "PSNR",
}


def rich_table(comparison: pd.DataFrame, title: str = "Comparison of defenses") -> Table:
    """A `tables.comparison_table` as a rich table: one row per defense, one column per quantity.

    A heading says the quantity, its unit and who observed it; a value's interval stands below it. The usual
    columns fit 80 characters.
    """
    if not len(comparison):
        table = Table(title=escape(title))
        table.add_row("There are no runs to compare.")
        return table
    counts = f"rounds {_range(comparison['rounds'])}, seeds {_range(comparison['seeds'])}"
    table = Table(
        title=escape(f"{title} ({counts})"), caption=INTERVALS, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.title_justify = "left"
    table.add_column("Defense", style="bold", overflow="fold", max_width=17)
    names = headline(comparison)
    for name in names:
        table.add_column(escape(_heading(comparison, name)), justify="right", overflow="fold")
    table.add_column("ε of worst\nclient", justify="right", overflow="fold")
    table.add_column("Time\n[s]", justify="right")
    for _, row in comparison.iterrows():
        cells = [_value(row[name], row[f"{name} ±"]) for name in names]
        guarantee = str(row["guarantee"]).replace(" (", "\n").replace(", ", "\n").replace(")", "")
        cells += [guarantee.replace("formal ", "formal\n"), _value(row["seconds"], row["seconds ±"])]
        table.add_row(escape(str(row["defense"])), *map(escape, cells), end_section=True)
    return table


def _heading(comparison: pd.DataFrame, name: str) -> str:
    owner, _, score = name.partition(".")
    short = SHORT.get(name) or (
        f"{owner.upper()}\n{SHORT.get(score, score)}" if score else describe(name).label
    )
    unit = next((u for u in comparison[f"{name} unit"] if u and u != "1"), "")
    observers = "/".join(o for o in dict.fromkeys(comparison[f"{name} observer"]) if o)
    return "\n".join(filter(None, (short, f"[{unit}]" if unit else "", observers)))


def _value(mean: float, half: float) -> str:
    return plus_minus(mean, half).replace(" ± ", "\n±")


def _range(numbers: pd.Series) -> str:  # type: ignore[type-arg, unused-ignore]
    low, high = numbers.min(), numbers.max()
    return f"{low}" if low == high else f"{low} to {high}"


def to_markdown(frame: pd.DataFrame) -> str:
    r"""A frame of text or numbers as a GitHub table; pipes and line breaks inside cells are escaped.

    >>> print(to_markdown(pd.DataFrame({"a": [1], "b|c": ["x|y"]})))
    | a | b\|c |
    | --- | --- |
    | 1 | x\|y |
    """
    heading = [_cell(name) for name in frame.columns]
    rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def trials_table(trials: Sequence[Mapping[str, Any]], best: str) -> Table:
    """The trials of a search as a rich table, in their order; the best one is marked.

    Args:
        trials: rows of `fedaudit.studies.tuning.Trial.row`, at least one.
        best: the best trial's defense.
    """
    table = Table(title=f"Search over {len(trials)} settings", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_justify = "left"
    names = [name for name in ("lr", "clip", "batch-size") if name in trials[0]]
    for name in (*names, "Acc.\nvalidation", "per seed", "ε of worst\nclient", "Time\n[s]"):
        table.add_column(name, justify="right", overflow="fold")
    for trial in trials:
        cells = [f"{trial[name]:g}" for name in names]
        epsilon = "none" if trial["epsilon"] is None else f"{trial['epsilon']:.3g}"
        if trial["reason"]:
            cells += ["failed", str(trial["reason"]), "", f"{trial['seconds']:.1f}"]
        else:
            cells += [f"{trial['validation-accuracy']:.4f}", trial["per-seed"], epsilon]
            cells.append(f"{trial['seconds']:.1f}")
        style = "bold" if trial["defense"] == best and not trial["reason"] else None
        table.add_row(*map(escape, cells), style=style)
    return table
