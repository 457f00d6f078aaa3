"""The main job on real data: run, record, repeat, interrupt, resume."""

import json

import pandas as pd
import pytest

from fedaudit.config import RunConfig
from fedaudit.errors import RunFailedError
from fedaudit.federation.execution import execute
from fedaudit.federation.folders import run_folder
from fedaudit.progress import listen
from fedaudit.records import load_run

SMALL = {
    "data.name": "digits",
    "data.max-examples": 400,
    "model.name": "mlp(hidden=16, activation=tanh)",
    "federation.clients": 4,
    "federation.rounds": 4,
    "train.lr": 0.5,
    "train.batch-size": 4,
    "train.local-steps": 1,
    "audit.measures": "mutual-information(steps=10), example-gradient-uniqueness, "
    "cohort-gradient-uniqueness, update-norm, update-cosine",
    "audit.observers": "server, oracle",
    "audit.every": 2,
}
TIMES = ["seconds"]


def config(tmp_path, name, **changes):
    flat = {**SMALL, "output.directory": str(tmp_path), "output.name": name, **changes}
    return RunConfig.from_flat(flat)


def comparable(folder):
    frame = load_run(folder).records.drop(columns=["run_id", *TIMES])
    frame = frame[frame["quantity"] != "round-seconds"]
    order = ["round", "quantity", "observer", "client_id"]
    return frame.sort_values(order, kind="stable", na_position="first").reset_index(drop=True)


def test_two_runs_with_one_seed_have_identical_records(tmp_path):
    for name in ("a", "b"):
        execute(
            config(tmp_path, name, **{"defense.name": "dp-sgd(epsilon=8)", "federation.fraction-train": 0.75})
        )
    pd.testing.assert_frame_equal(comparable(tmp_path / "a"), comparable(tmp_path / "b"), check_exact=True)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


def test_another_seed_has_other_records(tmp_path):
    for seed in (0, 1):
        execute(config(tmp_path, str(seed), seed=seed))
    norms = [comparable(tmp_path / str(seed)).query("quantity == 'update-norm'")["value"] for seed in (0, 1)]
    assert not norms[0].equals(norms[1])


@pytest.mark.parametrize("strategy", ["FedAvg", "FedAdam", "FedAvgM(server-momentum=0.9)"])
def test_an_interrupted_run_resumes_to_the_records_of_an_uninterrupted_one(tmp_path, strategy):
    changes = {
        "strategy.name": strategy,
        "defense.name": "dp-sgd(epsilon=8)",
        "federation.fraction-train": 0.75,
        "audit.measures": "cohort-gradient-uniqueness, update-norm",
    }
    execute(config(tmp_path, "whole", **changes))

    def pull_the_plug(event):
        if event.stage == "round" and event.round == 2:
            raise KeyboardInterrupt

    cut = config(tmp_path, "cut", **changes)
    with pytest.raises(KeyboardInterrupt), listen(pull_the_plug):
        execute(cut)
    assert sorted(load_run(run_folder(cut)).records["round"].unique()) == [0, 1, 2]
    execute(cut.with_(output__resume=True))
    pd.testing.assert_frame_equal(
        comparable(tmp_path / "whole"), comparable(tmp_path / "cut"), check_exact=True
    )
    assert (tmp_path / "whole/weights.safetensors").read_bytes() == (
        tmp_path / "cut/weights.safetensors"
    ).read_bytes()


def test_dp_sgd_records_epsilon_within_budget_and_lowers_leakage(tmp_path):
    means = {}
    for name, defense in (("plain", "none"), ("private", "dp-sgd(epsilon=2, clip-norm=0.5)")):
        changes = {
            "defense.name": defense,
            "audit.measures": "mutual-information(steps=60), example-gradient-uniqueness",
            "data.max-examples": 0,
        }
        execute(config(tmp_path, name, **changes))
        means[name] = comparable(tmp_path / name).groupby("quantity")["value"].mean()
    records = comparable(tmp_path / "private")
    epsilon = records[records["quantity"] == "epsilon"]
    worst = epsilon.groupby("round")["value"].max()
    assert worst.is_monotonic_increasing and 1.0 < worst.iloc[-1] <= 2.0
    assert set(epsilon["privacy_unit"]) == {"example"} and (epsilon["delta"] > 0).all()
    assert means["private"]["mutual-information"] < means["plain"]["mutual-information"]


def test_a_client_stops_at_its_budget_and_the_federation_goes_on(tmp_path):
    """A fixed noise spends the budget before the last round; later rounds go on without the client."""
    changes = {
        "defense.name": "dp-sgd(epsilon=3, noise-multiplier=0.8, delta=0.001)",
        "audit.measures": "update-norm",
    }
    run = execute(config(tmp_path, "stop", **changes, **{"federation.rounds": 60, "audit.every": 60}))
    stopped = run.records[run.records["status"] == "rejected"]
    assert len(stopped) and stopped["reason"].str.contains("budget|epsilon").all()
    spent = run.records[run.records["quantity"] == "epsilon"]
    assert spent["value"].max() <= 3.0
    assert run.records["round"].max() == 60


def test_the_attack_recovers_an_undefended_single_step_and_the_report_is_written(tmp_path):
    from fedaudit.report.page import write_report

    changes = {
        "attack.names": "dlg",
        "attack.save-images": True,
        "federation.rounds": 1,
        "audit.measures": "",
    }
    run = execute(config(tmp_path, "dlg", **changes, **{"train.batch-size": 1}))
    psnr = run.records[run.records["quantity"] == "dlg.psnr"]
    assert psnr["value"].iloc[0] > 30 and psnr["observer"].iloc[0] == "oracle"
    assert {"labels", "local-steps", "batch-size"} <= set(json.loads(psnr["extra"].iloc[0]))
    page = write_report([run], tmp_path / "report.html")
    assert page.stat().st_size > 10_000


def test_summary_and_description_hold_what_a_reader_needs(tmp_path):
    run = execute(config(tmp_path, "one", **{"federation.rounds": 1, "audit.measures": "update-norm"}))
    assert run.info["config"]["federation.clients"] == 4
    assert {"torch", "flwr", "fedaudit"} <= set(run.info["versions"])
    assert json.loads((run.path / "summary.json").read_text()) == run.summary and run.summary


def test_a_federation_that_cannot_start_is_a_failed_run(tmp_path, monkeypatch):
    import fedaudit.simulation.run as engine

    def broken(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(engine, "run_federation", broken)
    with pytest.raises(RunFailedError, match="no space left"):
        execute(config(tmp_path, "broken"))
