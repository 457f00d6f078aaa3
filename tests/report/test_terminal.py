"""The comparison for a terminal and in Markdown."""

import io

import pandas as pd
from rich.console import Console

from fedaudit.records import Run
from fedaudit.report.tables import comparison_table
from fedaudit.report.terminal import rich_table, to_markdown
from tests.report.fabricate import DP


def _print(table: object, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_terminal_table_has_every_defense_and_its_guarantee(runs: list[Run]):
    text = _print(rich_table(comparison_table(runs)), 100)
    rows = [line.split()[0] for line in text.splitlines() if line.split()]
    assert sum(first == "none" for first in rows) == 1
    assert sum(first.startswith(DP[:6]) for first in rows) == 1
    for words in (
        "none",
        DP[:6],
        "no formal",
        "guarantee",
        "7.85",
        "δ=1e-3",
        "example",
        "rdp",
        "MI",
        "oracle",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100


def test_terminal_table_fits_eighty_characters(runs: list[Run]):
    assert max(map(len, _print(rich_table(comparison_table(runs)), 80).splitlines())) <= 80


def test_brackets_in_a_defense_are_not_markup():
    table = pd.DataFrame({"defense": ["[red]x[/red]"], "accuracy": [0.5], "accuracy ±": [0.1]})
    table = table.assign(**{"accuracy unit": "1", "accuracy observer": "server", "guarantee": "none"})
    table = table.assign(**{"seconds": 1.0, "seconds ±": 0.1, "rounds": 1, "seeds": 2})
    assert "[red]x[/red]" in _print(rich_table(table), 100)


def test_comparison_of_no_runs_prints():
    assert "Comparison" in _print(rich_table(comparison_table([])), 80)


def test_markdown_cells_cannot_break_the_table():
    text = to_markdown(pd.DataFrame({"a": ["x|y\nz"]}))
    assert text.splitlines()[-1] == r"| x\|y z |"
