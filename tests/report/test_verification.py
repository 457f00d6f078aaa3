"""Tested claims in the report: violated ones first and told, the others counted, none taken for leakage."""

import json

import pytest

from fedaudit.claims import HOLDS, UNCHECKED, VIOLATED
from fedaudit.records import load_run
from fedaudit.report.evidence import Evidence
from fedaudit.report.findings import findings
from fedaudit.report.page import render
from fedaudit.report.tables import comparison_table, problems, records_summary
from fedaudit.report.verification import claims_table, shown, totals
from tests.report.fabricate import record
from tests.report.small import write_run

STATUS = {HOLDS: "ok", VIOLATED: "violated", UNCHECKED: "skipped"}
NOISE = "verify.gaussian-noise"


def row(name, number, claim, verdict, value=None, *, quantity=NOISE, **more):
    said = {"extra": json.dumps({"claim": claim, "verdict": verdict}), "status": STATUS[verdict]}
    return record(name, "gaussian", number, quantity, value, **{"reason": "as seen", **said, **more})


def noise(std):
    return f"Gaussian noise of std {std} on every coordinate"


@pytest.fixture
def made(tmp_path):
    name = "gaussian-0"
    rows = [
        record(name, "gaussian", 1, "accuracy", 0.5),
        row(name, 1, noise("0.01"), HOLDS, 0.0101, client_id=0, low=0.009, high=0.011),
        row(name, 1, noise("0.02"), HOLDS, 0.0202, client_id=1, low=0.019, high=0.021),
        row(name, 1, "update norm <= 0.5", UNCHECKED, quantity="verify.clip-norm", client_id=0),
        row(
            name, 2, noise("0.01"), VIOLATED, 0.005, client_id=0, low=0.004, high=0.006, reason="<b>half</b>"
        ),
        row(name, 3, noise("1e-03"), VIOLATED, 0.005, client_id=1, low=0.004, high=0.006),
    ]
    return write_run(tmp_path, name, "gaussian", 0, rows)


def test_claims_that_differ_in_a_number_share_a_row_and_violated_ones_come_first(made):
    table = claims_table([made])
    assert table["verdict"].tolist() == [VIOLATED, UNCHECKED, HOLDS]
    assert table["findings"].tolist() == [2, 1, 2] and table["rounds"].tolist() == ["2–3", "1", "1"]
    first = table.iloc[0]
    assert first["claim"] == noise("0.01") and first["evidence"] == "client 0: <b>half</b>"
    assert (first["measured"], first["low"], first["high"]) == (0.005, 0.004, 0.006)
    assert totals(table) == "2 violated, 2 hold, 1 cannot be checked by this observer"
    assert shown(table)["Findings"].iloc[0] == "2 in rounds 2–3, clients 0, 1"


def test_a_violated_claim_is_the_first_finding(made):
    first, *rest = findings([made])
    assert first.startswith(
        f"CLAIM VIOLATED under gaussian: {noise('0.01')}. Client 0: <b>half</b> (2 in rounds"
    )
    assert not any("No claim" in line for line in rest)


def test_a_run_without_violations_says_what_was_and_was_not_tested(made, tmp_path):
    kept = [
        row("kept-0", 1, noise("0.01"), HOLDS, 0.01, client_id=0),
        row("kept-0", 1, "update norm <= 0.5", UNCHECKED, quantity="verify.clip-norm", client_id=0),
    ]
    (line, *_) = findings([write_run(tmp_path, "kept-0", "gaussian", 0, kept)])
    assert (
        line
        == "No claim of gaussian was found violated: 1 test passed, 1 could not be made by this observer."
    )


def test_tests_of_claims_are_no_measures_of_leakage_and_no_missing_numbers(made):
    assert not any("verify" in str(column) for column in comparison_table([made]).columns)
    assert not len(problems([made]))
    assert not Evidence((made,)).rows["quantity"].str.startswith("verify").any()
    summary = records_summary(made.records)
    assert summary["claims"] == {"holds": 2, "violated": 2, "unchecked": 1}
    assert set(summary["quantities"]) == {"accuracy"}


def test_the_page_shows_a_section_with_every_verdict_and_escapes_the_evidence(made):
    page = render([made])
    section = page[page.index('<section id="claims">') :]
    section = section[: section.index("</section>")]
    for words in ("What defense and strategy claim, tested", VIOLATED, HOLDS, UNCHECKED, "at most one round"):
        assert words in section
    assert "&lt;b&gt;half" in section and "<b>half" not in page


def test_a_page_about_runs_without_tests_has_no_such_section(tmp_path):
    run = write_run(tmp_path, "none-0", "none", 0, [record("none-0", "none", 1, "accuracy", 0.5)])
    assert 'id="claims"' not in render([load_run(run.path)])
