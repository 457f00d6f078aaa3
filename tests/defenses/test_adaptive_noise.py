"""Noise that changes over the rounds, within one budget."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from fedaudit.accounting import Ledger, RenyiFilter, epsilon
from fedaudit.config import RunConfig
from fedaudit.defenses.adaptive_noise import LeakageAdaptive
from fedaudit.defenses.base import AdaptiveDefense, Defense, RunPlan
from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.defenses.none import NoDefense
from fedaudit.errors import BudgetExhaustedError, ConfigError
from fedaudit.federation.checks import check
from fedaudit.federation.execution import execute
from fedaudit.federation.setup import setup
from fedaudit.progress import listen
from fedaudit.records import load_run
from fedaudit.registry import DEFENSES
from fedaudit.spec import parse_spec
from fedaudit.types import ClientUpdate, StepRelease
from strategies import checkpoint

ROUNDS, BATCH, EXAMPLES = 8, 10, 100
PLAN = RunPlan(ROUNDS, BATCH, lambda examples: math.ceil(examples / BATCH))
DRIVERS = {
    "constant": LeakageAdaptive(driver="constant"),
    "linear": LeakageAdaptive(driver="decay", decay="linear", ratio=0.4),
    "exponential": LeakageAdaptive(driver="decay", ratio=0.6),
    "leakage": LeakageAdaptive(),
    "strong leakage": LeakageAdaptive(gamma=3.0, low=0.3, high=3.0),
    "small budget": LeakageAdaptive(epsilon=0.7),
}


def live(defense, leakages, rounds=range(1, ROUNDS + 1)):
    """Noise multiplier of each round that a client takes part in, and its ledger."""
    planned, ledger, noises = defense.planned(PLAN), Ledger(), []
    for number in rounds:
        release = planned.release_in_round(EXAMPLES, number, ledger, leakages[number - 1])
        ledger = planned.charge(ledger, release, PLAN.steps(EXAMPLES), EXAMPLES)
        noises.append(release.noise_std / release.clip_norm)
        assert planned.guarantee(ledger, EXAMPLES).epsilon <= defense.epsilon
        assert epsilon(ledger, planned.delta_for(EXAMPLES)) <= defense.epsilon
    return np.array(noises), planned, ledger


def leakages(seed):
    draws = np.random.default_rng(seed)
    kind = seed % 4
    if kind == 0:
        return [None, *np.exp(draws.normal(size=ROUNDS))]
    return [None, *[(0.0, 1e3, 1.0)[kind - 1]] * ROUNDS]


@pytest.mark.parametrize("name", DRIVERS)
def test_every_driver_spends_the_budget_and_never_more(name):
    for seed in range(8):
        _, planned, ledger = live(DRIVERS[name], leakages(seed))
        total = planned.guarantee(ledger, EXAMPLES).epsilon
        assert 0.999 * planned.epsilon < total <= planned.epsilon
        with pytest.raises(
            BudgetExhaustedError, match=f"above the budget of {planned.epsilon:g} at delta=1.0e-05"
        ):
            planned.charge(ledger, StepRelease(1.0, 1.0, 0.1), 10, EXAMPLES)


@pytest.mark.parametrize("name", ["leakage", "strong leakage", "small budget"])
def test_noise_stays_within_its_bounds_whatever_is_measured(name):
    defense = DRIVERS[name]
    sigma = live(LeakageAdaptive(defense.epsilon, driver="constant"), [None] * ROUNDS)[0][0]
    for seed in range(12):
        noises, _, _ = live(defense, leakages(seed))
        assert noises.min() >= defense.low * sigma * (1 - 1e-3)
        assert noises.max() <= defense.high * sigma * (1 + 1e-3)


def test_more_leakage_means_more_noise_in_the_next_round_and_less_later():
    calm = [None] + [1.0] * (ROUNDS - 1)
    alarmed = calm.copy()
    alarmed[3] = 1.5
    before, after = live(LeakageAdaptive(), calm)[0], live(LeakageAdaptive(), alarmed)[0]
    np.testing.assert_allclose(after[:3], before[:3], rtol=1e-5)
    assert after[3] == pytest.approx(1.5 * before[3], rel=1e-4)
    assert (after[4:] < before[4:]).all()


@pytest.mark.parametrize("leakage", [None, math.nan])
def test_without_a_measurement_noise_is_constant(leakage):
    constant = live(DRIVERS["constant"], [None] * ROUNDS)[0]
    assert len(set(constant)) == 1
    np.testing.assert_allclose(live(LeakageAdaptive(), [leakage] * ROUNDS)[0], constant, rtol=1e-4)


@pytest.mark.parametrize("target", [1.0, 8.0])
def test_constant_noise_is_that_of_dp_sgd_but_for_the_filters_price(target):
    """Within 1.5 % of DP-SGD's noise at the same epsilon, and never less."""
    plain = DPSGD(target).release(EXAMPLES, BATCH, ROUNDS * PLAN.steps(EXAMPLES)).noise_std
    noise = live(LeakageAdaptive(target, driver="constant"), [None] * ROUNDS)[0][0]
    assert plain < noise < 1.015 * plain


def test_decaying_schedules_have_their_shape():
    linear = live(DRIVERS["linear"], [None] * ROUNDS)[0]
    np.testing.assert_allclose(np.diff(linear), np.diff(linear)[0], rtol=1e-9)
    assert linear[-1] / linear[0] == pytest.approx(0.4)
    falling = live(DRIVERS["exponential"], [None] * ROUNDS)[0]
    np.testing.assert_allclose(falling[1:] / falling[:-1], 0.6 ** (1 / (ROUNDS - 1)), rtol=1e-9)


@pytest.mark.parametrize("name", DRIVERS)
def test_a_client_that_sits_rounds_out_stays_within_the_budget(name):
    for seed, rounds in enumerate([(2, 5, 8), (1, 2, 3), (6, 8), (8,)]):
        noises, planned, ledger = live(DRIVERS[name], leakages(seed), rounds)
        assert planned.guarantee(ledger, EXAMPLES).epsilon < planned.epsilon
        assert ledger.steps == len(noises) * PLAN.steps(EXAMPLES)


def test_the_same_ledger_and_number_give_the_same_noise_after_a_restart():
    planned = LeakageAdaptive().planned(PLAN)
    ledger = live(LeakageAdaptive(), leakages(0), range(1, 5))[2]
    again = LeakageAdaptive().planned(PLAN)
    kept = Ledger.from_lists(ledger.to_lists())
    assert again.release_in_round(EXAMPLES, 5, kept, 0.8) == planned.release_in_round(
        EXAMPLES, 5, ledger, 0.8
    )
    assert again.guarantee(kept, EXAMPLES) == planned.guarantee(ledger, EXAMPLES)


def test_the_guarantee_is_the_filters():
    _, planned, ledger = live(LeakageAdaptive(), leakages(0), range(1, 4))
    given = planned.guarantee(ledger, EXAMPLES)
    assert (given.delta, given.unit, given.accountant) == (1e-5, "example", "rdp-filter")
    constant = planned.release(EXAMPLES, BATCH, ROUNDS * PLAN.steps(EXAMPLES)).noise_std
    plan = Ledger().add(constant, BATCH / EXAMPLES, ROUNDS * PLAN.steps(EXAMPLES))
    assert given.epsilon == RenyiFilter.for_plan(8.0, 1e-5, plan).after(ledger).odometer.epsilon


def test_other_defenses_are_not_asked_for_a_round():
    assert isinstance(LeakageAdaptive(), AdaptiveDefense) and isinstance(LeakageAdaptive(), Defense)
    assert not isinstance(DPSGD(), AdaptiveDefense) and not isinstance(NoDefense(), AdaptiveDefense)
    assert LeakageAdaptive(driver="decay").signal == "" and LeakageAdaptive().signal == "mutual-information"


def test_without_a_plan_there_is_nothing_to_divide():
    for call in (
        lambda d: d.charge(Ledger(), StepRelease(1.0, 1.0, 0.1), 1, EXAMPLES),
        lambda d: d.guarantee(Ledger(), EXAMPLES),
        lambda d: d.release_in_round(EXAMPLES, 1, Ledger(), None),
    ):
        with pytest.raises(ValueError, match=r"got no plan of them: call planned"):
            call(LeakageAdaptive())
    with pytest.raises(ValueError, match="rounds 1 to 8, got round 9: plan more"):
        LeakageAdaptive().planned(PLAN).release_in_round(EXAMPLES, 9, Ledger(), None)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("leakage-adaptive(epsilon=0)", "epsilon must be a number > 0, got 0.0"),
        ("leakage-adaptive(driver=random)", "'constant', 'decay' or 'leakage'"),
        ("leakage-adaptive(decay=steps)", "'linear' or 'exponential'"),
        ("leakage-adaptive(ratio=0)", r"ratio must lie in \(0, 1\], got 0.0"),
        ("leakage-adaptive(gamma=-1)", "gamma must be a number >= 0, got -1.0"),
        ("leakage-adaptive(target=-1)", "target must be a number >= 0, got -1.0"),
        ("leakage-adaptive(low=1.5)", "hold 1 between them, got 1.5 and 2.0"),
        ("leakage-adaptive(high=0.9)", "hold 1 between them, got 0.5 and 0.9"),
        ("leakage-adaptive(clip-norm=0)", "clip-norm must be a number > 0, got 0.0"),
        ("leakage-adaptive(noise-multiplier=1)", "no option 'noise-multiplier'"),
    ],
)
def test_impossible_options_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        DEFENSES.build(parse_spec(spec))


# ---------------------------------------------------------------- in a federation

FEDERATION = {
    "data.max-examples": 300,
    "model.name": "mlp(hidden=8)",
    "federation.clients": 3,
    "federation.rounds": 4,
    "train.batch-size": 8,
    "train.local-steps": 2,
    "audit.measures": "update-norm",
}
SPECS = {
    "constant": "leakage-adaptive(epsilon=4, driver=constant)",
    "decay": "leakage-adaptive(epsilon=4, driver=decay, decay=linear)",
    "leakage": "leakage-adaptive(epsilon=4, driver=leakage, measure=update-norm, gamma=4)",
}


def config(tmp_path, name, spec, **changes):
    flat = {**FEDERATION, "output.directory": str(tmp_path), "output.name": name, "defense.name": spec}
    return RunConfig.from_flat({**flat, **changes})


def noises(folder):
    """Noise multipliers of each client's rounds, from the ledgers that the run kept."""
    nodes = checkpoint.load(folder / checkpoint.FILE).nodes
    return sorted(list(node["fedaudit-ledger"]["noise-multipliers"]) for node in nodes.values())


def test_all_drivers_end_at_the_same_epsilon_and_none_exceeds_it(tmp_path):
    paths = {}
    for name, spec in SPECS.items():
        records = execute(config(tmp_path, name, spec)).records
        assert not (records["status"] == "rejected").any()
        spent = records[records["quantity"] == "epsilon"]
        assert (spent["value"] <= 4.0).all() and set(spent["accountant"]) == {"rdp-filter"}
        assert (spent[spent["round"] == 4]["value"] > 0.99 * 4.0).all()
        growth = spent.pivot(index="client_id", columns="round", values="value").to_numpy()
        assert (np.diff(growth, axis=1) > 0).all()
        paths[name] = noises(tmp_path / name)
    assert all(len(path) == 1 for path in paths["constant"])
    assert all(path == sorted(path, reverse=True) and len(path) == 4 for path in paths["decay"])
    assert all(len(set(path)) == 4 for path in paths["leakage"])


def test_noise_follows_what_the_server_measured_in_the_round_before(tmp_path):
    records = execute(config(tmp_path, "run", SPECS["leakage"])).records
    norms = records[records["quantity"] == "update-norm"].groupby("round")["value"].mean().to_numpy()
    planned = setup(config(tmp_path, "run", SPECS["leakage"]).flat()).defense
    sizes = {len(rows) for rows in setup(config(tmp_path, "run", SPECS["leakage"]).flat()).partitions}
    ledger, expected = Ledger(), []
    (examples,) = sizes
    for number in range(1, 5):
        told = norms[number - 2] / norms[: number - 1].mean() if number > 1 else None
        release = planned.release_in_round(examples, number, ledger, told)
        ledger = planned.charge(ledger, release, 2, examples)
        expected.append(release.noise_std)
    for path in noises(tmp_path / "run"):
        assert path == pytest.approx(expected, rel=1e-6)


def test_a_resumed_run_draws_the_same_noise_as_an_uninterrupted_one(tmp_path):
    def pull_the_plug(event):
        if event.stage == "round" and event.round == 2:
            raise KeyboardInterrupt

    changes = {"federation.fraction-train": 0.7}
    execute(config(tmp_path, "whole", SPECS["leakage"], **changes))
    cut = config(tmp_path, "cut", SPECS["leakage"], **changes)
    with pytest.raises(KeyboardInterrupt), listen(pull_the_plug):
        execute(cut)
    execute(cut.with_(output__resume=True))
    frames = []
    for name in ("whole", "cut"):
        frame = load_run(tmp_path / name).records.drop(columns=["run_id", "seconds"])
        frames.append(frame[frame["quantity"] != "round-seconds"].reset_index(drop=True))
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    assert noises(tmp_path / "whole") == noises(tmp_path / "cut")
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_a_measure_sees_the_noise_that_was_drawn_in_its_round(tmp_path):
    made = setup(config(tmp_path, "run", SPECS["leakage"]).flat())
    stated = {"clip-norm": 1.0, "noise-std": 3.25, "sample-rate": 0.2}

    def update(reported):
        return ClientUpdate(0, 1, {}, {}, len(made.partitions[0]), reported)

    assert made.context(1).release(update(stated)) == StepRelease(1.0, 3.25, 0.2)
    assert made.evidence(update(stated)).release == StepRelease(1.0, 3.25, 0.2)
    planned = made.release(len(made.partitions[0]))
    for absurd in (
        {},
        {**stated, "noise-std": -1.0},
        {**stated, "sample-rate": 1.5},
        {**stated, "clip-norm": math.nan},
    ):
        assert made.context(1).release(update(absurd)) == planned
    plain = setup(config(tmp_path, "run", "dp-sgd").flat())
    assert plain.context(1).release(update(stated)) == plain.release(len(plain.partitions[0]))


def test_verification_affirms_the_noise_of_every_round(tmp_path):
    from fedaudit.claims import HOLDS, VIOLATED, GaussianNoise
    from fedaudit.federation.insight import insight
    from fedaudit.verification.recorded import verify_run

    changes = {"audit.save-updates": True, "train.local-steps": 1}
    spec = "leakage-adaptive(epsilon=4, driver=decay, ratio=0.3)"
    execute(config(tmp_path, "run", spec, **changes))
    findings = verify_run(tmp_path / "run", observer="oracle", insight=insight)
    assert not [finding for finding in findings if finding.verdict == VIOLATED]
    held = [f for f in findings if isinstance(f.claim, GaussianNoise) and f.verdict == HOLDS]
    by_round = {f.round: f.claim.std for f in held}
    assert set(by_round) == {1, 2, 3, 4} and by_round[4] == pytest.approx(0.3 * by_round[1])


@pytest.mark.parametrize(
    "spec, changes, message",
    [
        (
            "leakage-adaptive",
            {},
            "'mutual-information' as the server measures it: list that among audit.measures",
        ),
        (SPECS["leakage"], {"audit.observers": "oracle"}, "and 'server' among audit.observers"),
        (
            "leakage-adaptive(measure=example-gradient-uniqueness)",
            {"audit.measures": "example-gradient-uniqueness", "audit.observers": "server, oracle"},
            "what a server can measure, and 'example-gradient-uniqueness' is for client, oracle",
        ),
    ],
    ids=["not measured", "not by the server", "not for a server"],
)
def test_a_run_whose_noise_would_follow_nothing_is_refused(tmp_path, spec, changes, message):
    with pytest.raises(ConfigError, match=message):
        check(config(tmp_path, "run", spec, **changes))


def test_a_driver_that_follows_nothing_needs_no_measure(tmp_path):
    assert (
        check(
            config(tmp_path, "run", "leakage-adaptive(driver=decay)", **{"audit.measures": ""})
        ).defense.signal
        == ""
    )


def test_training_adds_the_noise_of_the_round():
    """Without examples the update is noise alone: its deviation is the round's."""
    from fedaudit.training.local import TrainSettings, train_locally

    planned = LeakageAdaptive(driver="decay", ratio=0.25).planned(PLAN)
    spread = []
    for number in (1, ROUNDS):
        model = torch.nn.Linear(50, 40)
        before = model.weight.detach().clone()
        release = planned.release_in_round(EXAMPLES, number, Ledger(), None)
        batches = [torch.empty(0, dtype=torch.int64)]
        settings = TrainSettings(lr=1.0, batch_size=1, local_steps=1)
        x, y = torch.zeros(1, 50), torch.zeros(1, dtype=torch.int64)
        noise = torch.Generator().manual_seed(number)
        train_locally(model, x, y, batches, settings, defense=planned, release=release, generator=noise)
        spread.append(float((model.weight.detach() - before).std()) / release.noise_std)
    assert spread == pytest.approx([1.0, 1.0], abs=5 / math.sqrt(2 * 2000))


def test_own_learning_rate_and_batch_size_reach_training_and_plan(tmp_path):
    spec = "leakage-adaptive(driver=constant, lr=0.7, batch-size=9)"
    changes = {"data.max-examples": 300, "federation.clients": 3, "federation.rounds": 2}
    made = setup(RunConfig.from_flat({**changes, "defense.name": spec}).flat())
    given = {"train.lr": 0.7, "train.batch-size": 9, "defense.name": "leakage-adaptive(driver=constant)"}
    same = setup(RunConfig.from_flat({**changes, **given}).flat())
    assert made.settings(2) == same.settings(2)
    size = len(made.partitions[0])
    assert made.release_in_round(size, 1, Ledger(), None) == same.release_in_round(size, 1, Ledger(), None)
    assert made.release_in_round(size, 1, Ledger(), None).sample_rate == pytest.approx(9 / size)
