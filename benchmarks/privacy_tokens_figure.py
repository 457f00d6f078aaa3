"""The figure of the privacy-token benchmark: curves over rounds, a column per case."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.picture import write_figure
from fedaudit.report.style import OKABE_ITO, new_figure, style_figure

EXTRACTORS = ("autoencoder", "transformer")
CURVES = {
    "continued": ("continued critic, after its training there", "solid", "circle"),
    "before": ("continued critic, before its training there", "dot", "circle-open"),
    "frozen": ("continued critic, model frozen at initialisation", "dash", "square"),
    "unrelated": ("continued critic, unrelated pairs", "dash", "square-open"),
    "final": ("critic after the last checkpoint", "dashdot", "diamond"),
    "fresh": ("fresh critic per checkpoint", "longdash", "triangle-up"),
}


def draw(cases: Sequence[Mapping[str, Any]], candidates: int, chromium: str | None) -> None:
    """The paper's difference per extractor, and held-out InfoNCE with test accuracy, over rounds."""
    columns = len(cases)
    figure = new_figure(
        rows=3,
        cols=columns,
        column_titles=[case["case"] for case in cases],
        specs=[[{}] * columns] * 2 + [[{"secondary_y": True}] * columns],
        vertical_spacing=0.07,
        horizontal_spacing=0.08,
    )
    for column, case in enumerate(cases, 1):
        rows = case["checkpoints"]
        x = [row["after-rounds"] for row in rows]
        place = {"col": column, "showlegend": column == 1}
        for line, extractor in enumerate(EXTRACTORS, 1):
            for number, (curve, (label, dash, symbol)) in enumerate(CURVES.items()):
                key = "continued" if curve == "before" else curve
                inner = "before-its-training" if curve == "before" else "difference"
                if key in rows[0][extractor]:
                    trace(
                        figure,
                        x,
                        [row[extractor][key][inner] for row in rows],
                        label,
                        OKABE_ITO[number],
                        dash,
                        symbol,
                        row=line,
                        col=column,
                        showlegend=column == line == 1,
                    )
            values = [row[extractor]["fresh"]["infonce-held-out"] for row in rows]
            colour, symbol = (("#56B4E9", "cross"), ("#000000", "x"))[line - 1]
            trace(
                figure, x, values, f"held-out InfoNCE, {extractor}", colour, "solid", symbol, row=3, **place
            )
        accuracy = [row["test-accuracy"] for row in rows]
        trace(
            figure, x, accuracy, "test accuracy", "#9aa5b1", "dot", "circle", row=3, secondary_y=True, **place
        )
        figure.update_xaxes(title_text="Rounds of training", row=3, col=column)
    note = f"nats; 4 clients, one seed; ceiling of InfoNCE ln {candidates} = {math.log(candidates):.2f}"
    style_figure(figure, "Mutual information through training, by privacy tokens", note, [""] * 4, 900)
    figure.update_layout(width=1180, margin={"t": 96, "r": 60}, legend={"orientation": "h"})
    for line, text in enumerate(("Difference, autoencoder", "Difference, transformer", "InfoNCE"), 1):
        figure.update_yaxes(title_text=text, row=line, col=1, secondary_y=False)
    for column in range(1, columns + 1):
        title = "Test accuracy" if column == columns else ""
        figure.update_yaxes(
            range=[0, 1.02], dtick=0.25, showgrid=False, title_text=title, row=3, col=column, secondary_y=True
        )
    write_figure(figure, "privacy_tokens", chromium)


def trace(
    figure: Any,
    x: Sequence[int],
    y: Sequence[float],
    name: str,
    colour: str,
    dash: str,
    symbol: str,
    **place: Any,
) -> None:
    """One curve."""
    figure.add_scatter(
        x=x,
        y=y,
        name=name,
        legendgroup=name,
        mode="lines+markers",
        line={"color": colour, "dash": dash, "width": 2},
        marker={"color": colour, "symbol": symbol, "size": 8},
        **place,
    )
