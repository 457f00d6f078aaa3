"""Membership bounds of a run's records, added up by client."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedaudit.audit.rows import AuditRows
from fedaudit.measures.gradient_uniqueness import ExampleGradientUniqueness
from fedaudit.records import AuditLog, AuditRecord, load_run
from fedaudit.report.disclosure import COLUMNS, disclosed_by_client
from fedaudit.types import ClientUpdate, LocalEvidence, RoundContext, StepRelease

NOISE = "noise variance / (p (1 - p))"


def row(round_number, client, mean, worst, observer="oracle", **changes):
    extra = {"bound-nats": mean, "bound-nats-max": worst, "ridge-rule": changes.pop("rule", NOISE)}
    made = AuditRecord(
        *("run", round_number, client, "example-gradient-uniqueness", 1.0, "1", "exact", observer, "none"),
        extra=json.dumps(extra),
    )
    return replace(made, **changes)


def norm(round_number, client):
    return AuditRecord("run", round_number, client, "update-norm", 1.0, "1", "exact", "server", "none")


def frame(tmp_path, rows):
    log = AuditLog(tmp_path / "run")
    for number in {r.round for r in rows}:
        log.write_round(number, [r for r in rows if r.round == number])
    return load_run(tmp_path / "run").records


def test_bounds_of_rounds_add_up_by_client(tmp_path):
    rows = [row(1, 4, 0.1, 0.2), row(2, 4, 0.05, 0.3), row(1, 7, 0.01, 0.02), norm(2, 4), norm(1, 7)]
    table = disclosed_by_client(frame(tmp_path, rows), local_steps=1).set_index("client_id")
    assert table.loc[4, "mean_nats"] == pytest.approx(0.15)
    assert table.loc[4, "worst_nats"] == pytest.approx(0.5)
    assert table.loc[4, "worst_bits"] == pytest.approx(0.5 / math.log(2))
    assert table.loc[7, "mean_bits"] == pytest.approx(0.01 / math.log(2))
    assert table["rounds"].tolist() == [2, 1] and table["rounds_in_run"].tolist() == [2, 2]
    assert table["kind"].tolist() == ["upper", "upper"]


def test_sums_are_capped_at_one_bit(tmp_path):
    table = disclosed_by_client(frame(tmp_path, [row(r, 4, 0.3, 0.6) for r in (1, 2, 3)]), 1)
    assert table.loc[0, "mean_bits"] == table.loc[0, "worst_bits"] == 1.0
    assert table.loc[0, "cap_nats"] == math.log(2)


@pytest.mark.parametrize(
    ("rows", "steps", "reason"),
    [
        ([row(1, 4, 0.1, 0.2)], None, "the number of local steps is not known, the first is covered"),
        ([row(1, 4, 0.1, 0.2)], 5, "the first of 5 local steps is covered"),
        ([row(1, 4, 0.1, 0.2), norm(2, 4)], 1, "1 of 2 rounds were audited"),
        ([row(1, 4, 0.1, 0.2), row(2, 4, 0.1, 0.2, kind="estimate")], 1, "not all examples were measured"),
        ([row(1, 4, 0.1, 0.2, rule="0.01 * trace / B")], 1, "releases without noise: "),
    ],
    ids=["unknown-steps", "several-steps", "rounds-missing", "subset", "no-noise"],
)
def test_what_is_not_covered_makes_it_an_estimate(tmp_path, rows, steps, reason):
    table = disclosed_by_client(frame(tmp_path, rows), steps)
    assert table.loc[0, "kind"] == "estimate"
    assert table.loc[0, "reason"].startswith(reason)


def test_rows_without_a_number_and_rounds_not_joined_count_for_nothing(tmp_path):
    skipped = row(2, 4, 0.5, 0.5, status="skipped", value=None, extra="{}")
    rejected = AuditRecord("run", 3, 4, "update", None, "1", "exact", "server", "none", status="rejected")
    before = row(0, 4, 0.5, 0.5)
    table = disclosed_by_client(frame(tmp_path, [before, row(1, 4, 0.1, 0.2), skipped, rejected]), 1)
    assert table.loc[0, ["rounds", "rounds_joined", "rounds_in_run"]].tolist() == [1, 2, 3]
    assert table.loc[0, "mean_nats"] == pytest.approx(0.1)


def test_observers_are_not_added_to_each_other(tmp_path):
    rows = [row(1, 4, 0.1, 0.2), row(1, 4, 0.1, 0.2, observer="client")]
    table = disclosed_by_client(frame(tmp_path, rows), 1)
    assert table["observer"].tolist() == ["client", "oracle"]
    assert table["mean_nats"].tolist() == [pytest.approx(0.1)] * 2


def test_a_run_without_the_measure_has_no_rows(tmp_path):
    table = disclosed_by_client(frame(tmp_path, [norm(1, 4)]))
    assert len(table) == 0 and tuple(table.columns) == COLUMNS
    with pytest.raises(ValueError, match="at least one local step, got 0"):
        disclosed_by_client(table, 0)


def test_the_measures_own_rows_are_understood(tmp_path):
    model = nn.Linear(3, 2)
    x, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
    context = RoundContext(
        1,
        build_model=lambda: nn.Linear(3, 2),
        loss=lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="sum"),
        evidence=lambda update: LocalEvidence(x, y, StepRelease(1.0, 2.0, 0.5)),
        observer="oracle",
    )
    update = ClientUpdate(4, 1, model.state_dict(), {"w": torch.ones(1)}, 6)
    (estimate,) = ExampleGradientUniqueness()([update], context)
    made = AuditRows("run", 1, "none", {})
    made.add("example-gradient-uniqueness", "1", "oracle", estimate, 0.0, update)
    table = disclosed_by_client(frame(tmp_path, made.records), 1)
    assert table.loc[0, "mean_nats"] == pytest.approx(estimate.extra["bound-nats"])
    assert table.loc[0, "worst_nats"] == pytest.approx(estimate.extra["bound-nats-max"])
    assert table.loc[0, "kind"] == "upper"
