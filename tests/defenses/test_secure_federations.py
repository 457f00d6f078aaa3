"""Federations under secure aggregation: what the server still sees, and that it trains."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

import fedaudit.simulation.in_process as in_process
from clients.client_app import app as reference_client
from fedaudit.audit.secure_sum import SUM, context_of_sum
from fedaudit.claims import UNCHECKED
from fedaudit.config import RunConfig
from fedaudit.errors import ConfigError
from fedaudit.federation.checks import check
from fedaudit.federation.execution import execute
from fedaudit.federation.setup import setup
from fedaudit.kept_files import load_update, sum_file
from fedaudit.measures.mutual_information import MutualInformation
from fedaudit.measures.privacy_tokens import PrivacyTokens
from fedaudit.needs import Needs, missing
from fedaudit.offline.attacks import attack_run, diagnose_run
from fedaudit.progress import listen
from fedaudit.records import load_run
from fedaudit.report.page import write_report
from fedaudit.report.provenance import notices
from fedaudit.report.tables import comparison_table
from fedaudit.studies.calibration import calibrate
from fedaudit.types import ClientUpdate, Guarantee, RoundContext, Skip, StepRelease
from fedaudit.verification.recorded import verify_run
from strategies import server_app

SECURE = "secure-aggregation"
SMALL = {
    "data.max-examples": 200,
    "model.name": "mlp(hidden=16, activation=tanh)",
    "federation.clients": 4,
    "federation.rounds": 1,
    "train.batch-size": 1,
    "train.local-steps": 1,
    "train.lr": 0.2,
    "audit.measures": "update-norm",
    "audit.save-updates": True,
}


def config(tmp_path, name, **changes):
    return RunConfig.from_flat({**SMALL, "output.directory": str(tmp_path), "output.name": name, **changes})


def weights(run):
    return load_file(run.path / "weights.safetensors")


def largest_difference(one, other):
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def of(records, quantity, observer="server"):
    return records[(records["quantity"] == quantity) & (records["observer"] == observer)]


@pytest.mark.parametrize(
    ("bits", "strategy"), [(10, "FedAvg"), (22, "FedAvg"), (22, "FedAvgM(server-momentum=0.9)")]
)
def test_the_model_is_that_of_plain_averaging_up_to_quantisation(tmp_path, bits, strategy):
    shared = {"strategy.name": strategy, "train.local-steps": 3, "data.partitioner": "dirichlet(alpha=1)"}
    plain = execute(config(tmp_path, "plain", **shared))
    summed = execute(config(tmp_path, "sum", **shared, **{"defense.name": f"{SECURE}(bits={bits})"}))
    total = sum(len(rows) for rows in setup(config(tmp_path, "plain", **shared).flat()).partitions)
    rounding = 4 * 16.0 / (2**bits - 1) / total  # one whole number per client, clip range from -8 to 8
    largest = max(float(w.abs().max()) for w in weights(plain).values())
    float32 = 8 * largest * torch.finfo(torch.float32).eps  # four products, four sums
    difference = largest_difference(weights(plain), weights(summed))
    assert 0 < difference < rounding + float32
    if bits == 10:
        assert difference > float32  # it is the quantisation that shows


def test_an_attack_on_the_sum_finds_the_examples_of_all_clients(tmp_path):
    run = execute(config(tmp_path, "s", **{"defense.name": SECURE, "attack.names": "dlg(iterations=400)"}))
    score, objective = (of(run.records, *key).iloc[0] for key in (("dlg.psnr", "oracle"), ("dlg.objective",)))
    assert pd.isna(score["client_id"]) and score["value"] > 40
    assert '"batch-size": 4' in objective["extra"] and '"sum-of-clients": 4' in objective["extra"]
    assert '"truth-examples": 4' in score["extra"] and '"matched": 4' in score["extra"]
    assert of(run.records, "dlg.label-accuracy", "oracle")["value"].tolist() == [1.0]


def test_what_needs_single_updates_is_skipped_and_says_what_hides_them(tmp_path):
    measures = "update-norm, update-cosine, cohort-gradient-uniqueness, usable-information, subspace-distance"
    run = execute(config(tmp_path, "s", **{"defense.name": SECURE, "audit.measures": measures}))
    records = run.records[~run.records["quantity"].str.endswith(".layer")]
    for name in measures.split(", ")[1:]:
        (row,) = of(records, name).to_dict("records")
        assert row["status"] == "skipped" and pd.isna(row["client_id"])
        assert row["reason"] == (
            "needs the updates of single clients, of which secure aggregation shows nothing but the sum of 4"
        )
    start, end = check(config(tmp_path, "x")).build_model().state_dict(), weights(run)
    moved = torch.cat([(end[name] - start[name]).double().flatten() for name in start]).norm()
    (norm,) = of(records, "update-norm").to_dict("records")
    assert norm["status"] == "ok" and norm["value"] == pytest.approx(float(moved), rel=1e-5)
    assert norm["extra"] == '{"sum-of-clients": 4}'


def test_clients_and_oracle_still_see_single_updates_and_no_loss_is_sent(tmp_path):
    changes = {
        "defense.name": SECURE,
        "audit.measures": "example-gradient-uniqueness",
        "audit.observers": "server, client, oracle",
    }
    records = execute(config(tmp_path, "s", **changes)).records
    for observer in ("client", "oracle"):
        own = of(records, "example-gradient-uniqueness", observer)
        assert sorted(own["client_id"]) == [0, 1, 2, 3] and set(own["status"]) == {"ok"}
    assert "train-loss" not in set(records["quantity"])
    assert "train-loss" in set(execute(config(tmp_path, "n")).records["quantity"])


def test_only_the_sum_is_kept_and_claims_about_single_updates_cannot_be_checked(tmp_path):
    defense = f"dp-sgd(noise-multiplier=1, epsilon=0) then {SECURE}"
    run = execute(config(tmp_path, "s", **{"defense.name": defense, "federation.rounds": 2}))
    assert sorted(path.name for path in (run.path / "updates").iterdir()) == [
        "round-00001-sum.safetensors",
        "round-00002-sum.safetensors",
    ]
    kept = load_update(sum_file(run.path / "updates", 2))
    assert kept.summed == (0, 1, 2, 3) and kept.client_id == SUM and kept.num_examples == 144
    findings = verify_run(run.path)
    assert {x.verdict for x in findings} == {UNCHECKED}
    assert all("nothing but the sum of 4 clients' updates" in x.reason for x in findings)
    claims = {type(x.claim).__name__ for x in findings if x.client_id == 3 and x.round == 2}
    assert {"GaussianNoise", "ClipNorm", "PoissonSampling", "EpsilonClaim"} <= claims
    epsilons = of(run.records, "epsilon", "client")
    assert sorted(epsilons["client_id"]) == [0, 0, 1, 1, 2, 2, 3, 3] and set(epsilons["status"]) == {"ok"}


def served(tmp_path, name, fails, **changes):
    """A run through the ServerApp in which some clients fail to train."""

    def reply(self, message, context):
        if message.metadata.message_type == "train" and context.node_config["partition-id"] in fails:
            raise RuntimeError("gone")
        return base._reply(self, message, context)

    base = in_process.InProcessGrid
    failing = type("InProcessGrid", (base,), {"_reply": reply})
    flat = config(tmp_path, name, **changes).flat()
    with failing(reference_client, 4, flat, seed=0) as grid:
        server_app.app(grid, Context(grid.run.run_id, 0, {}, RecordDict(), flat))
    return load_run(tmp_path / name)


@pytest.mark.parametrize("neighbours", [0, 2])
def test_after_a_client_dropped_out_the_sum_is_that_of_the_others(tmp_path, neighbours):
    plain = served(tmp_path, "plain", {2})
    spec = f"{SECURE}(threshold=3, neighbours={neighbours})"
    summed = served(tmp_path, "sum", {2}, **{"defense.name": spec})
    assert largest_difference(weights(plain), weights(summed)) < 1e-6
    kept = load_update(sum_file(summed.path / "updates", 1))
    assert kept.summed == (0, 1, 3) and kept.num_examples == 108
    refused = summed.records[summed.records["status"] == "rejected"]
    assert refused["client_id"].tolist() == [2]


def test_below_the_threshold_the_round_is_given_up_and_nothing_is_seen(tmp_path):
    run = served(tmp_path, "s", {2}, **{"defense.name": f"{SECURE}(threshold=4)", "attack.names": "dlg"})
    refused = run.records[run.records["status"] == "rejected"].set_index("client_id")["reason"]
    assert "gone" in refused[2] and sorted(refused.index) == [0, 1, 2, 3]
    assert "no sum of fewer than 4 clients, got 3: the round is given up" in refused[0]
    assert not set(run.records["quantity"]) & {"update-norm", "dlg.objective"}
    assert not (run.path / "updates").exists()
    start = check(config(tmp_path, "x")).build_model().state_dict()
    assert largest_difference(start, weights(run)) == 0


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path):
    changes = {"defense.name": f"top-k(fraction=0.5) then {SECURE}", "federation.rounds": 3}
    whole = execute(config(tmp_path, "whole", **changes))

    def pull_the_plug(event):
        if event.stage == "round" and event.round == 2:
            raise KeyboardInterrupt

    cut = config(tmp_path, "cut", **changes)
    with pytest.raises(KeyboardInterrupt), listen(pull_the_plug):
        execute(cut)
    assert largest_difference(weights(whole), weights(execute(cut.with_(output__resume=True)))) == 0


@pytest.mark.parametrize(
    "strategy",
    [
        *("FedMedian", "Krum", "MultiKrum", "Bulyan", "FedTrimmedAvg", "QFedAvg(client-learning-rate=0.1)"),
        "DifferentialPrivacyServerSideFixedClipping(noise-multiplier=1, clipping-norm=1)",
    ],
)
def test_a_strategy_that_needs_single_updates_is_refused(tmp_path, strategy):
    refused = config(tmp_path, "s", **{"defense.name": f"sign then {SECURE}", "strategy.name": strategy})
    with pytest.raises(
        ConfigError, match=r"needs single clients' updates, which secure .* choose one of FedAvg"
    ):
        check(refused)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defense.name": f"{SECURE}(threshold=5)"}, "no sum of 5 clients is ever released, as 4 are asked"),
        ({"federation.fraction-train": 0.3}, "no sum of 2 clients is ever released, as 1 are asked"),
        (
            {"attack.trigger": "update-norm > 1"},
            "looks for single clients, which secure .* list attack.rounds",
        ),
    ],
    ids=["threshold", "sampled", "trigger"],
)
def test_what_does_not_go_together_is_refused_before_the_run(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        check(config(tmp_path, "s", **{"defense.name": SECURE, **changes}))


def test_a_deployment_and_a_calibration_are_refused(tmp_path):
    class Deployed(in_process.InProcessGrid):
        """Not one of the simulation's grids by name: the server takes it for a deployment."""

    hidden = config(tmp_path, "s", **{"defense.name": SECURE, "compare.defenses": f"none, {SECURE}"})
    with (
        Deployed(reference_client, 4, hidden.flat(), seed=0) as grid,
        pytest.raises(ConfigError, match="not allowed in a deployment: secure aggregation is simulated"),
    ):
        server_app.app(grid, Context(grid.run.run_id, 0, {}, RecordDict(), hidden.flat()))
    with pytest.raises(ConfigError, match=r"compare.defenses with 'secure-aggregation', which hides them"):
        calibrate(hidden, tmp_path)


def test_a_comparison_with_no_defense_is_reported_and_says_what_can_be_audited(tmp_path):
    names = {"none": "none", "sum": SECURE}
    measures = {"audit.measures": "update-norm, cohort-gradient-uniqueness"}
    runs = [execute(config(tmp_path, n, **{"defense.name": d, **measures})) for n, d in names.items()]
    table = comparison_table(runs).set_index("defense")
    assert np.isfinite(table.loc[SECURE, "accuracy"]) and pd.isna(
        table.loc[SECURE, "cohort-gradient-uniqueness"]
    )
    (said,) = [text for text in notices(runs) if SECURE in text]
    assert "can audit the sum of a round's updates" in said and "no single update" in said
    page = tmp_path / "report.html"
    write_report(runs, page)
    assert "no single update: what compares clients is skipped" in page.read_text()
    assert f"{SECURE}: no formal guarantee" in page.read_text().replace("none and ", "")


def test_a_recorded_sum_is_attacked_later_and_diagnosed(tmp_path):
    run = execute(config(tmp_path, "s", **{"defense.name": SECURE}))
    later = attack_run(run, "linear-layer", tmp_path / "later")
    (row,) = of(later.records, "linear-layer.psnr", "oracle").to_dict("records")
    assert row["status"] == "ok" and pd.isna(row["client_id"]) and '"truth-examples": 4' in row["extra"]
    assert [p.name for p in (later.path / "attacks").iterdir()] == [
        "round-00001-sum-linear-layer.safetensors"
    ]
    card, advice = diagnose_run(run, 0, 1)
    assert card.batch_size == 4
    assert any("examples of all clients share the one sum" in r for a in advice for r in a.reasons)


SINGLES = {0: StepRelease(1.0, 0.5, 0.1), 1: StepRelease(1.0, 0.5, 0.1)}


def summed(examples=80, clients=(0, 1)):
    zero = {"w": torch.zeros(2)}
    return ClientUpdate(SUM, 1, zero, zero, examples, summed=clients)


def test_a_sum_of_first_steps_is_one_step_on_all_batches_with_all_noise():
    asked = []

    def release(update):
        asked.append((update.num_examples, update.summed))
        return StepRelease(1.0, 0.5, 8 / update.num_examples)

    ctx = RoundContext(1, lr=0.1, local_epochs=2, batch_size=8, num_updates=4, release=release)
    found = context_of_sum(ctx, summed(160, (0, 1, 2, 3)))
    assert found.batch_size == 32 and found.steps(summed(160, (0, 1, 2, 3))) == 10 and found.summed == 4
    assert found.release is not None
    assert found.release(summed()) == StepRelease(1.0, 1.0, 0.2) and asked == [(40, ())]
    assert Needs.COHORT not in found.known and Needs.SINGLE not in found.known and Needs.SINGLE in ctx.known


def test_the_noise_of_a_sum_has_the_standard_deviation_it_is_said_to_have():
    found = context_of_sum(RoundContext(1, batch_size=8, release=lambda u: SINGLES[0]), summed())
    draws = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)) * 0.5
    deviation = float(draws.sum(0).std())
    assert found.release is not None
    assert deviation == pytest.approx(found.release(summed()).noise_std, rel=5 / (2 * 20_000) ** 0.5)


@pytest.mark.parametrize(("second", "expected"), [(3.0, 3.0), (None, None)], ids=["worst", "one without"])
def test_the_guarantee_of_a_sum_is_that_of_the_worst_client(second, expected):
    stated = {0: Guarantee(2.0, 1e-5, "example", "rdp")}
    if second is not None:
        stated[1] = Guarantee(second, 1e-5, "example", "rdp")
    found = context_of_sum(RoundContext(1, guarantee=lambda u: stated.get(u.client_id)), summed())
    assert found.guarantee is not None
    held = found.guarantee(summed())
    assert (held.epsilon if held is not None else None) == expected


def test_what_a_sum_lacks_is_told_apart_from_what_a_small_round_lacks():
    needs = Needs.COHORT | Needs.SINGLE | Needs.MODEL
    assert missing(needs, Needs.MODEL, summed=3) == (
        "needs the updates of single clients, of which secure aggregation shows nothing but the sum of 3"
    )
    assert missing(Needs.COHORT, Needs.SINGLE) == "needs at least two valid updates in the round"


def measured(measure, made, **changes):
    update = ClientUpdate(SUM, 1, made.build_model().state_dict(), {}, 80, summed=(0, 1))
    ctx = replace(context_of_sum(made.context(1), update), **changes)
    return measure([update], ctx)[0]


def test_information_about_the_sum_is_measured_with_all_batches_or_not_at_all(tmp_path):
    made = setup(config(tmp_path, "x", **{"data.max-examples": 400, "train.batch-size": 3}).flat())
    quick = {"pairs": 4, "steps": 2, "candidates": 8, "permutations": 3}
    found = measured(MutualInformation(**quick), made)
    assert found.extra["batch"] == 6
    for small in (
        measured(MutualInformation(**quick), made, batch_size=50),
        measured(MutualInformation(**quick, batch=3), made),
        measured(PrivacyTokens(), made, batch_size=50),
    ):
        assert isinstance(small, Skip) and "the sum of 2 clients' steps holds" in small.reason
    several = measured(PrivacyTokens(), made, local_steps=2)
    assert isinstance(several, Skip) and "is no single training" in several.reason


def test_membership_is_that_of_the_sum_which_is_all_the_server_sees(tmp_path):
    shared = {
        "audit.measures": "membership-inference(match-labels=false)",
        "audit.observers": "server, oracle",
        "data.reference-fraction": 0.4,
        "train.batch-size": 100,  # all of a client's examples in one step
    }
    alone = execute(config(tmp_path, "alone", **shared)).records
    secured = config(tmp_path, "sum", **shared, **{"defense.name": SECURE})
    run, made = execute(secured), setup(secured.flat())
    (row,) = of(run.records, "membership-inference", "oracle").to_dict("records")
    assert row["status"] == "ok" and pd.isna(row["client_id"])

    update = load_update(sum_file(run.path / "updates", 1))
    evidence, reference = made.evidence(update), made.data.reference
    assert len(evidence.y) == sum(len(rows) for rows in made.partitions) < 256
    model = made.build_model().double()
    change = torch.cat([update.delta[name].reshape(-1) for name, _ in model.named_parameters()]).double()

    def score(one, label):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(one[None].double()), label[None]).backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        return float(-change @ gradient / gradient.norm())

    inside = np.array([score(*pair) for pair in zip(evidence.x, evidence.y, strict=True)])
    outside = np.array([score(*pair) for pair in zip(reference.x, reference.y, strict=True)])
    assert row["value"] == pytest.approx((inside[:, None] > outside[None]).mean(), abs=1e-3)
    single = of(alone, "membership-inference", "oracle")
    assert len(single) == 4 and row["value"] < single["value"].astype(float).min()


def test_scores_that_compare_clients_need_single_updates(tmp_path):
    shared = {"audit.observers": "server, oracle", "data.reference-fraction": 0.4, "defense.name": SECURE}
    run = execute(
        config(tmp_path, "fedmia", **shared, **{"audit.measures": "membership-inference(score=fedmia-loss)"})
    )
    (row,) = of(run.records, "membership-inference", "oracle").to_dict("records")
    assert row["status"] == "skipped" and "nothing but the sum of 4" in row["reason"]
