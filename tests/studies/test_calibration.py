"""Points of measured leakage and attack success from a real federation, and what is made of them."""

import json

import pandas as pd
import pytest
import torch

from fedaudit.cli import main
from fedaudit.config import RunConfig
from fedaudit.errors import ConfigError, RecordError
from fedaudit.kept_files import load_update, save_update, update_file
from fedaudit.studies.calibration import MEMBERSHIP, calibrate, correlations
from fedaudit.types import ClientUpdate

SETTINGS = {
    "data.max-examples": 240,
    "model.name": "mlp(hidden=16, activation=tanh)",
    "federation.clients": 3,
    "federation.rounds": 2,
    "train.local-steps": 1,
    "train.batch-size": 4,
    "train.lr": 0.5,
    "audit.measures": "example-gradient-uniqueness, update-norm",
    "audit.observers": "server, oracle",
    "attack.names": "dlg(restarts=1, iterations=300)",
    "attack.rounds": "1, 2",
    "attack.clients": 2,
    "calibrate.examples": 2,
    "calibrate.repetitions": 24,
    "compare.defenses": "none, dp-sgd(epsilon=0.1, clip-norm=0.1)",
}
CONFIG = RunConfig.from_flat(SETTINGS)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    runs, points = calibrate(CONFIG, folder)
    return runs, points


def test_there_is_a_point_for_each_defense_round_client_and_example(found):
    runs, points = found
    assert len(runs) == 2 and len(points) == 2 * 2 * 2 * 2
    assert not points.duplicated(["defense", "seed", "round", "client", "example"]).any()
    assert points.notna().all().all()
    assert {"example-gradient-uniqueness (oracle)", "update-norm (server)", "loss (example)"} <= set(points)


def test_measures_of_the_run_stand_beside_their_client_and_round(found):
    runs, points = found
    row = points.iloc[5]
    run = next(run for run in runs if run.records["defense"].iloc[0] == row["defense"])
    rows = run.records.query("quantity == 'update-norm'")
    value = rows[(rows["round"] == row["round"]) & (rows["client_id"] == row["client"])]["value"]
    assert value.item() == row["update-norm (server)"]


def test_attacks_succeed_without_and_fail_with_strong_noise(found):
    means = found[1].groupby("defense")[[MEMBERSHIP, "dlg.psnr"]].mean()
    plain, private = means.loc["none"], means.drop("none").iloc[0]
    assert plain["dlg.psnr"] > private["dlg.psnr"] + 10
    # 8 points of 24 repetitions: the standard deviation of 2 AUC - 1 is 0.24 for a point, at most 0.12 for
    # the mean, as the two rounds of a client share nothing but the examples
    assert plain[MEMBERSHIP] > 0.4 > private[MEMBERSHIP] + 0.1


def test_calibration_repeats_with_its_seed(found, tmp_path):
    again = calibrate(CONFIG, tmp_path)[1]
    pd.testing.assert_frame_equal(again, found[1])


def test_correlations_find_a_planted_predictor_and_no_other():
    generator = torch.Generator().manual_seed(0)
    size = 240
    success = torch.rand(size, generator=generator, dtype=torch.float64)
    stage = torch.arange(size) // 60
    points = pd.DataFrame(
        {
            "defense": "none",
            "seed": 0,
            "round": stage,
            "client": torch.arange(size) % 12,
            "example": torch.arange(size),
            "a.psnr": success + stage,
            "predicts": success + 10.0 - stage,  # among equals only
            "follows the stage": stage.double(),
            "noise": torch.rand(size, generator=generator, dtype=torch.float64),
        }
    )
    found = correlations(points, replicates=300).set_index(["measure", "scope"])
    assert found.loc[("predicts", "within stage"), "rho"] == pytest.approx(1)
    assert found.loc[("predicts", "overall"), "high"] < 0
    assert found.loc[("follows the stage", "overall"), "low"] > 0.8
    assert pd.isna(found.loc[("follows the stage", "within stage"), "rho"])
    for scope in ("overall", "within stage"):
        assert found.loc[("noise", scope), "low"] < 0 < found.loc[("noise", scope), "high"]
    assert set(found["clients"]) == {12}


def test_the_command_writes_points_correlations_and_a_page(tmp_path, capsys):
    file = tmp_path / "c.toml"
    changes = {"compare.defenses": "none", "attack.rounds": "1", "federation.rounds": 1}
    lines = [f"{json.dumps(k)} = {json.dumps(v)}" for k, v in (SETTINGS | changes).items()]
    file.write_text("\n".join(line.replace('"', "", 2) for line in lines))
    assert main(["calibrate", str(file), "--output", str(tmp_path / "out"), "--json"]) == 0
    folder = tmp_path / "out" / "calibrate-c"
    shown = json.loads(capsys.readouterr().out)
    assert shown["points"] == len(pd.read_csv(folder / "points.csv")) == 4
    assert {row["success"] for row in shown["correlations"]} == {MEMBERSHIP, "dlg.psnr"}
    page = (folder / "calibration.html").read_text()
    assert "Does the measure predict the attack?" in page and "dlg.psnr" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audit__every": 5, "federation__rounds": 8}, r"of which \[2\] are not: set audit.every to 1"),
        ({"federation__fraction_train": 0.5}, "same clients through all rounds"),
    ],
)
def test_what_cannot_be_calibrated_is_said_before_anything_runs(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        calibrate(CONFIG.with_(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_kept_update_comes_back(tmp_path):
    before = {"z": torch.ones(2), "a": torch.tensor(3)}
    update = ClientUpdate(
        4, 7, before, {"z": torch.tensor([0.5, -1.0])}, 9, {"train-loss": 0.25}, node_id=2**63
    )
    save_update(tmp_path, update)
    loaded = load_update(update_file(tmp_path, 7, 4))
    plain = {k: v for k, v in vars(update).items() if k not in ("before", "delta")}
    assert {k: v for k, v in vars(loaded).items() if k not in ("before", "delta")} == plain
    for part in ("before", "delta"):
        mine, theirs = getattr(update, part), getattr(loaded, part)
        assert list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_damaged_update_is_a_record_error(tmp_path):
    (tmp_path / "u.safetensors").write_bytes(b"\xff" * 32)
    with pytest.raises(RecordError, match="a kept update is read from"):
        load_update(tmp_path / "u.safetensors")
