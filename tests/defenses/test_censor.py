"""Censoring and larger batches as defenses: options, counts, chains, and whole federations."""

import json

import pandas as pd
import pytest
import torch
from torch import nn

from fedaudit.accounting import Ledger
from fedaudit.attacks.threat_card import threat_card
from fedaudit.config import RunConfig
from fedaudit.defenses.base import RemovesExamples, removing, training_under
from fedaudit.defenses.censor import Censor
from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.defenses.larger_batch import LargerBatch
from fedaudit.defenses.none import NoDefense
from fedaudit.errors import ConfigError
from fedaudit.federation.checks import check
from fedaudit.federation.execution import execute
from fedaudit.federation.setup import setup
from fedaudit.kept_files import load_update, update_file
from fedaudit.offline.attacks import diagnose_run
from fedaudit.progress import listen
from fedaudit.records import load_run
from fedaudit.registry import DEFENSES, changes_update
from fedaudit.spec import parse_spec
from fedaudit.training.local import TrainSettings, steps_per_round
from fedaudit.verification.configured import ConfiguredClaims
from fedaudit.verification.recorded import verify_run

SMALL = {
    "data.max-examples": 120,
    "model.name": "mlp(hidden=8)",
    "federation.clients": 2,
    "federation.rounds": 3,
    "train.batch-size": 8,
    "train.local-epochs": 2,
    "train.lr": 0.3,
    "audit.measures": "update-norm",
    "audit.save-updates": True,
}
ROWS = (
    "censored-examples",
    "uniqueness-before",
    "uniqueness-before-max",
    "uniqueness-after",
    "uniqueness-after-max",
)


def config(folder, name, defense, **changes):
    flat = {**SMALL, "defense.name": defense, "output.directory": str(folder), "output.name": name}
    return RunConfig.from_flat(
        {**flat, **{k.replace("__", ".").replace("_", "-"): v for k, v in changes.items()}}
    )


def built(text):
    return DEFENSES.build(parse_spec(text))


def weights(run):
    return (run.path / "weights.safetensors").read_bytes()


def updates(run, made):
    rounds = range(1, made.config.federation.rounds + 1)
    return [load_update(update_file(run.path / "updates", r, c)) for r in rounds for c in range(made.clients)]


def comparable(run):
    frame = run.records.drop(columns=["run_id", "seconds", "defense"])
    frame = frame[frame["quantity"] != "round-seconds"]
    order = ["round", "quantity", "observer", "client_id"]
    return frame.sort_values(order, kind="stable", na_position="first").reset_index(drop=True)


# --- options and counts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "onion", "examples", "removals"),
    [
        (0.1, 1, 20, (2,)),
        (0.3, 1, 10, (3,)),
        (0.1, 1, 11, (2,)),
        (0.01, 1, 5, (1,)),
        (0.5, 2, 10, (2, 3)),
        (0.2, 9, 10, (1, 1)),
        (0.99, 1, 4, (3,)),
        (0.5, 1, 1, ()),
        (0.0, 3, 10, ()),
    ],
)
def test_the_share_to_remove_is_rounded_up_and_spread_over_passes(fraction, onion, examples, removals):
    assert Censor(fraction, onion=onion).removals(examples) == removals


def test_a_larger_batch_changes_batches_and_on_request_the_learning_rate():
    settings = TrainSettings(batch_size=8, lr=0.25, local_epochs=3)
    larger = LargerBatch(4).settings(settings)
    assert (larger.batch_size, larger.lr, larger.local_epochs) == (32, 0.25, 3)
    assert LargerBatch(4, scale_lr=True).settings(settings).lr == 1.0
    assert LargerBatch(1).settings(settings) == settings == training_under(NoDefense(), settings)
    assert steps_per_round(20, larger) == 3  # all of a client's examples at once


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("censor(fraction=1)", r"fraction must lie in \[0, 1\), got 1.0"),
        ("censor(fraction=-0.1)", r"fraction must lie in \[0, 1\), got -0.1"),
        ("censor(onion=0)", "onion must be >= 1, got 0"),
        ("censor(permanent=true, rehearsal=0)", "rehearsal must be >= 1, got 0"),
        ("censor(rehearsal=3)", "rehearsal belongs to permanent=true, got rehearsal=3 without"),
        ("censor(ridge-share=0)", "ridge-share must be a number > 0, got 0.0"),
        ("larger-batch(factor=0)", "factor must be a whole number >= 1, got 0"),
        ("larger-batch(factor=1.5)", "valid integer"),
    ],
)
def test_impossible_options_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        built(spec)


def test_a_rehearsal_that_dropout_would_make_unrepeatable_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    release = Censor().release(10, 5, 1)
    assert Censor().prepare(model, optimizer, release, 5, None) == (model, optimizer)
    with pytest.raises(ValueError, match=r"got Dropout with p=0.1: set permanent=false or p=0"):
        Censor(permanent=True).prepare(model, optimizer, release, 5, None)


# --- chains -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dp-sgd then censor", "censor voids the guarantee of dp-sgd, as one example more or less"),
        ("censor then dp-sgd", "censor voids the guarantee of dp-sgd, as one example more or less"),
        ("leakage-adaptive then censor", "stands alone, got leakage-adaptive"),
        ("censor then censor(fraction=0.2)", "removes examples, got censor and censor: keep one"),
    ],
)
def test_chains_in_which_removal_would_void_a_guarantee_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        built(text)


def test_removal_is_found_in_a_chain_and_a_clients_guarantee_survives_it():
    for text in ("censor(fraction=0.2) then gaussian", "top-k then censor(fraction=0.2)"):
        assert removing(built(text)) == Censor(0.2)
    assert removing(built("top-k then sign")) is None and isinstance(Censor(), RemovesExamples)
    chained, alone = built("censor then gaussian").over_rounds(3), built("gaussian").over_rounds(3)
    ledger = chained.charge(Ledger(), chained.release(50, 8, 3), 3, 50)
    assert chained.guarantee(ledger, 50) == alone.guarantee(ledger, 50)
    assert built("censor").guarantee(Ledger(), 50) is None


def test_the_noise_of_dp_sgd_is_planned_for_the_larger_batch(tmp_path):
    made = check(config(tmp_path, "dp", "dp-sgd(epsilon=8) then larger-batch(factor=3)"))
    examples, steps = made.num_examples(0), 0
    release = made.release(examples)
    assert release.sample_rate == 24 / examples
    steps = 3 * 2 * -(-examples // 24)
    assert release == DPSGD(epsilon=8).release(examples, 24, steps)
    assert made.defense.guarantee(
        made.defense.charge(Ledger(), release, steps, examples), examples
    ).epsilon == pytest.approx(8, rel=1e-3)


def test_neither_changes_the_finished_update():
    assert changes_update("censor(fraction=0.2) then larger-batch then top-k") == ["top-k"]


# --- federations --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return execute(config(tmp_path_factory.mktemp("plain"), "plain", "none"))


@pytest.fixture(scope="module")
def censored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("censored")
    settings = config(
        folder,
        "censored",
        "censor(fraction=0.2, onion=2)",
        audit__observers="server, client, oracle",
        audit__measures="update-norm, example-gradient-uniqueness",
    )
    return execute(settings), setup(settings.flat())


@pytest.mark.parametrize("spec", ["censor(fraction=0)", "larger-batch(factor=1)"])
def test_a_federation_in_which_nothing_is_done_is_that_without_a_defense_bit_for_bit(tmp_path, plain, spec):
    run = execute(config(tmp_path, "run", spec))
    assert weights(run) == weights(plain)
    pd.testing.assert_frame_equal(comparable(run), comparable(plain), check_exact=True)


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        ("larger-batch(factor=3)", {"train__batch_size": 24}),
        ("larger-batch(factor=100)", {"train__batch_size": 800}),
        ("larger-batch(factor=2, scale-lr=true)", {"train__batch_size": 16, "train__lr": 0.6}),
    ],
)
def test_a_larger_batch_is_the_federation_configured_with_it(tmp_path, spec, changes):
    run, configured = execute(config(tmp_path, "a", spec)), config(tmp_path, "b", "none", **changes)
    same = execute(configured)
    assert weights(run) == weights(same)
    made, other = setup(config(tmp_path, "a", spec).flat()), setup(configured.flat())
    for number in (1, 3):
        ctx, expected = made.context(number), other.context(number)
        assert (ctx.batch_size, ctx.lr) == (expected.batch_size, expected.lr)
        recorded = ConfiguredClaims(made.config).settings(number)
        assert recorded == made.settings(number) == other.settings(number)
    update = updates(run, made)[0]
    card = threat_card(made.build_model(), update, made.context(1), {}, made.config.defense.name)
    assert card.batch_size == changes["train__batch_size"] and card.defense == "larger-batch"
    assert card.local_steps == int(update.reported["steps"]) and "no defense" not in card.favours


@pytest.mark.parametrize(
    "spec",
    [
        "censor(fraction=0.2)",
        "censor(fraction=0.2, onion=2, permanent=true, rehearsal=2)",
        "censor(fraction=0.1) then larger-batch(factor=2) then top-k(fraction=0.5)",
    ],
)
def test_a_resumed_federation_is_the_uninterrupted_one(tmp_path, spec):
    whole = execute(config(tmp_path, "whole", spec, audit__observers="server, client"))

    def pull_the_plug(event):
        if event.stage == "round" and event.round == 2:
            raise KeyboardInterrupt

    cut = config(tmp_path, "cut", spec, audit__observers="server, client")
    with pytest.raises(KeyboardInterrupt), listen(pull_the_plug):
        execute(cut)
    again = execute(cut.with_(output__resume=True))
    assert weights(whole) == weights(again)
    pd.testing.assert_frame_equal(comparable(whole), comparable(again), check_exact=True)
    assert not [str(x) for x in verify_run(again.path) if x.verdict == "violated"]


def test_clients_state_the_examples_they_kept_and_the_steps_they_took_on_them(censored):
    run, made = censored
    for update in updates(run, made):
        held = len(made.partitions[update.client_id])
        kept = held - sum(Censor(0.2, onion=2).removals(held))
        assert update.num_examples == kept == made.num_examples(update.client_id) < held
        assert int(update.reported["steps"]) == 2 * -(-kept // 8) == made.context(update.round).steps(update)
        assert made.release_of(update).sample_rate == 8 / kept
        batches = made.batches(update.client_id, update.round)
        assert sorted(torch.cat(batches).tolist()) == sorted([*range(kept)] * 2)
    card, _ = diagnose_run(run, 1, 2)
    assert card.local_steps == int(updates(run, made)[0].reported["steps"])


def test_what_an_oracle_calls_the_truth_is_what_clients_trained_on(tmp_path):
    settings = config(tmp_path, "one", "censor(fraction=0.3)", train__local_steps=1, train__batch_size=1000)
    run, made = execute(settings), setup(settings.flat())
    found = updates(run, made)
    chosen = set()
    for update in found:
        truth, evidence = made.truth(update), made.evidence(update)
        assert len(truth.y) == update.num_examples == len(evidence.y)
        model = made.build_model()
        model.load_state_dict(dict(update.before))
        for x, y, agrees in ((truth.x, truth.y, True), (*made.client_data(update.client_id), False)):
            loss = nn.functional.cross_entropy(model(x), y)
            gradient = torch.autograd.grad(loss, list(model.parameters()))
            step = torch.cat([-made.settings(update.round).lr * g.reshape(-1) for g in gradient])
            error = float((step - update.flat).norm() / step.norm())
            assert (error < 1e-5) if agrees else (error > 1e-2)
        chosen.add((update.client_id, *made.rows(update.client_id, update.before).tolist()))
    assert len(chosen) > made.clients  # rounds choose anew


def test_a_permanent_choice_is_the_same_in_every_round(tmp_path):
    settings = config(tmp_path, "p", "censor(fraction=0.3, permanent=true)")
    run, made = execute(settings), setup(settings.flat())
    chosen = {
        (update.client_id, *made.rows(update.client_id, update.before).tolist())
        for update in updates(run, made)
    }
    assert len(chosen) == made.clients


def test_another_process_finds_the_same_truth_from_the_recorded_update(censored):
    run, made = censored
    fresh = type(made)(made.config, made.clients)
    for update in updates(run, made):
        assert torch.equal(fresh.truth(update).x, made.truth(update).x)


def test_clients_report_how_unique_their_examples_were_before_and_after(censored):
    run, made = censored
    rows = run.records[run.records["quantity"].isin(ROWS)]
    assert set(rows["observer"]) == {"client"} and set(rows["status"]) == {"ok"}
    value = rows.pivot(index=["round", "client_id"], columns="quantity", values="value")
    assert value.shape == (6, len(ROWS)) and value.notna().all(axis=None)
    assert (value["uniqueness-after"] > value["uniqueness-before"]).all()
    assert (value["uniqueness-after-max"] >= value["uniqueness-before-max"]).all()
    for (number, client), row in value.iterrows():
        update = load_update(update_file(run.path / "updates", int(number), int(client)))
        again = made.peeled(int(client), update.before)
        assert row["censored-examples"] == len(made.partitions[int(client)]) - update.num_examples
        assert row["uniqueness-after"] == pytest.approx(float(again.after.mean()), rel=1e-9)
    extra = json.loads(rows[rows["quantity"] == "uniqueness-after"]["extra"].iloc[0])
    assert extra["removed-min"] > 0 and extra["removed"] + extra["left"] == len(made.partitions[0])


def test_measures_of_client_and_oracle_speak_of_the_examples_that_were_kept(censored):
    run, made = censored
    rows = run.records[run.records["quantity"] == "example-gradient-uniqueness"]
    found = rows.pivot(index=["round", "client_id"], columns="observer", values="value")
    assert (found["client"] == found["oracle"]).all() and len(found) == 6
    sizes = {json.loads(extra)["examples"] for extra in rows["extra"]}
    assert sizes == {made.num_examples(client) for client in range(made.clients)}


def test_without_an_observer_on_the_client_nothing_is_reported(tmp_path):
    run = execute(config(tmp_path, "quiet", "censor(fraction=0.2)"))
    assert not set(run.records["quantity"]) & set(ROWS)
    assert set(load_run(run.path).records["status"]) == {"ok"}


def test_an_attack_is_scored_against_the_examples_that_were_kept(tmp_path):
    changes = {
        "federation__clients": 12,
        "federation__rounds": 1,
        "train__batch_size": 64,
        "train__local_steps": 1,
        "model__name": "mlp(hidden=128)",
        "attack__names": "spear",
        "audit__observers": "server, oracle",
    }
    run = execute(config(tmp_path, "attacked", "censor(fraction=0.4)", **changes))
    row = run.records[run.records["quantity"] == "spear.psnr"].iloc[0]
    extra = json.loads(row["extra"])
    made = setup(config(tmp_path, "attacked", "censor(fraction=0.4)", **changes).flat())
    assert extra["truth-examples"] == extra["matched"] == made.num_examples(0) < len(made.partitions[0])
    assert row["value"] > 60 and extra["card-defense"] == "censor"
