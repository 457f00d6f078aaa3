"""Commands on kept updates: who was a member, and which client has an attribute."""

import json
import math

import pandas as pd
import pytest
import torch

from fedaudit.attacks.roc import auc
from fedaudit.cli import main
from fedaudit.config import RunConfig
from fedaudit.errors import RecordError
from fedaudit.federation.execution import execute
from fedaudit.inference.candidate_scores import candidate_scores
from fedaudit.inference.membership import Scored
from fedaudit.offline.attacks import recorded_updates, setup_of
from fedaudit.offline.attribute import attribute_of_run
from fedaudit.offline.membership import AVERAGED, curve_of, membership_of_run, per_update, pooled
from fedaudit.records import load_run


def federation(folder, **changes):
    flat = {
        "data.max-examples": 320,
        "data.reference-fraction": 0.4,
        "model.name": "mlp(hidden=32)",
        "federation.clients": 4,
        "federation.rounds": 2,
        "train.local-epochs": 1,
        "audit.measures": "update-norm",
        "audit.save-updates": True,
        "output.directory": str(folder),
        "output.name": "run",
    }
    return RunConfig.from_flat({**flat, **changes})


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """Clients learn their few examples by heart."""
    changes = {"train.local-epochs": 60, "train.lr": 0.5, "train.batch-size": 8}
    return execute(federation(tmp_path_factory.mktemp("overfitted"), **changes))


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    changes = {"defense.name": "dp-sgd(noise-multiplier=4)"}
    return execute(federation(tmp_path_factory.mktemp("private"), **changes))


def test_members_of_an_overfitted_federation_are_told_apart_and_the_control_is_not(overfitted):
    table = pooled(membership_of_run(overfitted, ("fedmia-loss",))).set_index("scope")
    for scope in ("round by round", "mean over rounds"):
        row = table.loc[scope]
        assert row["auc-low"] > 0.6, row
        assert row["tpr-at-fpr-0.01-low"] <= row["tpr-at-fpr-0.01"] <= row["tpr-at-fpr-0.01-high"]
        k = row["non-members"]
        assert row["control-auc"] == pytest.approx(0.5, abs=4 * math.sqrt((k + 1) / (3 * k * k)))
    assert table.loc["mean over rounds", "auc"] > table.loc["round by round", "auc"] - 0.05
    assert table["envelope-auc"].isna().all()  # no noise: no envelope


def test_strong_noise_leaves_little_and_the_envelope_says_how_much_at_most(private):
    table = pooled(membership_of_run(private, ("matched-filter",), rounds=[1])).iloc[0]
    m, n = table["members"], table["non-members"]
    spread = math.sqrt((m + n + 1) / (12 * m * n))
    assert 0.5 < table["envelope-auc"] < 0.6
    assert table["auc"] < table["envelope-auc"] + 4 * spread
    assert 0.01 < table["envelope-tpr-at-fpr-0.01"] < 0.1


def test_candidates_are_the_same_in_every_round_and_the_average_is_theirs(overfitted):
    told = {(t.round, t.client): t.found for t in membership_of_run(overfitted, ("cosine",), candidates=10)}
    assert set(told) == {(r, c) for r in (1, 2, AVERAGED) for c in range(4)}
    for client in range(4):
        rounds = [told[number, client] for number in (1, 2)]
        torch.testing.assert_close(told[AVERAGED, client].inside, (rounds[0].inside + rounds[1].inside) / 2)
    # a member's score in round 2 is that of the same example: both are among what the whole client gets
    updates = recorded_updates(overfitted, (), [2])
    made = setup_of(overfitted)
    every = candidate_scores("cosine", updates, made.context(2), *made.client_data(3))[3]
    assert all(float((every - score).abs().min()) < 1e-6 for score in told[2, 3].inside)


def test_pooled_rows_are_the_areas_of_all_candidates_together(overfitted):
    told = membership_of_run(overfitted, ("loss",), rounds=[2])
    values, members = curve_of(told, "loss", averaged=False)
    (row,) = pooled(told).to_dict("records")
    assert row["auc"] == pytest.approx(auc(values, members).value)
    assert (row["updates"], row["clients"], row["members"]) == (4, 4, int(members.sum()))
    single = per_update(told).set_index("client").loc[2]
    (found,) = [each.found for each in told if each.client == 2]
    assert isinstance(found, Scored) and single["auc"] == found.estimate.value
    assert single["auc-low"] == found.estimate.low


def test_a_score_that_needs_more_clients_has_a_reason_and_others_have_numbers(overfitted, tmp_path):
    config = federation(tmp_path, **{"federation.clients": 2, "federation.rounds": 1})
    two = execute(config)
    table = pooled(membership_of_run(two, ("fedmia-loss", "loss"))).set_index("score")
    assert math.isnan(table.loc["fedmia-loss", "auc"]) and not math.isnan(table.loc["loss", "auc"])
    assert "needs three updates from the same weights, got 2" in table.loc["fedmia-loss", "reason"]
    assert math.isnan(table.loc["loss", "auc-low"])  # two clients give no spread
    with pytest.raises(RecordError, match=r"got none: fedmia-loss needs three updates"):
        pooled(membership_of_run(two, ("fedmia-loss",)))


def test_the_command_writes_tables_and_a_page_and_leaves_the_run_alone(overfitted, tmp_path, capsys):
    before = {path: path.read_bytes() for path in overfitted.path.rglob("*") if path.is_file()}
    arguments = ["membership", str(overfitted.path), "--score", "cosine", "--score", "loss", "--client", "1"]
    assert main([*arguments, "--round", "2", "--output", str(tmp_path / "o"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["score"] for row in shown["membership"]] == ["loss", "cosine"]
    assert {row["updates"] for row in shown["membership"]} == {1}
    frame = pd.read_csv(tmp_path / "o" / "membership-updates.csv")
    assert set(zip(frame["round"], frame["client"], strict=True)) == {(2, 1)}
    page = (tmp_path / "o" / "membership.html").read_text()
    assert "ROC, round by round" in page and "a false-positive rate of 0.001 needs at least 1000" in page
    assert before == {path: path.read_bytes() for path in overfitted.path.rglob("*") if path.is_file()}


def test_the_command_prints_a_table_for_people(private, tmp_path, capsys):
    assert main(["membership", str(private.path), "--score", "cosine", "--output", str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    assert "Membership, round by round (8 updates" in out and "Membership, mean over rounds (4" in out
    assert "Gaussian envelope" in out and "control: two halves" in out


def test_wrong_choices_are_one_sentence(overfitted, capsys, tmp_path):
    faults = {
        ("membership", "--score", "lira"): "--score is one of loss, gradient-norm",
        ("membership", "--client", "9"): "an attack needs recorded updates, got none of these",
        ("attribute", "--attribute", "age"): "an attribute is one of brightness, contrast, label:K",
        ("attribute", "--low", "0.7", "--high", "0.3"): "the attribute must be rarer in one kind of batch",
    }
    for (command, *options), sentence in faults.items():
        assert main([command, str(overfitted.path), *options, "--output", str(tmp_path / "o")]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Ten clients of one class each: five of them hold nothing but digit 0 to 4."""
    changes = {
        "data.max-examples": 600,
        "data.partitioner": "one-class",
        "federation.clients": 10,
        "train.batch-size": 8,
        "federation.rounds": 2,
    }
    return execute(federation(tmp_path_factory.mktemp("classes"), **changes))


def test_the_client_that_holds_a_class_is_found_by_its_update(classes):
    found = attribute_of_run(classes, "label:3", shadows=24)
    by_client = found.clients[found.clients["round"] == AVERAGED].set_index("client")
    holder = by_client["share"].idxmax()
    assert by_client.loc[holder, "share"] == 1.0 and by_client["frequent"].sum() == 1
    assert by_client["log-odds"].idxmax() == holder and by_client.loc[holder, "log-odds"] > 0
    summary = found.rounds.set_index("round")
    assert list(summary.index) == [1, 2, AVERAGED] and summary.loc[AVERAGED, "auc"] == 1.0
    assert summary.loc[1, "shadow-auc"] > 0.9


def test_the_attribute_command_says_why_there_is_no_area(overfitted, tmp_path, capsys):
    arguments = ["attribute", str(overfitted.path), "--attribute", "label:3", "--shadows", "24"]
    assert main([*arguments, "--round", "1", "--output", str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    assert "no area: an area needs clients of both kinds, none of 4 have it frequent" in out
    frame = pd.read_csv(tmp_path / "o" / "attribute-clients.csv")
    made = setup_of(load_run(overfitted.path))
    shares = [float((made.client_data(client)[1] == 3).double().mean()) for client in range(4)]
    assert frame.sort_values("client")["share"].tolist() == pytest.approx(shares)
    page = (tmp_path / "o" / "attribute.html").read_text()
    assert "Attribute of clients: label:3" in page and "Client by client" in page


def test_brightness_is_that_of_the_reference_for_every_client(classes):
    found = attribute_of_run(classes, "brightness", rounds=[1], shadows=24)
    made = setup_of(load_run(classes.path))
    median = made.data.reference.x.flatten(1).double().mean(1).quantile(0.5)
    for _, row in found.clients.iterrows():
        own = made.client_data(int(row["client"]))[0].flatten(1).double().mean(1)
        assert row["share"] == pytest.approx(float((own > median).double().mean()))
    assert 0 < found.clients["share"].mean() < 1 and found.clients["share"].std() > 0.1


def test_without_reference_examples_there_is_a_sentence(tmp_path, capsys):
    run = execute(federation(tmp_path, **{"data.reference-fraction": 0.0, "federation.rounds": 1}))
    assert main(["attribute", str(run.path)]) == 2
    assert "set data.reference-fraction > 0" in capsys.readouterr().err
    assert main(["membership", str(run.path)]) == 2
    assert "needs reference examples as non-members" in capsys.readouterr().err
