"""Recorded updates are attacked afterwards: those of a run with its truth, those from elsewhere without."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedaudit.cli import main
from fedaudit.config import RunConfig
from fedaudit.errors import ConfigError, RecordError
from fedaudit.federation.execution import execute
from fedaudit.federation.folders import run_folder
from fedaudit.offline.attacks import (
    ForeignUpdate,
    attack_foreign,
    attack_run,
    diagnose_run,
    with_limits,
)
from fedaudit.records import load_run


def build() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 4))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = RunConfig.from_flat(
        {
            "data.max-examples": 200,
            "model.name": "mlp(hidden=16, activation=tanh)",
            "federation.clients": 3,
            "federation.rounds": 2,
            "train.local-steps": 1,
            "train.batch-size": 1,
            "audit.measures": "update-norm",
            "audit.save-updates": True,
            "output.directory": str(tmp_path_factory.mktemp("runs")),
        }
    )
    execute(config)
    return load_run(run_folder(config))


@pytest.fixture
def foreign(tmp_path):
    """One example, one step of plain SGD: weights before and after."""
    model = build()
    save_file(model.state_dict(), tmp_path / "before.safetensors")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(1, 1, 6, 6, generator=generator), torch.tensor([2])
    nn.functional.cross_entropy(model(x), y).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    save_file(model.state_dict(), tmp_path / "after.safetensors")
    name = f"{__name__}:build"
    return x, ForeignUpdate(
        name, tmp_path / "before.safetensors", tmp_path / "after.safetensors", (1, 6, 6), 4, lr=0.5
    )


def test_a_run_is_attacked_afterwards_and_scored_against_its_data(run, tmp_path):
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    found = attack_run(run, "dlg(restarts=1)", tmp_path / "out", clients=[1], rounds=[2])
    scores = found.records.query("quantity == 'dlg.psnr'")
    assert scores["value"].item() > 30
    assert (scores["round"].item(), scores["client_id"].item(), scores["observer"].item()) == (2, 1, "oracle")
    extra = json.loads(scores["extra"].item())
    assert extra["grade"] == "favourable" and "one local step" in extra["favours-attacker"]
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_all_kept_updates_are_attacked_where_none_is_chosen(run, tmp_path):
    found = attack_run(run, "dlg(restarts=1, iterations=1)", tmp_path / "out")
    rows = found.records.query("quantity == 'dlg.objective'")
    found = sorted(zip(rows["round"], rows["client_id"], strict=True))
    assert found == [(r, c) for r in (1, 2) for c in range(3)]


def test_an_update_from_elsewhere_is_recovered_without_a_truth(foreign, tmp_path):
    x, update = foreign
    found = attack_foreign(update, "dlg(restarts=2)", tmp_path / "out")
    assert set(found.records["quantity"]) == {"dlg.objective"}
    (file,) = (tmp_path / "out" / "attacks").glob("*.safetensors")
    images = load_file(file)
    assert set(images) == {"reconstruction"}
    assert (images["reconstruction"] - x).square().mean() < 1e-3


def test_the_command_shows_a_reconstruction_without_a_truth(foreign, tmp_path, capsys):
    _, update = foreign
    arguments = [
        "attack",
        "--before",
        str(update.before),
        "--after",
        str(update.after),
        "--model",
        update.model,
    ]
    arguments += [
        "--shape",
        "1,6,6",
        "--classes",
        "4",
        "--lr",
        "0.5",
        "--output",
        str(tmp_path / "o"),
        "--json",
    ]
    assert main(arguments) == 0
    page = (tmp_path / "o" / "report.html").read_text()
    assert page.count('alt="reconstruction"') == 1 and 'alt="original"' not in page
    assert "truth unknown" in page and "<h3>Scores</h3>" not in page and "0.0 dB" not in page
    assert json.loads(capsys.readouterr().out)["report"].endswith("report.html")


def test_the_command_attacks_one_client_of_a_run(run, tmp_path):
    arguments = ["attack", str(run.path), "--client", "0", "--round", "1", "--seconds", "20"]
    assert main([*arguments, "--restarts", "1", "--lpips", "--output", str(tmp_path / "o"), "--json"]) == 0
    records = load_run(tmp_path / "o").records
    assert set(records["client_id"]) == {0}
    lpips = records.query("quantity == 'dlg.lpips'")
    assert lpips["status"].tolist() == ["skipped"] and "32x32" in lpips["reason"].item()  # digits are 8x8


def test_what_is_missing_is_said(run, foreign, tmp_path, capsys):
    with pytest.raises(RecordError, match=r"got none of these .*1/0, 1/1.*choose one of them"):
        attack_run(run, "dlg", tmp_path / "o", clients=[9])
    with pytest.raises(ConfigError, match=r"package\.module:function, got 'no\.where:build'"):
        attack_foreign(ForeignUpdate("no.where:build", *[tmp_path / "x"] * 2, (1,), 2, 0.1), "dlg", tmp_path)
    _, update = foreign
    save_file({"w": torch.ones(1)}, update.after)
    with pytest.raises(RecordError, match=r"weights must fit the model .*'1\.bias'"):
        attack_foreign(update, "dlg", tmp_path / "o")
    assert main(["attack", "--before", str(update.before)]) == 2
    assert "needs --after, --model, --shape, --classes, --lr beside --before" in capsys.readouterr().err
    assert main(["attack"]) == 2


def test_limits_become_options() -> None:
    assert with_limits("dlg", 2, 1.5) == "dlg(restarts=2, seconds=1.5)"
    assert with_limits("dlg(restarts=7)", 2, None) == "dlg(restarts=2)"


def test_a_diagnosis_names_the_obstacles_and_the_favours(run, capsys):
    assert main(["diagnose", str(run.path), "--client", "1", "--round", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    verdicts = {each["attack"]: each["verdict"] for each in shown["attacks"]}
    assert verdicts["dlg"] == verdicts["linear-layer"] == "applies"
    assert verdicts["spear"] == verdicts["imprint"] == "does not apply"  # tanh, and an honest server
    reasons = {each["attack"]: "; ".join(each["reasons"]) for each in shown["attacks"]}
    assert "spear needs ReLU" in reasons["spear"] and "active attack" in reasons["imprint"]
    assert shown["card"]["card-local-steps"] == 1 and shown["card"]["grade"] == "favourable"
    assert main(["diagnose", str(run.path), "--client", "1", "--round", "9"]) == 2
    assert "a round in which the client's update was used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        (
            {"train.local-steps": 5},
            "does not apply",
            "5 local steps: a single-gradient attack",
        ),
        ({"train.optimizer": "adam"}, "does not apply", "a step of adam is not"),
        ({"defense.name": "dp-sgd(epsilon=8)"}, "weakened", "noise of standard deviation"),
        ({"train.batch-size": 32}, "weakened", "32 examples share each gradient"),
        ({"defense.name": "top-k(fraction=0.1)"}, "weakened", "top-k changed the finished update"),
        ({"defense.name": "dp-sgd(epsilon=8) then sign"}, "weakened", "sign changed the finished update"),
    ],
)
def test_each_obstacle_is_said(changes, verdict, words, run, tmp_path):
    config = RunConfig.from_flat({**run.info["config"], **changes, "output.directory": str(tmp_path)})
    execute(config.with_(output__name="x", federation__rounds=1, audit__save_updates=False))
    _, advice = diagnose_run(load_run(tmp_path / "x"), 0, 1)
    dlg = next(each for each in advice if each.attack == "dlg")
    assert dlg.verdict == verdict
    assert words in "; ".join(dlg.reasons)
    if "train.local-steps" in changes:
        verdicts = {each.attack: each.verdict for each in advice}
        assert (verdicts["local-steps"], verdicts["linear-layer"]) == ("applies", "weakened")


def test_an_attack_afterwards_carries_the_guarantee_that_was_stated(run, tmp_path):
    changes = {
        "defense.name": "dp-sgd(epsilon=8)",
        "output.directory": str(tmp_path),
        "output.name": "private",
    }
    config = RunConfig.from_flat({**run.info["config"], **changes})
    execute(config)
    private = load_run(tmp_path / "private")
    found = attack_run(private, "dlg(restarts=1, iterations=1)", tmp_path / "out", clients=[0], rounds=[2])
    stated = private.records.query("quantity == 'epsilon' and client_id == 0 and round == 2")["value"].item()
    row = found.records.query("quantity == 'dlg.objective'").iloc[0]
    assert (row["epsilon"], row["privacy_unit"]) == (stated, "example")
