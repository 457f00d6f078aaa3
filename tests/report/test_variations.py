"""Runs that a comparison varied: one row each, never mixed, in tables, files and the page."""

import csv
import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from fedaudit.records import Run
from fedaudit.report.display import comparison_text
from fedaudit.report.evidence import gather
from fedaudit.report.exports import write_tables
from fedaudit.report.findings import findings
from fedaudit.report.latex import escaped, to_latex
from fedaudit.report.page import render
from fedaudit.report.provenance import audited, notices
from fedaudit.report.tables import comparison_table, paired_differences
from tests.report.fabricate import record
from tests.report.small import write_run

VARY = "train.batch-size: 8 | 32"


def varied_run(
    folder: Path, size: int, defense: str, seed: int, accuracy: float, leakage: float = 1.0, **config: object
) -> Run:
    """A run of two clients of a comparison that varies the batch size."""
    name = f"{size}-{defense}-{seed}"
    rows = [record(name, defense, 1, "accuracy", accuracy)]
    rows += [record(name, defense, 1, "mutual-information", leakage + c, client_id=c) for c in (0, 1)]
    keys = {"compare.vary": VARY, "train.batch-size": size, "seed": seed, "defense.name": defense}
    return write_run(folder, name, defense, seed, rows, config=keys | config)


@pytest.fixture
def sweep(tmp_path: Path) -> list[Run]:
    """Two batch sizes, two defenses, three seeds; a defense costs 0.1 at size 8 and 0.3 at size 32."""
    return [
        varied_run(tmp_path, size, defense, seed, 0.9 - seed / 100 - (cost if defense == "sign" else 0))
        for size, cost in ((8, 0.1), (32, 0.3))
        for defense in ("none", "sign")
        for seed in (0, 1, 2)
    ]


def test_each_variation_and_defense_is_a_row_of_its_own_runs(sweep: list[Run]):
    table = comparison_table(sweep)
    assert list(table.columns[:2]) == ["train.batch-size", "defense"]
    assert table[["train.batch-size", "defense", "seeds"]].to_numpy().tolist() == [
        ["8", "none", 3],
        ["8", "sign", 3],
        ["32", "none", 3],
        ["32", "sign", 3],
    ]
    assert table["accuracy"].tolist() == pytest.approx([0.89, 0.79, 0.89, 0.59])
    assert table["mutual-information"].tolist() == pytest.approx([1.5] * 4)
    assert (table["mutual-information low"] < 1.5).all() and (table["mutual-information high"] > 1.5).all()
    assert table["accuracy low"].isna().all()  # one number per seed: three seeds have no bootstrap interval


def test_differences_are_paired_within_a_variation(sweep: list[Run]):
    frame = paired_differences(sweep)
    shown = frame[frame["quantity"] == "accuracy"].set_index("train.batch-size")
    assert shown["difference"].to_dict() == pytest.approx({"8": -0.1, "32": -0.3})
    assert shown["half_width"].to_dict() == pytest.approx({"8": 0.0, "32": 0.0}, abs=1e-12)
    assert shown["seeds"].to_dict() == {"8": 3, "32": 3}
    leak = frame[frame["quantity"] == "mutual-information"]
    assert leak["bootstrap_low"].tolist() == leak["bootstrap_high"].tolist() == pytest.approx([0.0, 0.0])


def test_the_baseline_is_the_configured_one(tmp_path: Path):
    runs = [
        varied_run(tmp_path, 8, defense, 0, 0.5, **{"compare.baseline": "sign"})
        for defense in ("none", "sign", "top-k")
    ]
    evidence = gather(runs)
    assert evidence.baseline == "sign"
    assert set(paired_differences(evidence, evidence.baseline)["defense"]) == {"none", "top-k"}
    alone = gather(runs[::2])  # a report of some of the runs has none of it
    assert alone.baseline == "none"


def test_runs_of_one_variation_alone_have_no_varied_key(sweep: list[Run]):
    assert gather(sweep[:6]).varied == []
    assert "train.batch-size" not in comparison_table(sweep[:6])


def test_a_varied_key_is_told_and_not_warned_of(sweep: list[Run]):
    assert ("Varied", "train.batch-size: 8 | 32") in audited(sweep)
    assert not any("differ in more than defense and seed" in line for line in notices(sweep))
    assert not any("Left out" in line for line in notices(sweep))


def test_a_quantity_that_no_run_recorded_is_announced(tmp_path: Path):
    run = varied_run(tmp_path, 8, "none", 0, 0.5, **{"compare.against": "dlg.psnr"})
    assert "No run recorded what compare.against names: dlg.psnr." in notices([run])


def test_the_page_is_grouped_by_variation(sweep: list[Run]):
    page = render(sweep)
    assert "2 variations, 12 runs" in page
    for anchor in ("findings", "comparison", "differences", "scatter", "rounds"):
        section = page[page.index(f'<section id="{anchor}"') :].split("</section>")[0]
        headings = re.findall(r'<h3 class="variation">(.*?)</h3>', section)
        assert headings == ["train.batch-size = 8", "train.batch-size = 32"], anchor
    configuration = page[page.index('<section id="configuration"') :].split("</section>")[0]
    assert "variation" not in configuration


def test_many_defenses_are_sorted_by_what_their_intervals_say(tmp_path: Path):
    accuracies = {"none": 0.9, "sign": 0.5, "top-k": 0.6, "gaussian": 0.91, "quantize": 0.4, "withhold": 0.95}
    runs = [
        varied_run(tmp_path, 8, name, seed, value + (seed - 1) * (0.02 if name == "gaussian" else 0.001))
        for name, value in accuracies.items()
        for seed in (0, 1, 2)
    ]
    line = findings(runs)[0]
    assert "lower: sign (0.500), top-k (0.600), quantize (0.400)" in line
    assert "higher: withhold (0.950)" in line
    assert "interval includes 0: gaussian (0.910)" in line


def test_csv_markdown_and_latex_hold_the_same_rows(sweep: list[Run], tmp_path: Path):
    tables = write_tables(sweep, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"comparison.{kind}" for kind in ("csv", "md", "tex")} | {
        "differences.csv",
        "pareto.csv",
    }
    read = pd.read_csv(tmp_path / "out" / "comparison.csv", dtype={"train.batch-size": str})
    pd.testing.assert_series_equal(read["accuracy"], tables.comparison["accuracy"])
    shown = comparison_text(tables.comparison)
    markdown = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in markdown]
    assert cells[0] == list(shown.columns) and cells[2:] == shown.to_numpy().tolist()
    tex = (tmp_path / "out" / "comparison.tex").read_text(encoding="ascii")
    rows = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert len(rows) == len(shown)
    for line, row in zip(rows, shown.itertuples(index=False), strict=True):
        assert line == " & ".join(map(escaped, row)) + r" \\"
    with (tmp_path / "out" / "pareto.csv").open(encoding="utf-8") as file:
        assert {line["train.batch-size"] for line in csv.DictReader(file)} == {"8", "32"}
    assert not math.isnan(json.loads(tables.differences.to_json())["difference"]["0"])


def test_latex_is_ascii_and_every_special_is_escaped():
    nasty = 'a&b%c$d#e_f{g}h~i^j\\k<l>m|n"o[p] ± − – ε δ ∞ ≈ ½ 你\nq'
    text = escaped(nasty)
    assert text.isascii() and "\n" not in text
    bare = re.sub(r"\$[^$]*\$", "", re.sub(r"\\[A-Za-z]+\{\}|\\[&%$#_{}]|\{\[\}", "", text))
    assert not set('&%#_~^\\<>|"[$') & set(bare)
    assert "(U+4F60)" in text and r"\textbackslash{}" in text
    table = to_latex(pd.DataFrame({"x": ["[1]", nasty], "y_z": ["2", "3 & 4"]}), right=["y_z"])
    lines = table.splitlines()
    assert lines[0] == r"\begin{tabular}{lr}" and lines[-1] == r"\end{tabular}"
    for line in lines[2:-2]:
        assert len(re.findall(r"(?<!\\)&", line)) == 1  # one per row of two columns
        inside = re.sub(r"\\[{}]", "", line)
        assert inside.count("{") == inside.count("}")
        assert not line.startswith("[")


def test_one_key_serves_the_figures_over_rounds_of_many_defenses(tmp_path: Path):
    names = ["none", "sign", "top-k", "gaussian", "quantize", "withhold"]
    few, many = (
        render([varied_run(tmp_path / str(n), 8, name, 0, 0.5) for name in names[:n]]) for n in (5, 6)
    )
    for page, keys in ((few, 0), (many, 1)):
        section = page[page.index('<section id="rounds"') :].split("</section>")[0]
        assert section.count('<ul class="key">') == keys
        figures = re.findall(r'<script type="application/json">(.*?)</script>', section)
        shown = {json.loads(figure)["layout"]["showlegend"] for figure in figures}
        assert (True in shown) == (not keys)
