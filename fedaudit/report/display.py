"""Numbers and tables as people read them: the same text in the terminal, in Markdown and in the report."""

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from fedaudit.config.vary import label
from fedaudit.report.quantities import describe, with_unit

NOTHING = "–"


def number(value: float | None, decimals: int | None = None) -> str:
    """A number with about three significant digits, or with `decimals`; a dash if there is none.

    >>> [number(v) for v in (0.98765, 12.345, 1234.5, 2.5e6, 0.00012, float("nan"))]
    ['0.988', '12.3', '1,234', '2.50e6', '1.20e-4', '–']
    """
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if decimals is None:
        if size and (size < 1e-3 or size >= 1e5):
            mantissa, exponent = f"{value:.2e}".split("e")
            return _minus(f"{mantissa}e{int(exponent)}")
        decimals = digits_for(size)
    return _minus(f"{value:,.{decimals}f}")


def digits_for(size: float) -> int:
    """Decimals that show about three significant digits of a number of this size."""
    if size == 0:
        return 2
    return min(5, max(0, 2 - math.floor(math.log10(abs(size))))) if size < 100 else 0


def plus_minus(mean: float, half: float) -> str:
    """Mean and half-width to the same decimals; the mean alone if there is no half-width.

    >>> plus_minus(0.9312, 0.0123)
    '0.931 ± 0.012'
    """
    if math.isnan(mean) or math.isnan(half):
        return number(mean)
    if abs(mean) >= 1e5 or 0 < abs(mean) < 1e-3:
        return f"{number(mean)} ± {number(half)}"
    decimals = digits_for(max(abs(mean), 1e-3))
    if half and round(half, decimals) == 0:  # a half-width of "0.00" would read as certainty
        decimals = min(5, decimals + 2)
    return f"{number(mean, decimals)} ± {number(half, decimals)}"


def signed(value: float, decimals: int | None = None) -> str:
    """A difference with its sign."""
    text = number(value, decimals)
    return f"+{text}" if value > 0 else text


def interval(low: float, high: float) -> str:
    """Both ends of an interval to the same decimals, with their signs.

    >>> interval(-0.186, -0.0897)
    '−0.186 to −0.090'
    """
    if math.isnan(low) or math.isnan(high):
        return NOTHING
    size = max(abs(low), abs(high))
    decimals = digits_for(size) if 1e-3 <= size < 1e5 else None
    return f"{signed(low, decimals)} to {signed(high, decimals)}"


def count(n: int, noun: str) -> str:
    """A number and its noun.

    >>> count(1, "seed"), count(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def comparison_text(table: pd.DataFrame) -> pd.DataFrame:
    """A `comparison_table` as text: one column per quantity, headed by label, unit and observer.

    Columns of varied keys that have one value only are left out.
    """
    columns: dict[str, list[str]] = {
        key: table[key].tolist() for key in varied(table) if table[key].nunique() > 1
    }
    columns["Defense"] = table["defense"].tolist() if len(table) else []
    for name in headline(table):
        unit = next((u for u in table[f"{name} unit"] if u), "1")
        observers = [o for o in dict.fromkeys(table[f"{name} observer"]) if o]
        words = describe(name).label
        shared = len(observers) == 1
        heading = with_unit(f"{words} ({observers[0]})" if shared else words, unit)
        cells = []
        for _, row in table.iterrows():
            text = plus_minus(row[name], row[f"{name} ±"])
            cells.append(text if shared or text == NOTHING else f"{text} ({row[f'{name} observer']})")
        columns[heading] = cells
    if len(table):
        columns["ε of the worst client"] = table["guarantee"].tolist()
        columns["Time [s]"] = [
            plus_minus(s, h) for s, h in zip(table["seconds"], table["seconds ±"], strict=True)
        ]
        columns["Rounds"] = [str(n) for n in table["rounds"]]
        columns["Seeds"] = [str(n) for n in table["seeds"]]
    return pd.DataFrame(columns)


def varied(table: pd.DataFrame) -> list[str]:
    """The varied keys of a `comparison_table` or of `paired_differences`: what stands before the defense."""
    names = [str(name) for name in table.columns]
    return names[: names.index("defense")] if "defense" in names else []


def by_variation(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each variation's label and rows; the whole table under "" if nothing was varied."""
    keys = varied(table)
    if not len(table):
        return
    if not keys:
        yield "", table
        return
    for values, part in table.groupby(keys, sort=False):
        yield label(dict(zip(keys, values, strict=True))), part


def headline(table: pd.DataFrame) -> list[str]:
    """The quantities of a `comparison_table`, in its order."""
    return [str(name).removesuffix(" unit") for name in table.columns if str(name).endswith(" unit")]


def listing(values: list[Any], limit: int = 6) -> str:
    """Values separated by commas, the rest counted.

    >>> listing([1, 2, 3], limit=2)
    '1, 2 and 1 more'
    """
    shown = ", ".join(map(str, values[:limit]))
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"


def _minus(text: str) -> str:
    return text.replace("-", "−", 1) if text.startswith("-") else text
