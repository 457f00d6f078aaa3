"""Plotly figures as pure functions of frames of numbers (see `seeds.numbers`): lines and points.

Values are clamped nowhere; a range of more than two positive decades gets a logarithmic axis.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedaudit.report.display import number
from fedaudit.report.quantities import describe, with_unit
from fedaudit.report.style import (
    INK,
    Figure,
    faint,
    lay_out,
    new_figure,
    only,
    round_ticks,
    safe,
    shown_defenses,
    styles,
    unit_of,
    value_axis,
)

MAX_POINTS = 200


def over_rounds(rows: pd.DataFrame, quantity: str, observer: str, defenses: Sequence[str]) -> Figure:
    """A quantity over rounds, one colour per defense.

    Per-client quantities: the median of all clients and seeds, and the band from the 10 % to the 90 %
    quantile. Quantities of the whole round: the mean over seeds, and each seed as a thin line.

    Args:
        rows: numbers with columns defense, seed, round, client_id, quantity, observer, value, unit, kind.
        quantity: which.
        observer: whose.
        defenses: all defenses of the page, in order: they fix the colours.
    """
    part = only(rows, quantity, observer)
    per_client = bool(part["client_id"].notna().any())
    figure = new_figure()
    for defense, style in styles(defenses).items():
        mine = part[part["defense"] == defense]
        if len(mine):
            draw = _client_band if per_client else _seed_lines
            draw(figure, mine, defense, style)
    what = "median and 10–90 % band over clients" if per_client else _lines_note(part)
    lay_out(figure, quantity, part, what, shown_defenses(part, defenses))
    rounds = sorted(part["round"].unique())
    figure.update_xaxes(title_text="Round", **round_ticks(rounds))
    label = with_unit(describe(quantity).label, unit_of(part))
    figure.update_yaxes(**value_axis(part["value"], label))
    return figure


def _lines_note(part: pd.DataFrame) -> str:
    return "mean over seeds; thin lines: single seeds" if part["seed"].nunique() > 1 else "one seed"


def _client_band(figure: Figure, mine: pd.DataFrame, defense: str, style: Mapping[str, str]) -> None:
    grouped = mine.groupby("round")["value"]
    middle, low, high = grouped.median(), grouped.quantile(0.1), grouped.quantile(0.9)
    rounds = middle.index.to_numpy()
    figure.add_scatter(
        x=np.concatenate([rounds, rounds[::-1]]),
        y=np.concatenate([high.to_numpy(), low.to_numpy()[::-1]]),
        mode="lines",
        fill="toself",
        fillcolor=faint(style["colour"]),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        legendgroup=safe(defense),
    )
    _line(figure, rounds, middle.to_numpy(), defense, style)


def _seed_lines(figure: Figure, mine: pd.DataFrame, defense: str, style: Mapping[str, str]) -> None:
    by_seed = mine.pivot_table(index="round", columns="seed", values="value")
    if by_seed.shape[1] > 1:
        for seed in by_seed:
            line = by_seed[seed].dropna()
            figure.add_scatter(
                x=line.index.to_numpy(),
                y=line.to_numpy(),
                mode="lines",
                line={"color": style["colour"], "width": 1},
                opacity=0.4,
                name=f"seed {safe(str(seed))}",
                showlegend=False,
                legendgroup=safe(defense),
            )
    mean = by_seed.mean(axis=1)
    _line(figure, mean.index.to_numpy(), mean.to_numpy(), defense, style)


def _line(figure: Figure, x: Any, y: Any, defense: str, style: Mapping[str, str]) -> None:
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines+markers" if len(x) <= 30 else "lines",
        line={"color": style["colour"], "width": 2.5, "dash": style["dash"]},
        marker={"symbol": style["symbol"], "size": 7},
        name=safe(defense),
        legendgroup=safe(defense),
    )


def by_defense(rows: pd.DataFrame, quantity: str, observer: str, defenses: Sequence[str]) -> Figure:
    """A per-client quantity of few rounds as one column of points per defense, with the median as a bar."""
    part = only(rows, quantity, observer)
    figure = new_figure()
    names = [name for name in defenses if (part["defense"] == name).any()]
    for place, defense in enumerate(names):
        style = styles(defenses)[defense]
        values = np.sort(part.loc[part["defense"] == defense, "value"].to_numpy())
        shown = values
        if len(values) > MAX_POINTS:
            shown = values[np.linspace(0, len(values) - 1, MAX_POINTS).round().astype(int)]
        spread = 0.18 * ((np.arange(len(shown)) * 0.618034) % 1 - 0.5) * (len(shown) > 1)
        middle = float(np.median(values))
        figure.add_scatter(
            x=[place - 0.22, place + 0.22],
            y=[middle, middle],
            mode="lines",
            line={"color": INK, "width": 3},
            name="median",
            hovertemplate=f"median {number(middle)}<extra></extra>",
            showlegend=False,
        )
        figure.add_scatter(
            x=place + spread,
            y=shown,
            mode="markers",
            marker={"color": style["colour"], "symbol": style["symbol"], "size": 8, "opacity": 0.65},
            name=safe(defense),
        )
    rounds = ", ".join(str(r) for r in sorted(part["round"].unique())[:4])
    note = f"one point per client and seed, bar: median; round {rounds}"
    named = len(names) <= 3 and max(map(len, names), default=0) <= 30  # else a legend has more room
    lay_out(figure, quantity, part, note, [] if named else names)
    ticks = {"tickvals": list(range(len(names))), "ticktext": [safe(n) if named else "" for n in names]}
    figure.update_xaxes(**ticks, ticks="", range=[-0.6, len(names) - 0.4], showgrid=False)
    label = with_unit(describe(quantity).label, unit_of(part))
    figure.update_yaxes(**value_axis(part["value"], label))
    return figure
