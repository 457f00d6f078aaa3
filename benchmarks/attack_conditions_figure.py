"""The figure of the attack conditions: every attack's PSNR under every condition, as numbers on colours.

    python -m benchmarks.attack_conditions_figure [--chromium chromium]

draws it again from the results that are kept.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measurement import RESULTS
from benchmarks.picture import write_figure
from fedaudit.report.style import INK, QUIET, new_figure, safe, style_figure

NAME = "attack_conditions"
ROW, GAP, TOP, BOTTOM, WIDTH = 23, 64, 132, 74, 1320  # pixels
LIGHT = {1: 0.55, 2: 0.45}  # of the scale of a column of panels: numbers are white up to here, dark beyond
BESIDE = {"auc": ("membership<br>AUC", 0.5, 1.0), "accuracy-test": ("test<br>accuracy", 0.0, 1.0)}
REFUSED = "#eef0f2"


def draw(results: Mapping[str, Any], chromium: str | None) -> None:
    """One panel per condition, a line per value, a column per attack; membership and accuracy at the side."""
    rows, settings = results["rows"], results["settings"]
    attacks = list(settings["attacks"])
    clients = results["federations"]["settings"]["clients"]
    panels: dict[str, list[str]] = {}
    for row in rows:
        values = panels.setdefault(row["condition"], [])
        if row["value"] not in values:
            values.append(row["value"])
    heights = [len(values) for values in panels.values()]
    inner = ROW * sum(heights) + GAP * (len(panels) - 1)
    figure = new_figure(
        rows=len(panels),
        cols=2,
        column_widths=[len(attacks), len(BESIDE)],
        row_heights=heights,
        vertical_spacing=GAP / inner,
        horizontal_spacing=0.02,
        specs=[[{}, {} if panel == "defense" else None] for panel in panels],
    )
    for number, (panel, values) in enumerate(panels.items(), 1):
        cells = {(r["value"], r["attack"]): r for r in rows if r["condition"] == panel}
        grid = [[cells[value, attack] for attack in attacks] for value in values]
        add_attacks(figure, grid, values, [heading(settings, a) for a in attacks], number)
        if panel == "defense":
            add_beside(figure, results["federations"]["rows"], values, number)
        figure.update_yaxes(title_text="", row=number, col=1)
        figure.add_annotation(
            text=f"<b>{safe(panel)}</b>",
            x=0,
            xref="paper",
            xanchor="right",
            xshift=-8,
            y=1,
            yref=f"y{'' if number == 1 else number} domain",
            yanchor="bottom",
            yshift=4,
            showarrow=False,
            font={"size": 13, "color": INK},
        )
    style_figure(figure, "How attacks fail", note(settings, clients), [], inner + TOP + BOTTOM)
    figure.update_layout(
        width=WIDTH - 20,
        margin={"t": TOP, "b": BOTTOM, "l": 316, "r": 16},
        coloraxis={
            "colorscale": "Cividis",
            "cmin": 5,
            "cmax": 50,
            "colorbar": {
                "orientation": "h",
                "title": {"text": "PSNR [dB], from 50 on alike<br> ", "side": "top", "font": {"size": 12}},
                "x": 0,
                "xanchor": "left",
                "y": 0,
                "yref": "container",
                "yanchor": "bottom",
                "len": 330,
                "lenmode": "pixels",
                "thickness": 12,
                "outlinewidth": 0,
            },
        },
    )
    figure.update_xaxes(showgrid=False, showline=False, ticks="", side="top", tickfont={"size": 12})
    figure.update_yaxes(showgrid=False, showline=False, ticks="", autorange="reversed")
    write_figure(figure, NAME, chromium, WIDTH, inner + TOP + BOTTOM + 20)


def note(settings: Mapping[str, Any], clients: int) -> str:
    """What the numbers are, in two lines."""
    return (
        f"mean PSNR in dB over {settings['repeats']} updates · examples above "
        f"{settings['recovered-above-db']:.0f} dB / examples; one condition changes at a time, from batch 2 "
        "(r-gap: 1), one step, untrained, no defense<br>"
        f"the mean image as a guess gets {settings['guess-psnr']:.0f} dB; a small number says that this "
        f"attack, which knows nothing of the defense, failed; {settings['clients']} clients, beside the "
        f"defenses an overfitted federation of {clients}"
    )


def heading(settings: Mapping[str, Any], attack: str) -> str:
    """An attack with the network it attacks, where that is not everybody's."""
    network = settings["networks"][attack]["model"].partition("(")[0]
    below = {"lenet": "(LeNet)", "imprinted": "(ACTIVE)"}.get(network, "")
    words = [attack] if len(attack) < 8 else attack.replace("-", "- ").split()
    return "<br>".join(safe(line) for line in [*words, below] if line)


def add_attacks(
    figure: Any,
    grid: Sequence[Sequence[Mapping[str, Any]]],
    values: Sequence[str],
    names: Sequence[str],
    row: int,
) -> None:
    """Numbers on colours; grey where every update was refused."""
    add_cells(
        figure,
        [[cell.get("mean") for cell in line] for line in grid],
        [[text(cell) for cell in line] for line in grid],
        names,
        values,
        (5.0, 50.0),
        row=row,
        col=1,
    )


def add_beside(figure: Any, found: Mapping[str, Mapping[str, Any]], values: Sequence[str], row: int) -> None:
    """Membership and accuracy of the federations under each defense, each on its own scale."""
    numbers = [[first(found[value][key]) for key in BESIDE] for value in values]
    shares = [
        [(number - low) / (high - low) for number, (_, low, high) in zip(line, BESIDE.values(), strict=True)]
        for line in numbers
    ]
    texts = [[f"{number:.2f}" for number in line] for line in numbers]
    names = [name for name, _, _ in BESIDE.values()]
    add_cells(figure, shares, texts, names, values, (0.0, 1.0), row=row, col=2)
    figure.update_yaxes(showticklabels=False, row=row, col=2)


def add_cells(
    figure: Any,
    numbers: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    names: Sequence[str],
    values: Sequence[str],
    scale: tuple[float, float],
    **place: int,
) -> None:
    """A heat map with a text in every cell."""
    nothing = [[0 if number is None else None for number in line] for line in numbers]
    common = {"xgap": 2, "ygap": 2, "hoverinfo": "skip"}
    figure.add_heatmap(z=nothing, colorscale=[[0, REFUSED], [1, REFUSED]], showscale=False, **common, **place)
    colours = (
        {"coloraxis": "coloraxis"}
        if place["col"] == 1
        else {"colorscale": "Greys_r", "zmin": -0.6, "zmax": 1.3, "showscale": False}
    )
    figure.add_heatmap(z=numbers, **colours, **common, **place)
    low, high = scale
    for line in range(len(values)):
        for column in range(len(names)):
            number = numbers[line][column]
            dark = number is not None and (number - low) / (high - low) < LIGHT[place["col"]]
            figure.add_annotation(
                x=column,
                y=line,
                text=texts[line][column],
                showarrow=False,
                font={"size": 11, "color": QUIET if number is None else "#ffffff" if dark else INK},
                **place,
            )

    # positions, not categories: "2" as a category is taken for a number
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=list(names), **place)
    labels = [f"{safe(value)}  " for value in values]
    figure.update_yaxes(tickvals=list(range(len(values))), ticktext=labels, **place)


def text(cell: Mapping[str, Any]) -> str:
    """A cell's words.

    >>> text({"mean": 53.6, "recovered": 5, "examples": 6, "refused": 0, "updates": 3})
    '54 · 5/6'
    >>> text({"recovered": 0, "examples": 6, "refused": 3, "updates": 3})
    'refused'
    """
    if "mean" not in cell:
        return "refused"
    some = f", {cell['refused']} refused" if cell["refused"] else ""
    return f"{cell['mean']:.0f} · {cell['recovered']}/{cell['examples']}{some}"


def first(value: float | Sequence[float]) -> float:
    """A number, or the value of one with its interval."""
    return value[0] if isinstance(value, list) else float(value)  # type: ignore[arg-type]


def main() -> None:
    """Draw what is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chromium", help="a browser that turns the figure into a PNG")
    parser.add_argument("--results", type=Path, help="other results than those that are kept")
    options = parser.parse_args()
    path = options.results or RESULTS / f"{NAME}.json"
    draw(json.loads(path.read_text(encoding="utf-8")), options.chromium)


if __name__ == "__main__":
    main()
