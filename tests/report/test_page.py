"""The page: self-contained, complete, escaped, and honest about what is missing."""

import json
import math
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedaudit.records import AuditLog, Run, load_run
from fedaudit.report.attack_section import attack_section
from fedaudit.report.page import render, write_report
from fedaudit.report.provenance import configuration, notices
from fedaudit.report.tables import comparison_table, records_summary
from tests.report.fabricate import DP, fabricate, record
from tests.report.small import accuracy_run, write_run


class Page(HTMLParser):
    """Tags with their attributes, visible text, and the figures' data."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[dict] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = "figure" if dict(attrs).get("type") == "application/json" else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "figure":
            self.figures.append(json.loads(data))
        elif self._inside not in ("script", "style"):
            self.words.append(data)


@pytest.fixture(scope="module")
def parsed(page: str) -> Page:
    return Page(page)


def test_page_refers_to_nothing_outside_itself(parsed: Page):
    references = [
        value
        for _, attributes in parsed.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster", "background") and value
    ]
    assert references
    assert [r for r in references if not r.startswith(("#", "data:image/png;base64,"))] == []
    assert not {tag for tag, _ in parsed.tags} & {"link", "iframe", "object", "embed", "base", "form"}
    policy = next(a["content"] for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_style_sheet_loads_nothing(page: str):
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_plotly_is_held_once(page: str):
    assert page.count("* plotly.js v") == 1


def test_every_promised_part_is_there(parsed: Page):
    anchors = {a.get("id") for tag, a in parsed.tags if tag == "section"}
    wanted = "audited findings comparison differences scatter rounds clients attacks missing reading threats"
    assert {*wanted.split(), "settings", "configuration"} <= anchors
    for words in (
        "dirichlet(alpha=0.5)",
        "7.85 (δ=1e-3, example, rdp)",
        "torch 2.13.0",
        "NaN in 'fc1.weight'",
    ):
        assert words in parsed.text
    assert sum(tag == "img" for tag, _ in parsed.tags) == 4 * 4 * 2


def test_every_quantity_is_drawn_over_rounds(parsed: Page, runs: list[Run]):
    titles = {figure["layout"]["title"]["text"] for figure in parsed.figures}
    wanted = {"Accuracy", "Test loss", "Mutual information", "Update norm", "DLG: reconstruction PSNR"}
    assert wanted <= titles
    assert sum(trace["type"] == "heatmap" for figure in parsed.figures for trace in figure["data"]) >= 4


def test_a_defense_of_the_finished_update_is_announced(tmp_path: Path):
    plain = accuracy_run(tmp_path, "none", 0, 0.9)
    chained = accuracy_run(tmp_path, "dp-sgd(epsilon=8) then top-k(fraction=0.1)", 0, 0.8)
    words = "changes the finished update"
    assert any(words in notice for notice in notices([plain, chained]))
    assert not any(words in notice for notice in notices([plain, accuracy_run(tmp_path, DP, 0, 0.8)]))


def test_runs_that_cannot_be_repeated_or_were_scored_on_validation_examples_are_announced(tmp_path: Path):
    honest, other = accuracy_run(tmp_path, "none", 0, 0.9), accuracy_run(tmp_path, DP, 0, 0.8)
    assert not any("repeated" in notice or "validation" in notice for notice in notices([honest, other]))
    secure = replace(other, info={**other.info, "run": {**other.info["run"], "repeatable": False}})
    tried = replace(other, info={**other.info, "config": {"data.validation-fraction": 0.2}})
    words = f"{other.name} cannot be repeated: its noise came from the operating system, not a seed."
    assert words in notices([honest, secure])
    words = f"{other.name} was evaluated on validation examples, not on the test set."
    assert words in notices([honest, tried])


def test_layers_have_a_map_of_their_own_and_no_place_among_the_whole(tmp_path: Path):
    rows = [
        record("r", "none", r, quantity, value, client_id=0, layer=layer)
        for r in (1, 2)
        for quantity, value, layer in (
            ("update-norm", 5.0, None),
            ("update-norm.layer", 3.0, "conv"),
            ("update-norm.layer", 4.0, "head"),
        )
    ]
    run = write_run(tmp_path, "r", "none", 0, rows)
    parsed = Page(render([run]))
    titles = [figure["layout"]["title"]["text"] for figure in parsed.figures]
    assert titles.count("Update norm by layer") == 1 and titles.count("Update norm") == 1
    assert "layers" in {a.get("id") for tag, a in parsed.tags if tag == "section"}
    assert set(comparison_table([run]).filter(like="layer").columns) == set()
    assert set(records_summary(run.records)["quantities"]) == {"update-norm"}


def test_disclosure_is_added_up_over_rounds_and_says_why_it_is_no_bound(tmp_path: Path):
    extra = json.dumps({"bound-nats": 0.1, "bound-nats-max": 0.5, "ridge-rule": "0.01 * trace / B"})
    rows = [
        record(
            "r", "none", r, "example-gradient-uniqueness", 0.5, client_id=3, observer="oracle", extra=extra
        )
        for r in (1, 2)
    ]
    parsed = Page(render([write_run(tmp_path, "r", "none", 0, rows, config={"train.local-steps": 1})]))
    assert "Membership disclosure over all rounds" in parsed.text
    assert "0.289" in parsed.text  # 2 * 0.1 / ln 2 bits on average
    assert "2 of 2" in parsed.text and "releases without noise" in parsed.text


def test_findings_state_the_difference_that_the_data_have(parsed: Page):
    assert f"{DP} lowers mutual information (oracle) from" in parsed.text
    assert f"{DP} lowers accuracy from" in parsed.text


def test_defense_that_raises_leakage_is_said_not_to_protect(tmp_path: Path):
    runs = [
        accuracy_run(tmp_path, defense, seed, 0.9, cohort_gradient_uniqueness=value + seed / 1000)
        for defense, value in (("none", 1.0), ("dp-sgd", 2.0))
        for seed in (0, 1)
    ]
    text = Page(render(runs)).text
    assert "dp-sgd raises cohort gradient uniqueness (server) from 1.00 to 2.00" in text
    assert "By this measure it does not protect" in text


def test_difference_within_noise_is_not_called_an_effect(tmp_path: Path):
    leaks = {("none", 0): 1.0, ("none", 1): 2.0, ("dp-sgd", 0): 1.5, ("dp-sgd", 1): 1.4}
    runs = [
        accuracy_run(tmp_path, defense, seed, 0.9, cohort_gradient_uniqueness=value)
        for (defense, seed), value in leaks.items()
    ]
    text = Page(render(runs)).text
    assert "do not show that dp-sgd lowers cohort gradient uniqueness" in text
    assert "leaves accuracy where it is" in text


def test_nothing_in_the_data_can_become_markup(tmp_path: Path):
    evil = "</script><img src=x onerror=alert(1)>"
    rows = [
        record("r", evil, r, quantity, 1.0 + r, client_id=c, observer=evil, unit=evil, kind=evil)
        for r in (1, 2, 3)
        for c in (0, 1)
        for quantity in ("accuracy", f"new{evil}", "mutual-information")
    ]
    rows.append(record("r", evil, 1, evil, None, status="failed", reason=evil))
    run = write_run(tmp_path, "r", evil, 0, rows)
    parsed = Page(render([run]))
    assert not [tag for tag, _ in parsed.tags if tag == "img"]
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert "<img" not in json.dumps(parsed.figures)
    assert evil in " ".join(parsed.words)


def test_interrupted_run_is_named_and_shown(tmp_path: Path):
    rows = [record("r", "none", r, "accuracy", 0.5) for r in (0, 1, 2)]
    run = write_run(tmp_path, "r", "none", 0, rows, ended=False, config={"federation.rounds": 8})
    text = Page(render([run])).text
    assert "r did not end: it holds records up to round 2 of 8" in text
    assert "One seed per defense: no intervals" in text


def test_run_without_records_gives_a_page(tmp_path: Path):
    AuditLog(tmp_path / "empty")
    path = write_report([load_run(tmp_path / "empty")], tmp_path / "out" / "report.html")
    text = Page(path.read_text(encoding="utf-8")).text
    assert "The runs hold no records yet" in text
    assert "empty did not end" in text


def test_no_runs_give_a_page():
    assert "No runs were given" in Page(render([])).text


def test_numbers_that_are_not_finite_are_counted(tmp_path: Path):
    values = {0: 1.0, 1: math.nan, 2: math.inf}
    rows = [record("r", "none", 1, "update-norm", v, client_id=c) for c, v in values.items()]
    text = Page(render([write_run(tmp_path, "r", "none", 0, rows)])).text
    assert "2 numbers are not finite and left out of means and figures: update-norm" in text


def test_settings_that_differ_beyond_the_defense_are_announced(tmp_path: Path):
    runs = []
    for lr, defense in ((0.1, "none"), (0.5, "dp-sgd")):
        rows = [record(defense, defense, 1, "accuracy", 0.5)]
        settings = {"train.lr": lr, "defense.name": defense, "model.name": "mlp"}
        runs.append(write_run(tmp_path, defense, defense, 0, rows, config=settings))
    assert "differ in more than defense and seed: train.lr." in " ".join(notices(runs))
    assert dict(configuration(runs).to_numpy().tolist())["train.lr"] == "0.1 (none); 0.5 (dp-sgd)"


def test_image_file_that_cannot_be_read_is_reported_and_the_rest_is_shown(tmp_path: Path):
    run = fabricate(tmp_path, "none", 0, rounds=1, clients=4)
    (run.path / "attacks" / "round-00002-client-1-dlg.safetensors").write_bytes(b"broken")
    parsed = Page(attack_section([run]))
    assert "round-00002-client-1-dlg.safetensors is not a readable file" in parsed.text
    assert sum(tag == "img" for tag, _ in parsed.tags) == 8


def test_thousand_clients_and_fifty_rounds_stay_below_eight_megabytes(tmp_path: Path):
    clients, rounds = 1000, 50
    folder = tmp_path / "large"
    AuditLog(folder)
    draw = np.random.default_rng(0)
    one = pd.DataFrame([vars(record("large", "none", 1, "mutual-information", 1.0, unit="nats"))])
    frame = one.loc[np.zeros(clients * rounds, dtype=int)].reset_index(drop=True)
    frame["client_id"] = np.tile(np.arange(clients), rounds)
    frame["round"] = np.repeat(np.arange(1, rounds + 1), clients)
    frame["value"] = draw.lognormal(size=len(frame))
    failed = draw.random(len(frame)) < 0.02
    frame.loc[failed, "status"] = "failed"
    frame.loc[failed, "reason"] = [f"error {i}" for i in range(int(failed.sum()))]
    template = AuditLog(folder).write_round(1, [])
    pq.write_table(
        pa.Table.from_pandas(frame, schema=pq.read_schema(template), preserve_index=False), template
    )
    page = render([load_run(folder)])
    assert len(page.encode()) < 8_000_000
    parsed = Page(page)
    assert "more reasons are in the records" in parsed.text
    heat = [t for figure in parsed.figures for t in figure["data"] if t["type"] == "heatmap"]
    assert [len(t["y"]) for t in heat] == [100]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_browser_draws_every_figure_without_an_error(page: str, tmp_path: Path):
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    quiet = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    )
    command = [
        "chromium",
        *quiet.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
    ]
    command += ["--virtual-time-budget=8000", "--dump-dom", f"file://{tmp_path / 'report.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr  # a violation of the page's own policy would be logged there
    drawn = Page(done.stdout)
    boxes = [a for tag, a in drawn.tags if tag == "div" and "js-plotly-plot" in (a.get("class") or "")]
    assert len(boxes) == len(Page(page).figures) > 10
