"""The comparison table for a terminal and for Markdown."""

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from fedaudit.report.display import comparison_text

INTERVALS = "mean ± half-width of the Student-t 95 % interval over seeds; one seed has no interval"


def rich_table(comparison: pd.DataFrame, title: str = "Comparison of defenses") -> Table:
    """A `tables.comparison_table` as a rich table: one column per defense, one row per quantity.

    Defenses are the columns because they are few and quantities are many: it fits 80 characters.
    """
    text = comparison_text(comparison)
    table = Table(title=escape(title), caption=INTERVALS, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("", style="bold")
    for defense in text["Defense"]:
        table.add_column(escape(str(defense)), justify="right", overflow="fold")
    for heading in text.columns[1:]:
        table.add_row(escape(str(heading)), *(escape(str(cell)) for cell in text[heading]))
    if not len(text):
        table.add_row("There are no runs to compare.")
    return table


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
