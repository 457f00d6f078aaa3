"""The auditor records what ran, what could not run, and why."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from fedaudit.audit.auditor import Auditor
from fedaudit.audit.rows import ClientFinding, Rejection
from fedaudit.errors import RunFailedError
from fedaudit.needs import Needs
from fedaudit.records import load_run
from fedaudit.types import ClientUpdate, Estimate, Guarantee, Reconstruction, RoundContext, Skip


def update(client: int, scale: float = 1.0) -> ClientUpdate:
    delta = {"w": torch.arange(1.0, 4.0) * scale}
    return ClientUpdate(
        client, 1, {"w": torch.zeros(3)}, delta, 10, {"train-loss": 0.5}, node_id=100 + client
    )


class Wants:
    name, unit, scope, observers = "wants", "1", "client", ("server",)

    def __init__(
        self, needs=Needs.NOTHING, answer=lambda updates: [Estimate(1.0, "1", "exact")] * len(updates)
    ):
        self._needs, self._answer = needs, answer

    def needs(self, observer):
        return self._needs

    def __call__(self, updates, ctx):
        return self._answer(updates)


def audited(measure, tmp_path=None, **options):
    auditor = Auditor(tmp_path, "", **options)
    auditor.measures = [measure]
    return auditor.audit(1, [update(0), update(1)])


def rows_of(records, quantity):
    return [row for row in records if row.quantity == quantity]


def test_what_is_unknown_is_skipped_with_its_reason():
    rows = rows_of(audited(Wants(Needs.MODEL)), "wants")
    assert [row.status for row in rows] == ["skipped"] * 2
    assert rows[0].reason == "needs the model and the loss (build_model, loss)" and rows[0].value is None


def test_an_exception_is_a_failed_row():
    def broken(updates):
        raise ValueError("singular")

    rows = rows_of(audited(Wants(answer=broken)), "wants")
    assert [(row.status, row.reason) for row in rows] == [("failed", "ValueError: singular")] * 2


def test_a_wrong_number_of_estimates_is_a_failed_row():
    rows = rows_of(audited(Wants(answer=lambda updates: [])), "wants")
    assert {row.status for row in rows} == {"failed"} and len(rows) == 2


def test_one_update_can_be_skipped_alone():
    answer = lambda updates: [Estimate(2.0, "1", "exact"), Skip("too few examples")]  # noqa: E731
    assert [row.status for row in rows_of(audited(Wants(answer=answer)), "wants")] == ["ok", "skipped"]


def test_a_strict_audit_stops_on_a_skipped_measure_after_recording_it(tmp_path):
    with pytest.raises(RunFailedError, match="wants skipped in round 1: needs the model"):
        audited(Wants(Needs.MODEL), tmp_path / "run", strict=True)
    assert (load_run(tmp_path / "run").records["status"] == "skipped").sum() == 2


def test_epsilon_travels_with_delta_unit_and_accountant():
    records = Auditor(None, "update-norm").audit(
        1, [update(0)], guarantees={0: Guarantee(3.0, 1e-5, "example", "rdp")}
    )
    for row in records:
        assert (row.epsilon, row.delta, row.privacy_unit, row.accountant) == (3.0, 1e-5, "example", "rdp")
    assert rows_of(records, "epsilon")[0].value == 3.0


def test_rejections_and_client_findings_become_rows():
    found = ClientFinding(0, 100, "mine", Estimate(0.25, "nats", "estimate", extra={"ridge": 0.1}), 0.5)
    records = Auditor(None, "", observers=("client",)).audit(
        1, [update(0)], [Rejection(1, 101, "NaN")], [found]
    )
    mine, bad = rows_of(records, "mine")[0], rows_of(records, "update")[0]
    assert (mine.observer, mine.value, json.loads(mine.extra)) == ("client", 0.25, {"ridge": 0.1})
    assert (bad.status, bad.reason, bad.node_id) == ("rejected", "NaN", 101)


def test_the_oracle_is_skipped_where_there_is_none():
    measure = Wants()
    measure.observers = ("oracle",)
    rows = rows_of(audited(measure, observers=("oracle",)), "wants")
    assert {row.reason for row in rows} == {"needs an oracle, which exists in simulation only"}


def test_rounds_that_are_not_due_are_not_measured():
    auditor = Auditor(None, "update-norm", every=5, last_round=8)
    assert [number for number in range(1, 9) if auditor.due(number)] == [1, 5, 8]


def test_a_round_keeps_rows_added_later(tmp_path):
    auditor = Auditor(tmp_path / "run", "update-norm")
    auditor.audit(1, [update(0), update(1)])
    auditor.note(1, "accuracy", 0.9, "1")
    auditor.audit(2, [update(0)])
    records = load_run(tmp_path / "run").records
    first = records[records["round"] == 1]
    assert set(first["quantity"]) == {"update-norm", "update-norm.layer", "train-loss", "accuracy"}
    assert (records["round"] == 2).sum() == 3


def test_a_held_round_is_written_once_when_it_is_flushed(tmp_path, monkeypatch):
    auditor = Auditor(tmp_path / "run", "update-norm")
    written = []
    write = auditor.log.write_round
    monkeypatch.setattr(auditor.log, "write_round", lambda *args: (written.append(args[0]), write(*args)))
    with auditor.held():
        auditor.audit(1, [update(0)])
        auditor.note(1, "accuracy", 0.9, "1")
        assert written == []
        auditor.flush()
        auditor.flush()
        assert written == [1]
    assert written == [1]
    assert set(load_run(tmp_path / "run").records["quantity"]) == {
        "update-norm",
        "update-norm.layer",
        "train-loss",
        "accuracy",
    }


def test_held_rows_reach_the_disk_with_the_next_round_and_after_an_error(tmp_path):
    auditor = Auditor(tmp_path / "run", "update-norm")
    with pytest.raises(KeyboardInterrupt), auditor.held():
        auditor.audit(1, [update(0)])
        auditor.audit(2, [update(0)])
        assert set(load_run(tmp_path / "run").records["round"]) == {1}
        raise KeyboardInterrupt
    assert set(load_run(tmp_path / "run").records["round"]) == {1, 2}


def test_an_attack_never_sees_the_truth_and_scoring_is_the_oracles(tmp_path):
    seen = {}

    class Peeking:
        name, needs = "peek", Needs.NOTHING

        def reconstruct(self, update, ctx):
            from fedaudit.types import Reconstruction

            seen["ctx"] = ctx
            return Reconstruction(torch.zeros(1, 1, 8, 8), torch.tensor([1]), 0.5, 3, {"labels": "joint"})

    class Oracle:
        def evidence(self, update):
            raise AssertionError("an attack must not ask for evidence")

        def truth(self, update):
            from fedaudit.types import Truth

            return Truth(torch.full((1, 1, 8, 8), 0.1), torch.tensor([1]))

    auditor = Auditor(
        tmp_path / "run",
        "",
        context=RoundContext(1, value_range=(0.0, 1.0)),
        observers=("server", "oracle"),
        oracle=Oracle(),
        save_images=True,
    )
    auditor.attacks = [Peeking()]
    records = auditor.audit(1, [update(0)])
    assert seen["ctx"].evidence is None and seen["ctx"].observer == "server"
    psnr = rows_of(records, "peek.psnr")[0]
    assert psnr.observer == "oracle" and psnr.value == pytest.approx(20.0, abs=1e-3)  # MSE 0.01
    assert rows_of(records, "peek.objective")[0].observer == "server"
    assert json.loads(psnr.extra)["labels"] == "joint"
    assert (tmp_path / "run" / "attacks" / "round-00001-client-0-peek.safetensors").exists()


def test_a_layer_wise_finding_has_a_row_for_each_layer(tmp_path):
    auditor = Auditor(tmp_path / "run", "update-norm")
    auditor.audit(1, [update(0), update(1)])
    records = load_run(tmp_path / "run").records
    whole = records[records["quantity"] == "update-norm"].set_index("client_id")["value"]
    layers = records[records["quantity"] == "update-norm.layer"]
    assert (
        layers["layer"].notna().all()
        and records.loc[records["quantity"] == "update-norm", "layer"].isna().all()
    )
    rest = layers.assign(square=layers["value"] ** 2).groupby("client_id")["square"].sum() ** 0.5
    pd.testing.assert_series_equal(whole, rest, check_names=False)


def test_measures_see_the_guarantee_a_client_states(tmp_path, monkeypatch):
    seen = {}

    class Sees:
        name, unit, scope, observers = "sees", "1", "client", ("server",)

        def needs(self, observer):
            return Needs.NOTHING

        def __call__(self, updates, ctx):
            seen.update({u.client_id: ctx.guarantee(u) for u in updates})
            return [Estimate(0.0, "1", "exact") for _ in updates]

    auditor = Auditor(None, "")
    auditor.measures = [Sees()]
    stated = Guarantee(2.0, 1e-5, "example", "rdp")
    auditor.audit(1, [update(0), update(1)], guarantees={1: stated})
    assert seen == {0: None, 1: stated}


class Sends:
    """An attack that remembers whom it attacked."""

    name, needs = "sends", Needs.NOTHING

    def __init__(self):
        self.seen = []

    def reconstruct(self, update, ctx):
        self.seen.append((update.round, update.client_id))
        return Reconstruction(torch.zeros(1, 3), torch.zeros(1), 0.0, 1)


@pytest.mark.parametrize(
    ("trigger", "most", "expected"),
    [
        ("update-norm > 5", 9, [(1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]),  # round 1 is planned
        ("update-norm > 5", 1, [(1, 0), (1, 2), (2, 2)]),  # the most extreme first
        ("update-norm < 5", 9, [(1, 0), (1, 1), (1, 2), (2, 0)]),
        ("", 9, [(1, 0), (1, 1), (1, 2)]),
    ],
)
def test_a_measure_over_its_threshold_calls_for_an_attack(trigger, most, expected):
    auditor = Auditor(None, "update-norm", attack_trigger=trigger, attack_rounds=(1,), attack_clients=most)
    auditor.attacks = [Sends()]
    for number in (1, 2):  # norms are 3.7, 7.5 and 11.2
        moved = [replace(update(client, 1.0 + client), round=number) for client in range(3)]
        auditor.audit(number, moved)
    assert sorted(auditor.attacks[0].seen) == expected
