"""Tables against numbers worked out by hand."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from fedaudit.records import AuditLog, Run, load_run, write_json
from fedaudit.report.evidence import gather
from fedaudit.report.guarantees import worst_epsilon
from fedaudit.report.seeds import distinct_runs, numbers, per_seed, pool, t_interval
from fedaudit.report.tables import (
    all_quantities,
    comparison_table,
    paired_differences,
    problems,
    records_summary,
    settings,
)
from tests.report.fabricate import DP, record
from tests.report.small import accuracy_run, write_run


def test_interval_of_three_values_is_the_textbook_one():
    mean, half, n = t_interval([1.0, 2.0, 3.0])
    assert (mean, n) == (2.0, 3)
    assert half == pytest.approx(4.302653 * 1.0 / math.sqrt(3), rel=1e-6)  # t(2, 0.975) from a table


@pytest.mark.parametrize("values", [[], [0.5]], ids=["none", "one"])
def test_fewer_than_two_seeds_have_no_interval(values: list[float]):
    assert math.isnan(t_interval(values)[1])


def test_accuracy_is_the_last_rounds_mean_over_seeds(tmp_path: Path):
    runs = [accuracy_run(tmp_path, "none", 0, 0.8), accuracy_run(tmp_path, "none", 1, 0.9)]
    row = comparison_table(runs).iloc[0]
    assert row["accuracy"] == pytest.approx(0.85)
    assert row["accuracy ±"] == pytest.approx(12.7062 * 0.05, rel=1e-5)  # t(1, 0.975) * s / sqrt(2)
    assert (row["seeds"], row["rounds"]) == (2, 1)


def test_interval_does_not_shrink_with_the_number_of_clients(tmp_path: Path):
    def run(seed: int, clients: int) -> Run:
        name = f"r{seed}-{clients}"
        rows = [
            record(name, "none", 1, "update-norm", seed + c % 2, client_id=c, unit="1")
            for c in range(clients)
        ]
        return write_run(tmp_path, name, "none", seed, rows)

    few = all_quantities([run(0, 2), run(1, 2)]).iloc[0]
    many = all_quantities([run(0, 40), run(1, 40)]).iloc[0]
    assert few["half_width"] == pytest.approx(many["half_width"])
    assert (few["seeds"], many["clients"]) == (2, 40)


def test_leakage_is_the_mean_over_clients_and_rounds(tmp_path: Path):
    rows = [
        record("r", "none", r, "mutual-information", value, client_id=c, unit="nats", observer="oracle")
        for (r, c), value in {(1, 0): 1.0, (1, 1): 2.0, (2, 0): 6.0}.items()
    ]
    table = comparison_table([write_run(tmp_path, "r", "none", 0, rows)])
    assert table["mutual-information"].item() == 3.0
    assert table["mutual-information observer"].item() == "oracle"


def test_observer_that_all_defenses_have_is_compared(tmp_path: Path):
    def run(defense: str, observers: dict[str, float]) -> Run:
        rows = [
            record(defense, defense, 1, "mutual-information", v, client_id=0, unit="nats", observer=o)
            for o, v in observers.items()
        ]
        return write_run(tmp_path, defense, defense, 0, rows)

    both = {"server": 1.0, "oracle": 2.0}
    alone = comparison_table([run("none", both)])
    assert alone["mutual-information"].item() == 2.0
    together = comparison_table([run("none", both), run("dp-sgd", {"server": 0.5})])
    assert together["mutual-information"].tolist() == [1.0, 0.5]
    assert together["mutual-information observer"].tolist() == ["server", "server"]


def test_bound_in_the_extra_is_a_quantity_of_its_own(tmp_path: Path):
    rows = [
        record(
            *("r", "none", 1, "example-gradient-uniqueness", gnq),
            client_id=c,
            observer="client",
            extra=json.dumps({"bound-nats": 0.5 * math.log1p(gnq)}),
        )
        for c, gnq in enumerate([1.0, 3.0])
    ]
    table = comparison_table([write_run(tmp_path, "r", "none", 0, rows)])
    assert table["example-gradient-uniqueness"].item() == 2.0
    expected = 0.25 * (math.log(2) + math.log(4))
    assert table["example-gradient-uniqueness bound"].item() == pytest.approx(expected)
    assert table["example-gradient-uniqueness bound unit"].item() == "nats"


def test_measure_unknown_to_the_report_gets_a_column(tmp_path: Path):
    run = accuracy_run(tmp_path, "none", 0, 0.5, phase_of_the_moon=0.25)
    assert comparison_table([run])["phase-of-the-moon"].item() == 0.25


def test_numbers_that_are_not_finite_do_not_enter_means(tmp_path: Path):
    rows = [
        record("r", "none", 1, "update-norm", v, client_id=c) for c, v in enumerate([1.0, math.nan, math.inf])
    ]
    run = write_run(tmp_path, "r", "none", 0, rows)
    assert all_quantities([run])["mean"].item() == 1.0


def test_epsilon_is_the_worst_clients_with_its_delta_unit_and_accountant(runs: list[Run]):
    row = comparison_table(runs).set_index("defense").loc[DP]
    expected = 3.0 * 8**0.45 + 0.2  # client 4 in the last round
    assert row["epsilon"] == pytest.approx(expected)
    assert row["guarantee"] == "7.85 (δ=1e-3, example, rdp)"
    assert comparison_table(runs).set_index("defense").loc["none", "guarantee"] == "no formal guarantee"


def test_client_without_epsilon_is_counted_beside_those_with_one(tmp_path: Path):
    privacy = {"epsilon": 2.0, "delta": 1e-5, "privacy_unit": "example", "accountant": "pld"}
    rows = [
        record("r", "dp-sgd", 1, "epsilon", 2.0, client_id=0, **privacy),
        record("r", "dp-sgd", 1, "update-norm", 1.0, client_id=0),
        record("r", "dp-sgd", 1, "update-norm", 1.0, client_id=1),
    ]
    run = write_run(tmp_path, "r", "dp-sgd", 0, rows)
    text = str(worst_epsilon(run.records))
    assert text == "2 (δ=1e-5, example, pld); 1 of 2 clients without guarantee"


def test_infinite_epsilon_is_no_guarantee(tmp_path: Path):
    rows = [record("r", "dp-sgd", 1, "epsilon", None, client_id=0, epsilon=math.inf, delta=1e-5)]
    run = write_run(tmp_path, "r", "dp-sgd", 0, rows)
    assert str(worst_epsilon(run.records)).startswith("no formal guarantee")


def test_differences_are_paired_by_seed(tmp_path: Path):
    base = [accuracy_run(tmp_path, "none", seed, 0.5 + seed / 10) for seed in (0, 1, 2)]
    other = [accuracy_run(tmp_path, "dp-sgd", seed, 0.4 + seed / 10) for seed in (2, 0, 1)]
    row = paired_differences([*base, *other]).iloc[0]
    assert row["difference"] == pytest.approx(-0.1)
    assert row["half_width"] == pytest.approx(0.0, abs=1e-12)  # unpaired it would be 0.35
    assert (row["baseline_mean"], row["defense_mean"], row["seeds"]) == (
        pytest.approx(0.6),
        pytest.approx(0.5),
        3,
    )


def test_seed_that_only_one_defense_has_is_not_paired(tmp_path: Path):
    runs = [accuracy_run(tmp_path, "none", 0, 0.5), accuracy_run(tmp_path, "none", 1, 0.9)]
    row = paired_differences([*runs, accuracy_run(tmp_path, "dp-sgd", 0, 0.4)]).iloc[0]
    assert row["difference"] == pytest.approx(-0.1)
    assert row["seeds"] == 1
    assert math.isnan(row["low"])


def test_baseline_that_no_run_has_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"baseline must be one of .* got 'none': choose from dp-sgd"):
        paired_differences([accuracy_run(tmp_path, "dp-sgd", 0, 0.4)])


def test_second_run_of_a_seed_is_left_out(tmp_path: Path):
    first = accuracy_run(tmp_path / "a", "none", 0, 0.5)
    rows = [record("none-0", "none", r, "accuracy", 0.1 * r) for r in (1, 2)]
    longer = write_run(tmp_path / "b", "none-0", "none", 0, rows)
    kept, left_out = distinct_runs([longer, first])
    assert [kept[0] is longer, left_out[0] is first] == [True, True]
    assert comparison_table([longer, first])["seeds"].item() == 1


def test_undefended_runs_come_first_whatever_order_they_are_given_in(tmp_path: Path):
    runs = [accuracy_run(tmp_path, defense, 0, 0.5) for defense in ("gaussian", "none", "dp-sgd")]
    assert [run.name for run in gather(runs).runs] == ["none-0", "gaussian-0", "dp-sgd-0"]
    assert comparison_table(runs)["defense"].tolist() == ["none", "gaussian", "dp-sgd"]


def test_problems_are_counted_by_reason(runs: list[Run]):
    frame = problems(runs).set_index(["status", "defense"])
    refused = frame.loc[("rejected", "none")]
    assert (refused["count"], refused["first"], refused["rounds"]) == (2, "3", "2")
    assert "NaN" in refused["reason"]
    assert frame.loc[("skipped", DP), "count"] == 2


def test_settings_give_constants_and_ranges(runs: list[Run]):
    frame = settings(runs).set_index(["quantity", "observer", "defense"])["settings"]
    mutual = frame[("mutual-information", "oracle", "none")]
    assert (mutual["k"], mutual["ceiling-nats"]) == ("32", "3.466")
    low, high = map(float, frame[("example-gradient-uniqueness", "client", DP)]["ridge"].split(" – "))
    assert 0 < low < high
    assert frame[("dlg.psnr", "oracle", "none")]["labels"] == "known"


def test_summary_of_one_run_can_be_written_as_json(runs: list[Run], tmp_path: Path):
    summary = records_summary(runs[2].records)
    write_json(tmp_path / "summary.json", summary)
    back = json.loads((tmp_path / "summary.json").read_text())
    assert back["status"] == {"ok": summary["records"] - 2, "rejected": 1, "skipped": 1}
    assert back["accuracy"]["round"] == back["rounds"] == 8
    assert back["epsilon"]["client"] == 4
    assert (back["epsilon"]["delta"], back["epsilon"]["unit"], back["epsilon"]["accountant"]) == (
        *(1e-3, "example"),
        "rdp",
    )
    seconds = runs[2].records.query("quantity == 'round-seconds'")["value"].sum()
    assert back["seconds"] == pytest.approx(seconds)


def test_summary_of_no_records_is_empty(tmp_path: Path):
    AuditLog(tmp_path / "r")
    summary = records_summary(load_run(tmp_path / "r").records)
    assert (summary["records"], summary["accuracy"], summary["epsilon"]) == (0, None, None)


def test_tables_of_no_runs_have_no_rows():
    assert [len(table([])) for table in (comparison_table, paired_differences, problems, settings)] == [0] * 4


def test_inputs_are_not_modified(runs: list[Run]):
    before = runs[0].records.copy()
    per_seed(numbers(pool(runs)))
    comparison_table(runs)
    pd.testing.assert_frame_equal(runs[0].records, before)
