"""The comparison as files beside the report: CSV for programs, Markdown and LaTeX for texts."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fedaudit.records import write_text
from fedaudit.report.display import comparison_text, varied
from fedaudit.report.evidence import Runs, gather
from fedaudit.report.latex import to_latex
from fedaudit.report.pareto import pareto_table
from fedaudit.report.tables import comparison_table, paired_differences
from fedaudit.report.terminal import to_markdown


@dataclass(frozen=True)
class Tables:
    """The frames that were written.

    Attributes:
        comparison: `tables.comparison_table`.
        differences: `tables.paired_differences` to the evidence's baseline.
        pareto: `pareto.pareto_table`.
    """

    comparison: pd.DataFrame
    differences: pd.DataFrame
    pareto: pd.DataFrame


def write_tables(runs: Runs, folder: Path) -> Tables:
    """Write comparison.csv, comparison.md and comparison.tex, differences.csv and pareto.csv into a folder.

    The three comparisons have one frame: the CSV has its numbers, the others the text that the report shows.
    """
    evidence = gather(runs)
    tables = Tables(
        comparison_table(evidence),
        paired_differences(evidence, evidence.baseline),
        pareto_table(evidence),
    )
    for name, frame in (
        ("comparison", tables.comparison),
        ("differences", tables.differences),
        ("pareto", tables.pareto),
    ):
        write_text(folder / f"{name}.csv", frame.to_csv(index=False))
    shown = comparison_text(tables.comparison)
    words = {*varied(tables.comparison), "Defense"}
    numbers = [name for name in map(str, shown.columns) if name not in words]
    write_text(folder / "comparison.md", to_markdown(shown) + "\n")
    write_text(folder / "comparison.tex", to_latex(shown, right=numbers) + "\n")
    return tables
