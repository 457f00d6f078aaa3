"""An imprinted model in a federation: what a dishonest server reads, and that it is called ACTIVE."""

import json

import pytest
import torch

from fedaudit.attacks.imprint import ImprintBlock
from fedaudit.cli import main
from fedaudit.config import RunConfig
from fedaudit.errors import ConfigError
from fedaudit.federation.execution import execute
from fedaudit.models.build import build_model
from fedaudit.records import load_run
from fedaudit.report.page import render

ACTIVE = "ACTIVE server: it broadcast a model changed to leak"
IMPRINTED = "imprinted(base=mlp, bins=128, mean=0.305, std=0.034)"


def federation(folder, **changes):
    flat = {
        "data.max-examples": 200,
        "federation.clients": 3,
        "federation.rounds": 1,
        "train.local-steps": 1,
        "train.batch-size": 4,
        "audit.measures": "update-norm",
        "attack.names": "imprint, dlg(restarts=1, iterations=1)",
        "attack.save-images": True,
        "output.directory": str(folder),
        "output.name": "run",
    }
    return RunConfig.from_flat({**flat, "model.name": IMPRINTED, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return execute(federation(tmp_path_factory.mktemp("runs"), **{"audit.save-updates": True}))


def values(run, quantity):
    return run.records.loc[run.records["quantity"] == quantity, "value"].tolist()


def test_the_attack_reads_examples_off_a_federation_whose_model_is_imprinted(run):
    assert values(run, "imprint.recovered")[0] >= 0.5  # those alone in their bin
    assert values(run, "imprint.identifiability")[0] >= 0.5


def test_every_attack_on_an_imprinted_model_has_an_active_card(run):
    for quantity in ("imprint.objective", "dlg.objective"):
        extra = json.loads(run.records.loc[run.records["quantity"] == quantity, "extra"].iloc[0])
        assert extra["card-active"] is True and extra["grade"] == "laboratory"
        assert "an active server" in extra["favours-attacker"]


def test_the_report_says_active_at_the_top_and_at_each_attack(run):
    page = render([run])
    notice = page[page.index('class="notice"') :]
    assert ACTIVE in notice[: notice.index("</div>")]
    assert "imprint (ACTIVE)" in page and "dlg (ACTIVE)" in page


def test_the_terminal_says_active_and_an_honest_run_says_it_nowhere(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(
        "[federation]\nclients = 3\nrounds = 1\n[data]\nmax-examples = 200\n"
        '[audit]\nmeasures = "update-norm"\n'
    )
    assert main(["run", "c.toml", "--set", f"model.name={IMPRINTED}", "--set", "output.name=active"]) == 0
    assert "ACTIVE server" in capfd.readouterr().err
    assert main(["run", "c.toml", "--set", "attack.names=imprint", "--set", "output.name=honest"]) == 0
    assert "ACTIVE server" not in capfd.readouterr().err
    honest = load_run("runs/honest")
    (failed,) = honest.records.query("quantity == 'imprint.objective'")["reason"]
    assert "needs a model built with imprint()" in failed
    assert ACTIVE not in render([honest])


def test_it_can_be_attacked_afterwards_and_diagnosed(run, tmp_path, capsys):
    arguments = ["attack", str(run.path), "--attack", "imprint", "--client", "1"]
    assert main([*arguments, "--output", str(tmp_path / "o"), "--json"]) == 0
    assert values(load_run(tmp_path / "o"), "imprint.psnr")[0] > 15
    capsys.readouterr()
    assert main(["diagnose", str(run.path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    verdicts = {each["attack"]: each["verdict"] for each in shown["attacks"]}
    assert verdicts["imprint"] != "does not apply" and shown["card"]["card-active"] is True


def test_the_attack_still_works_after_rounds_of_training_and_the_model_trains(tmp_path):
    changes = {
        "federation.rounds": 8,
        "train.lr": 0.5,
        "train.batch-size": 8,
        "attack.names": "imprint",
        "attack.rounds": "8",
        "data.max-examples": 600,
    }
    trained = execute(federation(tmp_path, **changes))
    assert values(trained, "imprint.recovered")[0] >= 0.5
    accuracy = values(trained, "accuracy")
    assert accuracy[-1] > accuracy[0] + 0.1  # 120 test examples: one standard deviation is 0.04


def test_the_base_keeps_its_initial_weights_and_the_seed_decides_the_pattern():
    shape = (1, 8, 8)
    made = [build_model("imprinted(base=mlp, bins=8)", shape, 3, seed=seed) for seed in (0, 0, 1)]
    plain = build_model("mlp", shape, 3, seed=0)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(made[0].state_dict()[f"model.{name}"], tensor)
    patterns = [next(m for m in model.modules() if isinstance(m, ImprintBlock)).pattern for model in made]
    assert torch.equal(patterns[0], patterns[1]) and not torch.equal(patterns[0], patterns[2])


def test_a_base_that_does_not_exist_or_is_imprinted_is_answered_in_a_sentence():
    with pytest.raises(ConfigError, match=r"no model is named 'cnm': choose one of"):
        build_model("imprinted(base=cnm)", (1, 8, 8), 3, seed=0)
    with pytest.raises(ConfigError, match=r"a model is imprinted once, got base='imprinted'"):
        build_model("imprinted(base=imprinted)", (1, 8, 8), 3, seed=0)
    with pytest.raises(ConfigError, match=r"bins >= 1"):
        build_model("imprinted(bins=0)", (1, 8, 8), 3, seed=0)
