"""Accuracy against leakage and attack success: marks with intervals, numbered, and the fronts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedaudit.report.label_places import label_places
from fedaudit.report.quantities import describe, with_unit
from fedaudit.report.style import (
    INK,
    QUIET,
    Figure,
    clip,
    is_wide,
    new_figure,
    safe,
    style_figure,
    styles,
    value_axis,
    wrap,
)

PAGE, PANEL, MARK = 1100, 320, 13  # pixels: width of the figure on a page, height of a panel, a mark
SIDES, BETWEEN = 92, 0.09
GROUP_COLOURS = ("#7A3E9D", "#8A6D1B", "#2F7F79", "#A23B52")


def pareto_figure(
    panels: Sequence[tuple[str, str, str, pd.DataFrame]],
    defenses: Sequence[str],
    epsilons: Mapping[str, str],
    utility: tuple[str, str] = ("accuracy", "1"),
) -> Figure:
    """One panel per quantity with a numbered mark per defense, its t intervals, and the front.

    The grey line is the best accuracy reached at no more leakage; a dashed line is that among defenses of
    one epsilon, which are ringed in its colour. Bars may leave the panel: its range is chosen for the marks.
    Labels are placed for a page of `PAGE` pixels' width.

    Args:
        panels: quantity, observer, unit and `pareto.pareto_points` of each panel.
        defenses: all defenses of the page, in order: they fix numbers and colours.
        epsilons: what to write beside each defense in the legend.
        utility: quantity and unit on the vertical axis.
    """
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure = new_figure(rows=down, cols=across, horizontal_spacing=BETWEEN, vertical_spacing=0.24 / down)
    width = (PAGE - SIDES) * (1 - BETWEEN * (across - 1)) / across
    named = Legend(defenses, epsilons)
    for i, (quantity, observer, unit, points) in enumerate(panels):
        place = {"row": i // across + 1, "col": i % across + 1}
        label = with_unit(f"{describe(quantity).label} ({observer})", unit)
        axis = value_axis(points["leakage"], label, 45)
        wide = axis["type"] == "log"
        x_range = _range(points["leakage"], points["leakage_half"], wide)
        y_range = _range(points["utility"], points["utility_half"], wide=False)
        figure.update_xaxes(**axis | {"range": x_range}, **place)
        title = with_unit(describe(utility[0]).label, utility[1])
        figure.update_yaxes(title_text=wrap(title, 30), range=y_range, **place)
        _fronts(figure, points, describe(quantity).wanted, named, place)
        _marks(figure, points, defenses, named, place)
        _numbers(figure, points, defenses, (x_range, y_range), wide, (width, PANEL), i)
    entries = len(named.shown)
    rows = math.ceil(entries / 2) if all(len(text) <= 68 for text in named.shown) else entries
    note = "mean over seeds, bars: Student-t 95 % interval"
    if any(points["seeds"].max() < 2 for *_, points in panels):
        note = "one seed, no intervals"
    height = 150 + 24 * rows + (PANEL + 62) * down
    style_figure(figure, f"{describe(utility[0]).label} against leakage", note, [" "] * rows, height)
    if rows < entries:
        figure.update_layout(
            legend={"orientation": "h", "entrywidth": 0.5, "entrywidthmode": "fraction", "itemwidth": 30}
        )
    figure.update_layout(margin={"b": 84 + 24 * rows, "l": 70, "r": SIDES - 70})
    return figure


class Legend:
    """Which entries the legend has already, so that each is there once."""

    def __init__(self, defenses: Sequence[str], epsilons: Mapping[str, str]) -> None:
        self.texts = {
            name: clip(name, 60) + (f" ({epsilons[name]})" if epsilons.get(name) else "") for name in defenses
        }
        self.shown: dict[str, None] = {}

    def once(self, text: str) -> dict[str, Any]:
        """Name, group and visibility of a trace with this entry."""
        new = text not in self.shown
        self.shown[text] = None
        return {"name": safe(text), "legendgroup": safe(text), "showlegend": new}


def _range(values: pd.Series, halves: pd.Series, wide: bool) -> list[float]:
    """Room for marks and labels, and for bars up to half of what the marks span."""
    low, high = values.min(), values.max()
    bars = (values - halves.fillna(0)).min(), (values + halves.fillna(0)).max()
    if wide:
        low, high = np.log10(low), np.log10(high)
        bars = (np.log10(bars[0]) if bars[0] > 0 else -math.inf), np.log10(bars[1])
    span = float(high - low) or abs(float(high)) * 0.1 or 0.5
    below, above = (min(0.5 * span, max(0.0, float(over))) for over in (low - bars[0], bars[1] - high))
    return [float(low) - max(below, 0.14 * span), float(high) + max(above, 0.14 * span)]


def _fronts(
    figure: Figure, points: pd.DataFrame, wanted: int, named: Legend, place: Mapping[str, int]
) -> None:
    def stairs(front: pd.DataFrame, **style: Any) -> None:
        ordered = front.sort_values("leakage", ascending=wanted <= 0)
        figure.add_scatter(
            x=ordered["leakage"].to_numpy(),
            y=ordered["utility"].to_numpy(),
            mode="lines",
            hoverinfo="skip",
            **style,
            **place,
        )

    front = points[points["front"]]
    line = {"color": QUIET, "width": 1.5, "shape": "hv"}
    stairs(front, line=line, **named.once("front of all defenses"))
    groups = [name for name in dict.fromkeys(points["group"]) if name]
    for name, colour in zip(groups, GROUP_COLOURS * (len(groups) // len(GROUP_COLOURS) + 1), strict=False):
        members = points[points["group"] == name]
        entry = named.once(f"ringed, and their front: {name}")
        figure.add_scatter(
            x=members["leakage"].to_numpy(),
            y=members["utility"].to_numpy(),
            mode="markers",
            marker={
                "symbol": "circle-open",
                "size": MARK + 8,
                "color": colour,
                "line": {"width": 1.8, "color": colour},
            },
            hoverinfo="skip",
            **entry | {"showlegend": False},
            **place,
        )
        line = {"color": colour, "width": 1.5, "shape": "hv", "dash": "dash"}
        stairs(members[members["group_front"]], line=line, **entry)


def _marks(
    figure: Figure,
    points: pd.DataFrame,
    defenses: Sequence[str],
    named: Legend,
    place: Mapping[str, int],
) -> None:
    row: Any
    for row in points.itertuples(index=False):
        style = styles(defenses)[row.defense]
        text = f"{list(defenses).index(row.defense) + 1} · {named.texts[row.defense]}"
        said = f"{named.texts[row.defense]}<br>on the front in {row.front_seeds} of {row.seeds} seeds"
        bar = {"color": style["colour"], "thickness": 1, "width": 3}
        figure.add_scatter(
            x=[row.leakage],
            y=[row.utility],
            error_x={**bar, **_bars(row.leakage, row.leakage_half, points["leakage"])},
            error_y={**bar, **_bars(row.utility, row.utility_half)},
            mode="markers",
            marker={"color": style["colour"], "symbol": style["symbol"], "size": MARK},
            text=["<br>".join(safe(line) for line in said.split("<br>"))],
            hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
            **named.once(text) | {"name": safe(text), "meta": safe(row.defense)},
            **place,
        )


def _bars(value: float, half: float, scale: pd.Series | None = None) -> dict[str, Any]:
    if not math.isfinite(half):
        return {"visible": False}
    lower = half
    if scale is not None and is_wide(scale) and half >= value:
        lower = value * (1 - 1e-9)  # a logarithmic axis has no zero: the bar leaves the panel
    return {"type": "data", "symmetric": False, "array": [half], "arrayminus": [lower]}


def _numbers(
    figure: Figure,
    points: pd.DataFrame,
    defenses: Sequence[str],
    ranges: tuple[Sequence[float], Sequence[float]],
    wide: bool,
    size: tuple[float, float],
    panel: int,
) -> None:
    """Each mark's number beside it, with a line to the mark."""
    x = np.log10(points["leakage"]) if wide else points["leakage"]
    y = points["utility"]
    marks = [
        tuple((v - low) / (high - low) * n for v, (low, high), n in zip(pair, ranges, size, strict=True))
        for pair in zip(x.tolist(), y.tolist(), strict=True)
    ]
    words = [str(list(defenses).index(name) + 1) for name in points["defense"]]
    ringed = bool((points["group"] != "").any())
    mark = MARK + 10 if ringed else MARK
    places = label_places(marks, [(8 * len(word) + 4, 15) for word in words], mark, size)
    axis = "" if not panel else str(panel + 1)
    for word, at, where, (across, up) in zip(words, zip(x, y, strict=True), marks, places, strict=True):
        figure.add_annotation(
            x=float(at[0]),
            y=float(at[1]),
            xref=f"x{axis}",
            yref=f"y{axis}",
            ax=across - where[0],
            ay=where[1] - up,
            text=word,
            showarrow=True,
            arrowhead=0,
            arrowwidth=0.8,
            arrowcolor=QUIET,
            standoff=mark / 2,
            xanchor="center",
            yanchor="middle",
            borderpad=0,
            font={"size": 13, "color": INK},
        )


def described(points: pd.DataFrame) -> list[str]:
    """Who is on the fronts and how steadily, a sentence for each front.

    >>> frame = pd.DataFrame({"defense": ["a", "b"], "front": [True, False], "front_seeds": [3, 0],
    ...     "seeds": [3, 3], "leakage": [1, 2], "utility": [0.9, 0.8], "group": "", "group_front": False})
    >>> described(frame)
    ['not beaten: a (in 3 of 3 seeds).']
    """
    front = points[points["front"]].sort_values("leakage")
    columns = (front[name] for name in ("defense", "front_seeds", "seeds"))
    told = [f"{name} (in {won} of {n} seeds)" for name, won, n in zip(*columns, strict=True)]
    sentences = [f"not beaten: {'; '.join(told)}."]
    for group, part in points.groupby("group"):
        if group:
            names = part.loc[part["group_front"], "defense"]
            sentences.append(f"not beaten at {group!s}: {'; '.join(names)} (of {len(part)}).")
    return sentences
