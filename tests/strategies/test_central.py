"""Runs under central privacy: repeated, interrupted, verified, compared, halted."""

import json

import pandas as pd
import pytest

from fedaudit.accounting import Ledger, epsilon, noise_multiplier_for
from fedaudit.cli import main
from fedaudit.config import RunConfig
from fedaudit.defenses.central_dp import CentralPrivacy
from fedaudit.errors import ConfigError, RecordError
from fedaudit.federation.checks import check
from fedaudit.federation.execution import execute
from fedaudit.federation.folders import run_folder
from fedaudit.federation.setup import setup
from fedaudit.flower.central_dp import CentralDP
from fedaudit.progress import listen
from fedaudit.records import load_run
from fedaudit.report.guarantees import worst_epsilon
from fedaudit.report.page import write_report
from fedaudit.report.provenance import notices
from fedaudit.report.tables import comparison_table
from fedaudit.verification.recorded import verify_run
from strategies.central import inner_fraction, protected
from strategies.flower_strategies import build_strategy

SMALL = {
    "data.max-examples": 200,
    "model.name": "mlp(hidden=8)",
    "federation.clients": 4,
    "federation.rounds": 4,
    "federation.fraction-train": 0.75,
    "federation.evaluate-every": 4,
    "train.batch-size": 8,
    "train.local-steps": 2,
    "train.lr": 0.5,
    "audit.measures": "update-norm",
    "audit.save-updates": True,
}
ADAPTIVE = "central-dp(noise-multiplier=0.4, epsilon=0, clip=0.3, adaptive=true, count-noise=0.5)"
POISSON = "top-k(fraction=0.2) then central-dp(noise-multiplier=0.6, epsilon=0, clip=0.3, sampling=poisson)"


def config(tmp_path, name, defense, **changes):
    flat = {**SMALL, "defense.name": defense, "output.directory": str(tmp_path), "output.name": name}
    return RunConfig.from_flat({**flat, **changes})


def comparable(folder):
    frame = load_run(folder).records.drop(columns=["run_id", "seconds"])
    frame = frame[frame["quantity"] != "round-seconds"]
    order = ["round", "quantity", "observer", "client_id"]
    return frame.sort_values(order, kind="stable", na_position="first").reset_index(drop=True)


def releases(run):
    rows = run.records[(run.records["quantity"] == "epsilon") & run.records["client_id"].isna()]
    return rows.sort_values("round").reset_index(drop=True)


def violated(folder):
    return [x for x in verify_run(folder) if x.verdict == "violated"]


@pytest.mark.parametrize(
    ("defense", "strategy"),
    [(ADAPTIVE, "FedAvg"), (POISSON, "FedAvg"), (ADAPTIVE, "FedAdam(eta=0.05)")],
    ids=["adaptive", "chained, Poisson", "FedAdam"],
)
def test_an_interrupted_run_resumes_to_the_weights_records_and_claims_of_an_uninterrupted_one(
    tmp_path, defense, strategy
):
    changes = {"strategy.name": strategy}
    execute(config(tmp_path, "whole", defense, **changes))

    def pull_the_plug(event):
        if event.stage == "round" and event.round == 2:
            raise KeyboardInterrupt

    cut = config(tmp_path, "cut", defense, **changes)
    with pytest.raises(KeyboardInterrupt), listen(pull_the_plug):
        execute(cut)
    resumed = execute(cut.with_(output__resume=True))
    whole, again = (comparable(tmp_path / name) for name in ("whole", "cut"))
    pd.testing.assert_frame_equal(whole, again, check_exact=True)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    rows = releases(resumed)
    assert [json.loads(extra)["releases"] for extra in rows["extra"]] == [1, 2, 3, 4]
    findings = verify_run(run_folder(cut))
    assert not [str(x) for x in findings if x.verdict == "violated"]
    about_noise = {x.verdict for x in findings if "Gaussian noise" in str(x.claim)}
    assert about_noise == ({"holds"} if strategy == "FedAvg" else {"cannot be checked by this observer"})


def test_two_runs_with_one_seed_are_identical_and_another_seed_draws_other_noise(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        execute(config(tmp_path, name, ADAPTIVE, seed=seed))
    first, second, other = ((tmp_path / name / "weights.safetensors").read_bytes() for name in "abc")
    assert first == second != other
    pd.testing.assert_frame_equal(comparable(tmp_path / "a"), comparable(tmp_path / "b"), check_exact=True)


def test_each_round_states_the_epsilon_of_all_rounds_so_far_and_the_last_spends_the_target(tmp_path):
    run = execute(config(tmp_path, "run", "central-dp(epsilon=6, clip=0.3)"))
    rows, z = releases(run), noise_multiplier_for(6.0, 1e-5, 1.0, 4)
    expected = [epsilon(Ledger(((z, 1.0, n),)), 1e-5) for n in (1, 2, 3, 4)]
    assert rows["value"].tolist() == rows["epsilon"].tolist() == pytest.approx(expected)
    assert 5.95 < rows["epsilon"].max() <= 6.0
    assert set(rows["privacy_unit"]) == {"client"} and set(rows["accountant"]) == {"rdp"}
    stated = json.loads(rows["extra"].iloc[0])
    assert (stated["adversary"], stated["cohort"], stated["clients"]) == ("outsider", 3, 4)
    assert stated["noise-std"] == pytest.approx(z * 0.3 / 3)
    assert "train-loss" not in set(run.records["quantity"])
    own = run.records[run.records["client_id"].notna()]
    assert own["epsilon"].isna().all()  # nothing protects a client's update from the server
    assert run.summary["epsilon"]["unit"] == "client" and run.summary["epsilon"]["adversary"] == "outsider"


def test_the_command_line_verifies_a_run_and_finds_one_that_claims_too_much(tmp_path, capfd):
    folder = execute(config(tmp_path, "run", "central-dp(noise-multiplier=0.5, epsilon=0, clip=0.3)")).path
    assert main(["verify", str(folder), "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    held = {row["claim"].split(" of std")[0] for row in answer["findings"] if row["verdict"] == "holds"}
    assert any("Gaussian noise" in claim for claim in held) and any("-DP per client" in c for c in held)
    description = folder / "run.toml"
    honest = description.read_text()
    for true, false, words in (
        ("noise-multiplier=0.5", "noise-multiplier=1.0", "Gaussian noise"),
        ("clip=0.3", "clip=0.1", "norm <= 0.1"),
    ):
        description.write_text(honest.replace(true, false))
        assert any(words in str(x.claim) for x in violated(folder)), false
    description.write_text(honest)
    assert not violated(folder)


def test_a_run_stops_adding_rounds_at_its_budget_and_holds_the_model(tmp_path):
    defense = "central-dp(noise-multiplier=2, epsilon=4, clip=0.3)"
    run = execute(config(tmp_path, "run", defense))
    rows = releases(run)
    assert rows["status"].tolist() == ["ok", "ok", "skipped", "skipped"]
    assert rows["epsilon"].max() <= 4.0 and "the model is held" in rows["reason"].iloc[2]
    short = execute(config(tmp_path, "short", defense, **{"federation.rounds": 2}))
    weights = [(folder.path / "weights.safetensors").read_bytes() for folder in (run, short)]
    assert weights[0] == weights[1]
    trained = run.records[run.records["quantity"] == "update-norm"]["round"]
    assert set(trained) == {1, 2}
    assert not violated(run.path)


def test_it_is_compared_by_name_and_the_table_says_whom_it_holds_against(tmp_path):
    text = "none, dp-sgd(epsilon=8), central-dp(epsilon=8)"
    small = tmp_path / "small.toml"
    small.write_text(
        "\n".join(f"{key} = {json.dumps(value)}" for key, value in SMALL.items())
        + f'\ncompare.defenses = "{text}"\n'
    )
    assert main(["compare", str(small), "--output", str(tmp_path / "out"), "--json"]) == 0
    runs = [load_run(path.parent) for path in sorted((tmp_path / "out").rglob("run.toml"))]
    table = comparison_table(runs).set_index("defense")
    assert set(table.index) == {"none", "dp-sgd(epsilon=8)", "central-dp(epsilon=8)"}
    row = table.loc["central-dp(epsilon=8)"]
    assert (row["privacy-unit"], row["adversary"]) == ("client", "outsider")
    assert "client, rdp, against an outsider" in row["guarantee"] and 7.9 < row["epsilon"] <= 8.0
    assert table.loc["dp-sgd(epsilon=8)", "adversary"] == "anyone" and table.loc["none", "adversary"] == ""
    assert any("central-dp(epsilon=8) protects the released models" in line for line in notices(runs))
    page = write_report(runs, tmp_path / "report.html").read_text()
    assert "against an outsider" in page


def test_measures_are_of_the_raw_updates_that_the_server_sees(tmp_path):
    norms = {}
    for name in ("none", "central-dp(epsilon=8, clip=0.001)"):
        changes = {"federation.rounds": 1}
        records = execute(config(tmp_path, name.split("(")[0], name, **changes)).records
        norms[name] = records[records["quantity"] == "update-norm"]["value"].tolist()
    assert norms["none"] == norms["central-dp(epsilon=8, clip=0.001)"] and min(norms["none"]) > 0.001


@pytest.mark.parametrize(
    ("defense", "changes", "message"),
    [
        ("central-dp", {"strategy.name": "FedMedian"}, "take a plain mean, got FedMedian"),
        ("central-dp", {"strategy.name": "QFedAvg(client-learning-rate=0.1)"}, "plain mean, got QFedAvg"),
        (
            "central-dp",
            {
                "strategy.name": "DifferentialPrivacyServerSideFixedClipping"
                "(noise-multiplier=1, clipping-norm=1)"
            },
            "got the wrapper DifferentialPrivacyServerSideFixedClipping",
        ),
        ("central-dp(delta=0.3)", {}, "delta must be under 1 / clients = 0.25, got 0.3"),
        ("top-k then central-dp(weights=capped)", {}, "weights=capped goes with cap > 0"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(tmp_path, defense, changes, message):
    with pytest.raises(ConfigError, match=message):
        check(config(tmp_path, "x", defense, **changes))
    assert not list(tmp_path.iterdir())


def test_the_strategy_is_wrapped_only_by_a_defense_that_acts_on_the_aggregate(tmp_path):
    for defense, wrapped in (("none", False), ("gaussian", False), ("central-dp", True), (POISSON, True)):
        made = setup(config(tmp_path, "x", defense).flat())
        fraction = inner_fraction(made)
        inner = build_strategy("FedAvg", clients=4, fraction_train=fraction, min_available=4)
        outer = protected(inner, made)
        assert isinstance(outer, CentralDP) == wrapped and (wrapped or outer is inner)
        assert fraction == (1.0 if defense == POISSON else 0.75)
        if wrapped:
            assert (outer.plan.clients, outer.plan.cohort) == (4, 3)


def test_a_resumed_run_with_another_sampling_is_refused(tmp_path):
    fixed = "central-dp(noise-multiplier=1, epsilon=0)"
    execute(config(tmp_path, "run", fixed, **{"federation.rounds": 1}))
    other = config(tmp_path, "run", fixed.replace(")", ", sampling=poisson)"), **{"output.resume": True})
    with pytest.raises(RecordError, match="the sampling it began with"):
        execute(other)


def test_an_epsilon_without_bound_is_recorded_as_no_guarantee(tmp_path):
    run = execute(config(tmp_path, "run", "central-dp(noise-multiplier=0.001, epsilon=0)"))
    assert str(worst_epsilon(run.records)).startswith("no formal guarantee")
    assert CentralPrivacy(noise_multiplier=0.001, epsilon=0.0).central_plan(4, 3).mechanism.divisor == 3
    assert not violated(run.path)
