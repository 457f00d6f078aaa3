"""Federations under defenses of the finished update: repeated, resumed, verified and attacked."""

import pandas as pd
import pytest

from fedaudit.accounting import Ledger, epsilon, noise_multiplier_for
from fedaudit.config import RunConfig
from fedaudit.errors import ConfigError
from fedaudit.federation.checks import check
from fedaudit.federation.execution import execute
from fedaudit.federation.folders import run_folder
from fedaudit.progress import listen
from fedaudit.records import load_run
from fedaudit.verification.recorded import verify_run

SMALL = {
    "data.max-examples": 200,
    "model.name": "mlp(hidden=8)",
    "federation.clients": 2,
    "federation.rounds": 3,
    "federation.evaluate-every": 3,
    "train.batch-size": 8,
    "train.local-steps": 2,
    "train.lr": 0.2,
    "audit.measures": "update-norm",
    "audit.save-updates": True,
}
SPECS = {
    "gaussian": "gaussian(clip-norm=0.05, epsilon=20)",
    "top-k": "top-k(fraction=0.1)",
    "pruned": "top-k(fraction=0.2, over=layer)",
    "random": "random-sparsify(fraction=0.2)",
    "sign": "sign",
    "quantize": "quantize(bits=3)",
    "withhold": "withhold(layers=1)",
}


def config(tmp_path, name, **changes):
    return RunConfig.from_flat({**SMALL, "output.directory": str(tmp_path), "output.name": name, **changes})


def comparable(folder):
    frame = load_run(folder).records.drop(columns=["run_id", "seconds"])
    frame = frame[frame["quantity"] != "round-seconds"]
    order = ["round", "quantity", "observer", "client_id"]
    return frame.sort_values(order, kind="stable", na_position="first").reset_index(drop=True)


def layer_names():
    return sorted({name.rpartition(".")[0] for name in check(config("x", "x")).build_model().state_dict()})


@pytest.mark.parametrize("name", SPECS)
def test_a_defended_federation_resumes_to_the_weights_of_an_uninterrupted_one_and_keeps_its_claims(
    tmp_path, name
):
    changes = {"defense.name": SPECS[name].replace("layers=1", f"layers={layer_names()[0]}")}
    execute(config(tmp_path, "whole", **changes))

    def pull_the_plug(event):
        if event.stage == "round" and event.round == 2:
            raise KeyboardInterrupt

    cut = config(tmp_path, "cut", **changes)
    with pytest.raises(KeyboardInterrupt), listen(pull_the_plug):
        execute(cut)
    execute(cut.with_(output__resume=True))
    whole, again = (comparable(tmp_path / folder) for folder in ("whole", "cut"))
    pd.testing.assert_frame_equal(whole, again, check_exact=True)
    weights = [(tmp_path / folder / "weights.safetensors").read_bytes() for folder in ("whole", "cut")]
    assert weights[0] == weights[1]
    findings = verify_run(run_folder(cut))
    own = [x for x in findings if x.client_id is not None]
    assert own and not [str(x) for x in findings if x.verdict == "violated"]
    assert any(x.verdict == "holds" for x in own)


def test_the_client_level_epsilon_of_a_run_composes_over_its_rounds(tmp_path):
    run = execute(config(tmp_path, "dp", **{"defense.name": "gaussian(epsilon=5, accountant=rdp)"}))
    rows = run.records[run.records["quantity"] == "epsilon"].sort_values("round")
    assert set(rows["privacy_unit"]) == {"client"} and set(rows["accountant"]) == {"rdp"}
    sigma = noise_multiplier_for(5.0, 1e-5, 1.0, 3)
    for number, value in zip(rows["round"], rows["value"], strict=True):
        assert value == pytest.approx(epsilon(Ledger(((sigma, 1.0, int(number)),)), 1e-5, "rdp"))
    assert 4.99 < rows["value"].max() <= 5.0
    assert "train-loss" not in set(run.records["quantity"])


def test_verification_finds_a_run_that_claims_more_noise_than_it_added(tmp_path):
    run = execute(config(tmp_path, "dp", **{"defense.name": "gaussian(noise-multiplier=2, epsilon=0)"}))
    path = run.path / "run.toml"
    path.write_text(path.read_text().replace("noise-multiplier=2,", "noise-multiplier=3,"))
    bad = [x for x in verify_run(run.path) if x.verdict == "violated"]
    assert {x.round for x in bad} == {1, 2, 3} and any("Gaussian noise" in str(x.claim) for x in bad)


def test_a_strategy_that_needs_losses_is_refused_where_the_guarantee_hides_them(tmp_path):
    private = config(
        tmp_path, "q", **{"defense.name": "gaussian", "strategy.name": "QFedAvg(client-learning-rate=0.1)"}
    )
    with pytest.raises(ConfigError, match="weights clients by their training loss, which the defense keeps"):
        check(private)


def test_a_strong_defense_leaves_less_to_an_attack_than_a_weak_one(tmp_path):
    psnr = {}
    for name, spec in (
        ("weak", "gaussian(clip-norm=10, noise-multiplier=1e-6, epsilon=0)"),
        ("strong", "gaussian(clip-norm=0.1, noise-multiplier=1, epsilon=0)"),
    ):
        changes = {
            "defense.name": spec,
            "attack.names": "dlg",
            "attack.clients": 2,
            "audit.measures": "",
            "federation.rounds": 1,
            "train.batch-size": 1,
            "train.local-steps": 1,
            "model.name": "mlp(hidden=16, activation=tanh)",
        }
        records = execute(config(tmp_path, name, **changes)).records
        psnr[name] = records[records["quantity"] == "dlg.psnr"]["value"]
    assert len(psnr["weak"]) == len(psnr["strong"]) == 2
    assert psnr["weak"].min() > psnr["strong"].max() + 5
