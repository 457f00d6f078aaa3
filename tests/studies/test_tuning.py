"""A search over settings: which it tries, on what it scores them, what it writes and what it costs."""

import json
import tomllib
from dataclasses import replace

import pandas as pd
import pytest
import torch

from fedaudit.accounting import Ledger, epsilon
from fedaudit.cli import main
from fedaudit.config import RunConfig, load_config
from fedaudit.config.sections import DataConfig
from fedaudit.data.dataset import load_dataset, split
from fedaudit.errors import ConfigError, DataError, RunFailedError
from fedaudit.federation.setup import setup
from fedaudit.studies import tuning
from fedaudit.studies.tuning import (
    SearchCost,
    Setting,
    Trial,
    best_of,
    search_cost,
    settings_of,
    trial_config,
    tuned_toml,
)

SMALL = {
    "data.max-examples": 300,
    "model.name": "mlp(hidden=8)",
    "federation.clients": 2,
    "federation.rounds": 2,
    "tune.lr": "0.01, 1",
    "tune.clip": "0.5",
    "tune.batch-size": "16",
}
TEMPLATE = "dp-sgd(noise-multiplier=1, epsilon=0, clip-norm={clip}, lr={lr}, batch-size={batch-size})"


def config(**changes):
    return RunConfig.from_flat({**SMALL, "tune.defense": TEMPLATE}).with_(**changes)


def rows_of(data):
    return {tuple(row.flatten().tolist()) for row in data.x}


def test_the_settings_are_all_combinations_in_order():
    found = settings_of(config(tune__lr="0.1, 0.2", tune__clip="1, 2"))
    assert [s.values for s in found] == [
        {"lr": lr, "clip": clip, "batch-size": 16} for lr in (0.1, 0.2) for clip in (1.0, 2.0)
    ]
    assert found[1].defense == ("dp-sgd(noise-multiplier=1, epsilon=0, clip-norm=2, lr=0.1, batch-size=16)")
    assert not any(s.overrides for s in found)


def test_values_without_a_place_in_the_defense_change_the_run():
    (found,) = settings_of(config(tune__defense="none", tune__clip="", tune__lr="0.3"))
    assert found.defense == "none"
    made = trial_config(config(), found, 5, tuning.Path("x"))
    assert (made.train.lr, made.train.batch_size, made.seed) == (0.3, 16, 5)


def test_fewer_trials_are_a_part_of_the_grid_that_the_seed_alone_decides():
    wide = {"tune__lr": "1, 2, 3, 4", "tune__clip": "1, 2, 3, 4"}
    grid = [s.values for s in settings_of(config(**wide))]
    few, again, other = (
        [s.values for s in settings_of(config(**wide, tune__trials=6, seed=seed))] for seed in (1, 1, 2)
    )
    assert len(few) == 6 and few == again and few != other
    assert [values for values in grid if values in few] == few
    assert len(settings_of(config(**wide, tune__trials=99))) == 16


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tune__defense": "dp-sgd(lr={rate})", "tune__clip": ""}, r"may hold \{lr\}, .* replace rate"),
        ({"tune__lr": ""}, r"holds \{lr\}, got no values: list some in tune.lr"),
        ({"tune__defense": "dp-sgd(lr={lr})"}, r"tune.clip needs \{clip\} in tune.defense"),
        ({"tune__batch_size": "2.5"}, "tune.batch-size lists whole numbers, got '2.5'"),
        ({"tune__lr": "0.1, x"}, "numbers separated by commas are allowed"),
        ({"tune__lr": "0, 1"}, "numbers above 0 are allowed"),
        ({"tune__lr": "1, 1.0"}, "each number is listed once"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(config(**changes))


@pytest.mark.parametrize("name", ["digits", "digits-with-a-test-split"])
def test_validation_examples_are_neither_the_test_sets_nor_the_clients_nor_the_servers(name):
    data = load_dataset(DataConfig(max_examples=500))
    if name != "digits":
        data = replace(data, test=torch.arange(80))
    final = split(data, DataConfig(), seed=3)
    search = split(data, DataConfig(validation_fraction=0.25), seed=3)
    assert rows_of(search.reference) == rows_of(final.reference)
    assert not rows_of(search.test) & (
        rows_of(final.test) | rows_of(search.train) | rows_of(search.reference)
    )
    assert not rows_of(search.train) & rows_of(final.test)
    assert rows_of(search.train) | rows_of(search.test) == rows_of(final.train)
    assert len(search.test) == round(0.25 * len(final.train))


def test_a_share_that_leaves_no_example_is_refused():
    with pytest.raises(DataError, match="clients and validation need at least one example each"):
        split(load_dataset(DataConfig(max_examples=100)), DataConfig(validation_fraction=0.001), seed=0)


def test_trials_measure_and_attack_nothing_and_are_scored_once():
    made = trial_config(
        config(attack__names="dlg", tune__rounds=7), settings_of(config())[0], 0, tuning.Path("x")
    )
    assert made.audit.measures == made.attack.names == ""
    assert made.federation.rounds == made.federation.evaluate_every == 7
    assert made.data.validation_fraction == 0.2


def trial(lr, *accuracies, reason=""):
    values = {"lr": lr, "clip": 0.5, "batch-size": 16}
    return Trial(Setting(values, f"dp-sgd(lr={lr:g})", {}), accuracies, 8.0, 1.0, reason)


def test_the_best_trial_has_the_highest_mean_and_failed_ones_do_not_count():
    trials = [trial(1, 0.5, 0.7), trial(2, 0.8, 0.5), trial(3, 0.65, 0.65), trial(4, reason="it overflowed")]
    assert best_of(trials) is trials[1]
    with pytest.raises(RunFailedError, match="got 1 failed ones, the first because it overflowed"):
        best_of(trials[3:])


def test_the_tuned_file_is_a_configuration_with_the_best_setting_and_the_test_set_back(tmp_path):
    given = config(
        compare__defenses="none, dp-sgd(epsilon=2), sign", strategy__name="FedProx(proximal-mu=0.1)"
    )
    tuned = Trial(Setting({"lr": 1.0}, "dp-sgd(lr=1)", {"train.batch-size": 4}), (0.5,), None, 1.0)
    (tmp_path / "tuned.toml").write_text(tuned_toml(given, tuned))
    found = load_config(tmp_path / "tuned.toml")
    assert found.defense.name == "dp-sgd(lr=1)" and found.train.batch_size == 4
    assert found.compare.defenses == "none, sign, dp-sgd(lr=1)"
    assert found.data.validation_fraction == 0 and found.strategy == given.strategy
    assert found.tune == RunConfig().tune and found.data.max_examples == 300


def test_a_failing_trial_does_not_end_the_search(tmp_path, monkeypatch):
    def stops(config):
        raise RunFailedError("the weights overflowed")

    monkeypatch.setattr(tuning, "execute", stops)
    found = tuning.tune(config(), tmp_path)
    assert [t.reason for t in found] == ["the weights overflowed"] * 2
    assert found[0].row()["status"] == "failed"


def test_a_setting_that_cannot_run_is_refused_before_the_first_training(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "execute", lambda config: pytest.fail("it trained"))
    broken = config(tune__defense="dp-sgd(clip-norm={clip}, delta={lr})", tune__lr="0.001, 0.9")
    with pytest.raises(ConfigError, match="delta must be under 1 / examples"):
        tuning.tune(broken, tmp_path)


def test_the_cost_of_a_search_is_that_of_its_trainings_composed():
    given = config(tune__seeds="0, 1")
    trials = [Trial(setting, (0.1, 0.2), 1.0, 2.0) for setting in settings_of(given)]
    cost = search_cost(given, trials)
    made = setup(trial_config(given, trials[0].setting, 0, tuning.Path("runs")).flat())
    size = max(len(rows) for rows in made.partitions)
    smallest = min(len(rows) for rows in made.partitions)
    candidates = []
    for n in {size, smallest}:
        steps = 2 * 2 * -(-n // 16)  # two seeds, two rounds
        candidates.append([epsilon(Ledger().add(1.0, 16 / n, steps * k), cost.delta) for k in (1, 2)])
    assert (cost.trainings, cost.seconds, cost.delta) == (4, 4.0, 1e-5)
    assert [cost.one, cost.all_released] == pytest.approx(max(candidates))
    assert cost.one < cost.poisson and cost.one < cost.geometric
    assert "not counted in any run's" in " ".join(cost.sentences())


def test_without_an_example_level_guarantee_there_is_nothing_to_account_for():
    for template in ("none", "gaussian(epsilon=8, clip-norm={clip})"):
        given = config(tune__defense=template, tune__clip="1" if "clip" in template else "")
        cost = search_cost(given, [Trial(s, (0.5,), None, 1.0) for s in settings_of(given)])
        assert cost == SearchCost(2, 2.0)
        assert cost.sentences()[1] == "no example-level guarantee: nothing to account for"


def test_the_command_tries_every_setting_and_writes_the_better_one(tmp_path, capfd):
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**SMALL, "tune.defense": TEMPLATE}.items()]
    (tmp_path / "small.toml").write_text("\n".join(lines))
    arguments = ["tune", str(tmp_path / "small.toml"), "--output", str(tmp_path), "--json"]
    assert main(arguments) == 0
    answer = json.loads(capfd.readouterr().out)
    folder = tmp_path / "tune-small"
    frame = pd.read_csv(folder / "trials.csv")
    assert list(frame["lr"]) == [0.01, 1.0] and len(answer["trials"]) == 2
    best = frame.loc[frame["validation-accuracy"].idxmax()]
    assert answer["best"]["defense"] == best["defense"]
    assert tomllib.loads((folder / "tuned.toml").read_text())["defense"]["name"] == best["defense"]
    kept = tomllib.loads((folder / "lr=1-clip=0.5-batch-size=16-seed0" / "run.toml").read_text())
    assert kept["config"]["data.validation-fraction"] == 0.2
    assert main(arguments) == 0  # another folder, the same numbers
    again = json.loads(capfd.readouterr().out)
    scores = [[row["validation-accuracy"] for row in a["trials"]] for a in (answer, again)]
    assert scores[0] == scores[1] and again["tuned"].startswith(str(tmp_path / "tune-small-2"))


def test_the_table_shows_every_trial_and_why_one_failed():
    from rich.console import Console

    from fedaudit.report.terminal import trials_table

    rows = [trial(1, 0.5).row(), trial(2, reason="it overflowed").row()]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(trials_table(rows, rows[0]["defense"]))
    text = console.export_text()
    assert "0.5000" in text and "it overflowed" in text and "Search over 2 settings" in text
