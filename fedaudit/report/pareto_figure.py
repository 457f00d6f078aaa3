"""Accuracy against leakage and attack success: marks with intervals, numbered, and the fronts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedaudit.report.label_places import Box, label_places
from fedaudit.report.quantities import describe, with_unit
from fedaudit.report.style import (
    ENTRY,
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
LEFT, RIGHT, TOP, GAP = 70, 22, 72, 78  # pixels: margins, and between panels
BETWEEN = 0.09  # share of the width
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
    area = PANEL * down + GAP * (down - 1)
    figure = new_figure(
        rows=down, cols=across, horizontal_spacing=BETWEEN, vertical_spacing=GAP / area if down > 1 else 0
    )
    width = (PAGE - LEFT - RIGHT) * (1 - BETWEEN * (across - 1)) / across
    named = Legend(defenses, epsilons)
    for i, (quantity, observer, unit, points) in enumerate(panels):
        place = {"row": i // across + 1, "col": i % across + 1}
        label = with_unit(f"{describe(quantity).label} ({observer})", unit)
        axis = value_axis(points["leakage"], label, 64)
        wide = axis["type"] == "log"
        x_range = _range(points["leakage"], points["leakage_half"], wide)
        y_range = _range(points["utility"], points["utility_half"], wide=False)
        figure.update_xaxes(**axis | {"range": x_range}, **place)
        title = with_unit(describe(utility[0]).label, utility[1])
        figure.update_yaxes(title_text=wrap(title, 30), range=y_range, **place)
        _fronts(figure, points, describe(quantity).wanted, named, place)
        _marks(figure, points, defenses, named, place)
        panel = Panel(x_range, y_range, wide, (width, PANEL))
        _numbers(figure, points, defenses, panel, str(i + 1) if i else "")
    entries = len(named.shown)
    rows = math.ceil(entries / 2) if all(len(text) <= 68 for text in named.shown) else entries
    note = "mean over seeds, bars: Student-t 95 % interval"
    if any(points["seeds"].max() < 2 for *_, points in panels):
        note = "one seed, no intervals"
    below = 70 + ENTRY * rows
    height = TOP + area + below
    style_figure(figure, f"{describe(utility[0]).label} against leakage", note, [" "] * rows, height)
    if rows < entries:
        figure.update_layout(legend={"orientation": "h", "entrywidth": 0.44, "entrywidthmode": "fraction"})
    figure.update_layout(margin={"t": TOP, "b": below, "l": LEFT, "r": RIGHT})
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


@dataclass(frozen=True)
class Panel:
    """Where values are in a panel, in pixels from its lower left corner."""

    x_range: Sequence[float]
    y_range: Sequence[float]
    wide: bool
    size: tuple[float, float]

    def pixels(self, x: float, y: float) -> tuple[float, float]:
        """Place of a point; what a logarithmic axis cannot show is at its lower end."""
        low = self.x_range[0]
        along = (math.log10(x) if x > 0 else low) if self.wide else x
        return (
            (along - low) / (self.x_range[1] - low) * self.size[0],
            (y - self.y_range[0]) / (self.y_range[1] - self.y_range[0]) * self.size[1],
        )

    def bars(self, x: float, y: float, x_half: float, y_half: float) -> list[Box]:
        """Boxes around a mark's intervals."""
        left, up = self.pixels(x, y)
        start, end = self.pixels(x - x_half, y - y_half), self.pixels(x + x_half, y + y_half)
        return [(start[0], up - 1, end[0], up + 1), (left - 1, start[1], left + 1, end[1])]


def _numbers(figure: Figure, points: pd.DataFrame, defenses: Sequence[str], panel: Panel, axis: str) -> None:
    """Each mark's number beside it, with a line to the mark if it is further away."""
    columns = (points[name].fillna(0) for name in ("leakage", "utility", "leakage_half", "utility_half"))
    rows = list(zip(*columns, strict=True))
    marks = [panel.pixels(x, y) for x, y, *_ in rows]
    words = [str(list(defenses).index(name) + 1) for name in points["defense"]]
    mark = MARK + 9 if bool((points["group"] != "").any()) else MARK
    bars = [box for row in rows for box in panel.bars(*row)]
    places = label_places(marks, [(8 * len(word) + 2, 14) for word in words], mark, panel.size, bars)
    for word, (x, y, *_), start, end in zip(words, rows, marks, places, strict=True):
        across, up = end[0] - start[0], end[1] - start[1]
        offset: dict[str, Any] = {"showarrow": False, "xshift": across, "yshift": up}
        if math.hypot(across, up) > mark / 2 + 14:
            offset = {"showarrow": True, "ax": across, "ay": -up, "standoff": mark / 2, "arrowhead": 0}
            offset |= {"arrowwidth": 0.8, "arrowcolor": QUIET}
        figure.add_annotation(
            x=math.log10(x) if panel.wide else x,
            y=y,
            xref=f"x{axis}",
            yref=f"y{axis}",
            text=word,
            xanchor="center",
            yanchor="middle",
            borderpad=0,
            font={"size": 13, "color": INK},
            **offset,
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
