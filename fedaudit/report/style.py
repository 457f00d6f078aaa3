"""One look for all figures: colours, symbols, layout, and when an axis is logarithmic.

Colours are Okabe and Ito's, told apart by people with any colour vision; dashes and symbols repeat the
distinction for black-and-white print.
"""

import html
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from plotly.subplots import make_subplots

from fedaudit.report.quantities import describe

Figure = Any  # a plotly.graph_objects.Figure; plotly carries no type information
new_figure: Callable[..., Figure] = make_subplots

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
ENTRY, BELOW = 29, 62  # pixels: a line of the legend, and below a plot without one
INK, QUIET, RULE, GRID = "#1f2933", "#52606d", "#9aa5b1", "#e3e7eb"


def styles(defenses: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour, marker symbol and dash of each defense, the same in every figure of a page.

    When the colours begin again, symbols and dashes are shifted: 42 defenses have a pair of their own.
    """
    return {
        defense: {
            "colour": OKABE_ITO[i % len(OKABE_ITO)],
            "symbol": SYMBOLS[(i + i // len(OKABE_ITO)) % len(SYMBOLS)],
            "dash": DASHES[i % len(DASHES)],
        }
        for i, defense in enumerate(defenses)
    }


def only(rows: pd.DataFrame, quantity: str, observer: str) -> pd.DataFrame:
    return rows[(rows["quantity"] == quantity) & (rows["observer"] == observer)]


def shown_defenses(part: pd.DataFrame, defenses: Sequence[str]) -> list[str]:
    """The defenses that have a row, in the page's order."""
    return [name for name in defenses if (part["defense"] == name).any()]


def is_wide(values: pd.Series) -> bool:
    """Whether all values are positive and their bulk spans more than two decades."""
    if not len(values) or float(values.min()) <= 0:
        return False
    low, high = values.quantile([0.02, 0.98])
    return bool(high / low > 100)


def unit_of(part: pd.DataFrame) -> str:
    """The unit of a quantity's rows."""
    return str(part["unit"].iloc[0]) if len(part) else "1"


def lay_out(
    figure: Figure,
    quantity: str,
    part: pd.DataFrame,
    note: str,
    legend: Sequence[str],
    height: int = 0,
) -> None:
    """Title, observer, kinds, legend and axes of a figure of one quantity."""
    kinds = ", ".join(dict.fromkeys(part["kind"]))
    observers = ", ".join(dict.fromkeys(part["observer"]))
    note = f"observer: {safe(observers)} · {safe(kinds)} · {note}"
    style_figure(figure, describe(quantity).label, note, legend, height or 330 + ENTRY * len(legend))


def style_figure(figure: Figure, title: str, note: str, legend: Sequence[str], height: int) -> None:
    """The common layout; the legend, if any, is below the plot and does not cover it."""
    size = {"family": FONT, "size": 13, "color": INK}
    figure.update_layout(
        template="none",
        title={
            "text": safe(title),
            "subtitle": {"text": note, "font": {"size": 12, "color": QUIET}},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 12, "l": 8},
            "font": {"size": 16, "color": INK, "weight": 600},
        },
        font=size,
        height=height,
        margin={"t": 72, "b": BELOW + ENTRY * len(legend), "l": 72, "r": 16},
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        hovermode="closest",
        showlegend=len(legend) > 0,
        legend={
            "x": 0,
            "xanchor": "left",
            "y": 0,
            "yref": "container",
            "yanchor": "bottom",
            "font": {"size": 12},
            "maxheight": max(30, ENTRY * len(legend) + 16),
        },
    )
    axis = {
        "showline": True,
        "linecolor": RULE,
        "tickcolor": RULE,
        "gridcolor": GRID,
        "zeroline": False,
        "ticks": "outside",
    }
    figure.update_xaxes(**axis, title={"standoff": 8, "font": {"size": 13}}, automargin=True)
    figure.update_yaxes(**axis, title={"standoff": 10, "font": {"size": 13}}, automargin=True)


def without_legend(figure: Figure) -> Figure:
    """The same figure without its legend and the room for it, where one key serves several figures."""
    room = int(figure.layout.margin.b) - BELOW
    return figure.update_layout(showlegend=False, margin_b=BELOW, height=int(figure.layout.height) - room)


def value_axis(values: pd.Series, label: str, length: int = 30) -> dict[str, Any]:
    """Title and scale of an axis of values: linear, or logarithmic with plain numbers at the decades."""
    if not is_wide(values):
        axis: dict[str, Any] = {"title_text": wrap(label, length), "type": "linear"}
        if len(values) and (only_one := float(values.min())) == float(values.max()):
            room = 0.1 * abs(only_one) or 0.5
            axis["range"] = [only_one - room, only_one + room]
        return axis
    ticks, words = decades(values)
    axis = {"title_text": wrap(f"{label}, log scale", length), "type": "log"}
    return axis | {"tickvals": [10.0**tick for tick in ticks], "ticktext": words}


def decades(values: pd.Series) -> tuple[list[int], list[str]]:
    """At most eight powers of ten around positive values, and how they are written."""
    low, high = np.log10(float(values.min())), np.log10(float(values.max()))
    ticks = list(range(math.floor(low), math.ceil(high) + 1, max(1, math.ceil((high - low) / 7))))
    return ticks, [f"{10**tick:,}" if 0 <= tick <= 5 else f"{10.0**tick:g}" for tick in ticks]


def round_ticks(rounds: Sequence[int]) -> dict[str, Any]:
    """Whole-numbered ticks, at most thirteen."""
    span = (max(rounds) - min(rounds)) if len(rounds) else 0
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if span / s <= 12)
    return {"dtick": step, "tick0": 0, "tickformat": "d"}


def faint(colour: str) -> str:
    """A colour for a band behind lines."""
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},0.16)"


def safe(text: str) -> str:
    """Plotly reads tags in text: data must not be able to write any."""
    return html.escape(text, quote=False)


def clip(text: str, length: int) -> str:
    """Text of at most this length."""
    return text if len(text) <= length else text[: length - 1] + "…"


def wrap(text: str, length: int = 18) -> str:
    """Escaped text in lines of about this length."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if len(joined) > length and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = joined
    return "<br>".join(safe(line) for line in lines)
