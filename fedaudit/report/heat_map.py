"""Heat maps over rounds: which client leaks when, and which layer leaks what."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from fedaudit.report.display import number
from fedaudit.report.quantities import describe, with_unit
from fedaudit.report.style import (
    INK,
    Figure,
    clip,
    decades,
    is_wide,
    lay_out,
    new_figure,
    only,
    safe,
    unit_of,
    wrap,
)

GAP = 78  # pixels between rows of panels, for "Round" and the titles below it
WORDS = {"client_id": "Client", "layer": "Layer"}


def heat_map(
    rows: pd.DataFrame,
    quantity: str,
    observer: str,
    defenses: Sequence[str],
    max_rows: int = 100,
    by: Literal["client_id", "layer"] = "client_id",
) -> Figure:
    """Client by round, or layer by round, one panel per defense; blank where there is no number.

    One colour scale serves all panels. A client's data depend on the seed, so the panels show the first seed
    only. More than `max_rows` clients are ranked by their mean and averaged in `max_rows` equal groups, the
    highest at the top. Layers are in the model's order, each the mean over clients.
    """
    part = only(rows, quantity, observer)
    part = part[part[by].notna()]
    names = [name for name in defenses if (part["defense"] == name).any()]
    seed = min(part["seed"].unique(), key=_seed_order)
    part = part[part["seed"] == seed]
    names = [name for name in names if (part["defense"] == name).any()]
    if by == "layer":
        grids = {name: _layers(part[part["defense"] == name]) for name in names}
    else:
        grids = {name: _grid(part[part["defense"] == name], max_rows) for name in names}
    wide = is_wide(part["value"])
    across = min(3, len(names))
    same = len({tuple(grid.index) for grid in grids.values()}) == 1
    down = math.ceil(len(names) / across)
    panel = min(440, max(200, 22 * max(len(grid) for grid in grids.values())))
    figure = new_figure(
        rows=down,
        cols=across,
        subplot_titles=[safe(clip(name, 130 // across)) for name in names],
        horizontal_spacing=0.03 if same else 0.09,
        vertical_spacing=GAP / (down * panel + (down - 1) * GAP) if down > 1 else 0,
    )
    rounds = sorted(part["round"].unique())
    for i, name in enumerate(names):
        grid = grids[name].reindex(columns=rounds)
        raw = grid.to_numpy(dtype=float)
        figure.add_heatmap(
            z=_colour_values(raw, wide),
            x=[str(number) for number in rounds],
            y=[str(label) for label in grid.index],
            coloraxis="coloraxis",
            customdata=[[number(value) for value in row] for row in raw] if raw.size <= 5000 else None,
            hovertemplate=f"{WORDS[by].lower()} "
            + "%{y}, round %{x}: "
            + ("%{customdata}" if raw.size <= 5000 else ("10^%{z}" if wide else "%{z}"))
            + "<extra></extra>",
            xgap=1 if len(grid) <= 40 and len(rounds) <= 60 else 0,
            ygap=1 if len(grid) <= 40 else 0,
            row=i // across + 1,
            col=i % across + 1,
        )
    grouped = by == "client_id" and any(
        len(part.loc[part["defense"] == n, "client_id"].unique()) > max_rows for n in names
    )
    note = f"seed {safe(str(seed))}; blank: no number"
    if by == "layer" and bool(part["client_id"].notna().any()):
        note += "; mean over clients"
    if grouped:
        note += f"; clients ranked by their mean and averaged in {max_rows} groups, most exposed first"
    lay_out(figure, quantity, part, note, [], height=165 + down * panel + (down - 1) * GAP)
    figure.update_layout(
        coloraxis=_colours(part, quantity, wide), margin={"t": 110, "b": 55, "l": 70, "r": 20}
    )
    # one cell per audited round, however far apart they are
    figure.update_xaxes(title_text="Round", showgrid=False, type="category", nticks=14)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False, automargin=True)
    figure.update_yaxes(title_text="Client group (rank of mean)" if grouped else WORDS[by], col=1)
    for column in range(2, across + 1 if same else 0):
        figure.update_yaxes(showticklabels=False, col=column)
    figure.update_annotations(font={"size": 13, "color": INK})
    return figure


def _layers(mine: pd.DataFrame) -> pd.DataFrame:
    grid = mine.pivot_table(index="layer", columns="round", values="value")
    return grid.loc[list(dict.fromkeys(mine["layer"]))]  # in the order of the model


def _grid(mine: pd.DataFrame, max_rows: int) -> pd.DataFrame:
    grid = mine.pivot_table(index="client_id", columns="round", values="value").sort_index()
    if len(grid) <= max_rows:
        return grid
    ranked = grid.loc[grid.mean(axis=1).sort_values(ascending=False, kind="stable").index]
    group = np.arange(len(ranked)) * max_rows // len(ranked)
    places = pd.Series(np.arange(1, len(ranked) + 1)).groupby(group).agg(["min", "max"])
    grouped = ranked.groupby(group).mean()
    grouped.index = pd.Index([f"{a}–{b}" if a < b else str(a) for a, b in places.itertuples(index=False)])
    return grouped


def _colours(part: pd.DataFrame, quantity: str, wide: bool) -> dict[str, Any]:
    title = with_unit(describe(quantity).label, unit_of(part))
    bar: dict[str, Any] = {
        "title": {"text": wrap(title), "side": "top", "font": {"size": 12}},
        "thickness": 14,
        "outlinewidth": 0,
    }
    if wide:
        ticks, words = decades(part["value"])
        bar |= {"tickvals": ticks, "ticktext": words}
    return {"colorscale": "Cividis", "colorbar": bar}


def _colour_values(raw: np.ndarray[Any, Any], wide: bool) -> np.ndarray[Any, Any]:
    """Four digits are more than an eye can tell apart, and keep the page small."""
    if wide:
        raw = np.log10(raw).round(3)
    return np.array([[float(f"{value:.4g}") for value in row] for row in raw])


def _seed_order(seed: str) -> tuple[int, int, str]:
    return (0, int(seed), "") if seed.isdigit() else (1, 0, seed)
