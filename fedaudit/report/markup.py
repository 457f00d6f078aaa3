"""Small pieces of HTML: everything that comes from data is escaped here and nowhere else."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from fedaudit.report.style import Figure


def text(value: object) -> str:
    """Escaped text, safe between tags and inside quoted attributes."""
    return html.escape(str(value), quote=True)


def paragraph(value: str, kind: str = "") -> str:
    """An escaped paragraph."""
    return f'<p class="{text(kind)}">{text(value)}</p>' if kind else f"<p>{text(value)}</p>"


def bullets(items: Iterable[str]) -> str:
    """An escaped list."""
    return "<ul>" + "".join(f"<li>{text(item)}</li>" for item in items) + "</ul>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Escaped terms and their values, as a compact grid."""
    cells = "".join(
        f'<div class="{"wide" if len(v) > 60 else ""}"><dt>{text(k)}</dt><dd>{text(v)}</dd></div>'
        for k, v in pairs
        if v
    )
    return f'<dl class="facts">{cells}</dl>'


def table(frame: pd.DataFrame, right: Sequence[str] = (), long: Sequence[str] = (), kind: str = "") -> str:
    """An escaped table; columns in `right` hold numbers, columns in `long` may break inside words."""
    classes = [
        "number" if name in right else "long" if name in long else "" for name in map(str, frame.columns)
    ]
    heading = "".join(
        f'<th scope="col" class="{c}">{text(name)}</th>'
        for name, c in zip(frame.columns, classes, strict=True)
    )
    body = []
    for row in frame.itertuples(index=False, name=None):
        cells = "".join(_cell(str(cell), c) for cell, c in zip(row, classes, strict=True))
        body.append(f"<tr>{cells}</tr>")
    rows = "\n".join(body)
    return (
        f'<div class="scroll"><table class="{text(kind)}"><thead><tr>{heading}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cell(value: str, kind: str) -> str:
    short = " short" if kind == "number" and len(value) <= 22 else ""
    return f'<td class="{kind}{short}">{text(value)}</td>'


def section(anchor: str, title: str, *content: str) -> str:
    """A titled section; empty if it has no content."""
    inside = "\n".join(filter(None, content))
    return f'<section id="{text(anchor)}"><h2>{text(title)}</h2>\n{inside}\n</section>' if inside else ""


def plot(figure: Figure) -> str:
    """A figure as data that the page's script draws; no tag can be closed from inside the data."""
    data = json.loads(figure.to_json())
    content = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    height = int(figure.layout.height)
    return (
        f'<div class="plot" style="height:{height}px">'
        f'<script type="application/json">{content}</script></div>'
    )


DASH_LENGTHS = {
    "dash": "9 5",
    "dot": "3 3",
    "dashdot": "9 4 3 4",
    "longdash": "14 6",
    "longdashdot": "14 5 3 5",
}
"""How long plotly's dashes are drawn in the key."""


def key(looks: Mapping[str, Mapping[str, str]]) -> str:
    """Escaped names, each with its line of `style.styles`: the key of several figures."""
    items = []
    for name, look in looks.items():
        dashes = DASH_LENGTHS.get(look["dash"], "none")
        line = (
            f'<svg width="38" height="8" aria-hidden="true"><line x1="0" y1="4" x2="38" y2="4" '
            f'stroke="{look["colour"]}" stroke-width="2.5" stroke-dasharray="{dashes}"/></svg>'
        )
        items.append(f"<li>{line} {text(name)}</li>")
    return f'<ul class="key">{"".join(items)}</ul>'


def mapping(values: Mapping[str, Any]) -> str:
    """Keys and values on one line of plain text.

    >>> mapping({"labels": "known", "restarts": 2})
    'labels: known; restarts: 2'
    """
    return "; ".join(f"{key}: {value}" for key, value in values.items())
