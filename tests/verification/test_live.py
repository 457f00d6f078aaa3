"""Claims are tested while the federation runs, and nothing that a test finds stops it."""

import json
import logging
import random
from typing import ClassVar

import numpy as np
import pytest
from flwr.serverapp import strategy as flower

from fedaudit.audit.auditor import Auditor
from fedaudit.claims import ClipNorm, GaussianNoise, Weights
from fedaudit.defenses.dp_sgd import DPSGD
from fedaudit.errors import RunFailedError
from fedaudit.flower.strategy import AuditStrategy
from fedaudit.progress import listen
from fedaudit.records import load_run
from fedaudit.registry import DEFENSES, Entry
from fedaudit.simulation.in_process import InProcessGrid
from fedaudit.verification import LiveVerifier, NoiseMemory
from fedaudit.verification.derive import central_claims
from fedaudit.verification.memory import KEPT, Sample
from fedaudit.verification.residuals import Residual

from . import federation as f
from . import flower_rounds
from .runs import ADAPTIVE, FIXED, run

PRIVATE = "dp-sgd(noise-multiplier=1, epsilon=0)"


def rows_of(records, status=None):
    rows = records[records["quantity"].str.startswith("verify.")]
    return rows if status is None else rows[rows["status"] == status]


def federation(folder, claims, app, strategy=None, rounds=2, **options):
    """A federation of somebody who wraps a strategy of their own."""
    auditor = Auditor(folder, "", verify=claims, **options)
    np.random.seed(0)
    with InProcessGrid(app, flower_rounds.N, seed=1) as grid:
        inner = strategy or flower.FedAvg(**flower_rounds.COMMON)
        AuditStrategy(inner, auditor).start(grid, flower_rounds.initial(), num_rounds=rounds)
    return load_run(folder).records


def test_a_run_records_a_row_for_every_claim_with_claim_and_verdict(tmp_path):
    rows = rows_of(run(tmp_path, defense__name=PRIVATE).records)
    assert set(rows["quantity"]) == {
        *("verify.gaussian-noise", "verify.independent-noise", "verify.clip-norm", "verify.weights"),
        *("verify.epsilon-claim", "verify.poisson-sampling", "verify.nothing-beside"),
    }
    assert set(rows["status"]) == {"ok", "skipped"} and set(rows["round"]) == {1, 2, 3}
    for row in rows.to_dict("records"):
        said = json.loads(row["extra"])
        assert said["claim"] and row["reason"]
        assert (
            said["verdict"] == {"ok": "holds", "skipped": "cannot be checked by this observer"}[row["status"]]
        )
    noise = rows[(rows["quantity"] == "verify.gaussian-noise") & rows["client_id"].notna()]
    assert noise["low"].le(noise["value"]).all() and noise["value"].le(noise["high"]).all()


def test_nothing_is_tested_unless_it_is_asked_for(tmp_path):
    assert not len(rows_of(run(tmp_path, audit__verify=False, defense__name=PRIVATE).records))


def test_only_audited_rounds_are_tested_and_epsilon_counts_all_of_them(tmp_path):
    rows = rows_of(run(tmp_path, defense__name=PRIVATE, audit__every=4, federation__rounds=4).records)
    assert set(rows["round"]) == {1, 4}
    last = rows[(rows["quantity"] == "verify.epsilon-claim") & (rows["round"] == 4)]
    assert len(last) == 3 and set(last["status"]) == {"ok"}  # recomputed over four rounds, not over two


def test_a_violated_claim_of_ones_own_strategy_is_recorded_announced_and_survived(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fedaudit"):
        rows = rows_of(federation(tmp_path / "own", [ClipNorm(0.5)], flower_rounds.client_app(length=1.0)))
    assert set(rows["round"]) == {1, 2} and set(rows["status"]) == {"violated"}
    assert rows["value"].min() > 0.5 and set(rows["high"]) == {0.5}
    lines = [r.getMessage() for r in caplog.records if "claim violated" in r.getMessage()]
    assert len(lines) == 2  # one a round, whatever the number of clients
    assert "update norm <= 0.5" in lines[0] and f"and {flower_rounds.N - 1} more findings" in lines[0]


def test_claims_may_follow_the_round(tmp_path):
    rows = rows_of(
        federation(
            tmp_path / "own",
            lambda number: [ClipNorm(2.0 if number == 1 else 0.5)],
            flower_rounds.client_app(),
        )
    )
    assert set(rows.loc[rows["round"] == 1, "status"]) == {"ok"}
    assert set(rows.loc[rows["round"] == 2, "status"]) == {"violated"}


def test_weights_beyond_the_assumed_sensitivity_are_found_while_a_wrapped_strategy_runs(tmp_path):
    app = flower_rounds.client_app(scale=0.0, examples=lambda partition: 993 if partition == 0 else 1)
    claims = central_claims(0.5, 0.2, flower_rounds.N)
    records = federation(tmp_path / "own", claims, app, flower_rounds.fixed(0.2, 0.5), rounds=3)
    weights = rows_of(records, "violated")
    assert "verify.weights" in set(weights["quantity"])
    (reason,) = set(weights.loc[weights["quantity"] == "verify.weights", "reason"].head(1))
    assert "by num-examples, up to 0.993 for one client instead of 0.125" in reason
    assert set(records.loc[records["quantity"] == "clip-norm", "value"]) == {0.5}


def test_the_reference_run_finds_unequal_weights_under_flowers_wrapper(tmp_path):
    made = run(
        tmp_path, strategy__name=FIXED, data__partitioner="dirichlet(alpha=0.3)", federation__rounds=4
    ).records
    assert "verify.weights" in set(rows_of(made, "violated")["quantity"])


class Shuffled(DPSGD):
    """Cuts a shuffled order into batches and accounts for them as Poisson samples."""

    poisson: ClassVar[bool] = False


def test_shuffling_declared_as_poisson_sampling_is_found_by_an_oracle_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(DEFENSES._entries, "shuffled", Entry("says Poisson", Shuffled))
    changes = {"audit__observers": "server, oracle", "train__local_steps": 8, "federation__rounds": 4}
    records = run(tmp_path, defense__name="shuffled(noise-multiplier=1, epsilon=0)", **changes).records
    bad = rows_of(records, "violated")
    assert set(bad["quantity"]) == {"verify.poisson-sampling"} and set(bad["observer"]) == {"oracle"}
    assert bad["reason"].str.contains("shuffled, not sampled").all() and set(bad["client_id"]) == {0, 1, 2}


def test_honest_poisson_sampling_is_believed_by_an_oracle(tmp_path):
    changes = {"audit__observers": "server, oracle", "train__local_steps": 8, "federation__rounds": 4}
    rows = rows_of(run(tmp_path, defense__name=PRIVATE, **changes).records)
    assert "violated" not in set(rows["status"])
    last = rows[(rows["quantity"] == "verify.poisson-sampling") & (rows["round"] == 4)]
    assert set(last["status"]) == {"ok"}


def test_adaptive_clipping_is_judged_by_the_norm_of_each_round(tmp_path):
    name = f"{ADAPTIVE}(noise-multiplier=0.3, clipped-count-stddev=0.2, clip-norm-lr=0.7)"
    records = run(tmp_path, strategy__name=name, train__lr=0.5, train__local_steps=4).records
    norms = records[records["quantity"] == "clip-norm"].set_index("round")["value"]
    assert list(norms.index) == [1, 2, 3] and norms.is_monotonic_decreasing  # everything is clipped
    wrong = rows_of(records, "violated")
    assert set(wrong.loc[wrong["quantity"] == "verify.adaptive-clipping", "round"]) == {1, 2, 3}
    noise = wrong[wrong["quantity"] == "verify.gaussian-noise"]
    assert set(noise["round"]) == {1, 2, 3} and noise["reason"].str.contains("at most 0").all()


def test_a_broken_check_is_a_failed_row_and_the_federation_goes_on(tmp_path, caplog):
    def claims(number):
        raise RuntimeError(f"no claims for round {number}")

    with caplog.at_level(logging.WARNING, "fedaudit"):
        records = federation(tmp_path / "own", claims, flower_rounds.client_app())
    failed = records[records["quantity"] == "verify"]
    assert list(failed["status"]) == ["failed", "failed"]
    assert failed["reason"].iloc[0] == "RuntimeError: no claims for round 1"
    assert "the claims of round 1 could not be tested" in caplog.text


@pytest.mark.parametrize("claims", [[ClipNorm(0.5)], lambda _: 1 / 0], ids=["violated", "broken"])
def test_a_strict_audit_stops_on_it_after_the_round_was_recorded(tmp_path, claims):
    with pytest.raises(RunFailedError, match="strict audit stops on a claim that does not hold, got verify"):
        federation(tmp_path / "own", claims, flower_rounds.client_app(), strict=True)
    assert {"violated", "failed"} & set(load_run(tmp_path / "own").records["status"])


def test_a_strict_audit_does_not_stop_on_what_its_observer_cannot_check(tmp_path):
    rows = rows_of(run(tmp_path, defense__name=PRIVATE, audit__strict=True).records)
    assert "skipped" in set(rows["status"]) and set(rows["round"]) == {1, 2, 3}


def test_the_wrapped_strategys_result_is_the_same_with_and_without_the_check(tmp_path):
    def weights(claims):
        auditor = Auditor(None, "", verify=claims)
        random.seed(0)
        with InProcessGrid(flower_rounds.client_app(), flower_rounds.N, seed=1) as grid:
            strategy = AuditStrategy(flower.FedAvg(**flower_rounds.COMMON), auditor)
            return strategy.start(grid, flower_rounds.initial(), num_rounds=2).arrays

    assert weights([Weights("num-examples"), ClipNorm(0.5)]) == weights(None)


def test_a_round_that_nobody_answered_is_not_judged(tmp_path):
    auditor = Auditor(None, "", verify=[ClipNorm(0.5)])
    assert auditor.check_claims(1, []) == []


def test_a_resumed_run_counts_the_rounds_before(tmp_path):
    changes = {"defense__name": "leakage-adaptive(driver=decay, epsilon=8)"}
    names = ("quantity", "client_id", "status", "reason")

    def last(records):
        rows = rows_of(records)
        rows = rows[(rows["round"] == 3) & (rows["quantity"] == "verify.epsilon-claim")]
        return rows[list(names)].astype(str).to_numpy().tolist()

    def pull_the_plug(event):
        if event.stage == "round" and event.round == 2:
            raise KeyboardInterrupt

    whole = run(tmp_path, "whole", **changes).records
    with pytest.raises(KeyboardInterrupt), listen(pull_the_plug):
        run(tmp_path, "cut", **changes)
    resumed = run(tmp_path, "cut", **changes, output__resume=True).records
    assert last(resumed) == last(whole) and len(last(whole)) == 3


def test_noise_of_earlier_rounds_takes_a_bounded_space():
    memory = NoiseMemory(window=3)
    for number in range(10):
        long = np.zeros(3 * KEPT + 1)
        residual = Residual({"w": long, "b": np.zeros(7)}, {"w": long, "b": np.zeros(7)})
        memory.keep("update", [Sample.of(residual, number, 0)])
    assert len(memory.update) == 3
    for sample in memory.update:
        assert sample.size <= KEPT + 2
        assert all(part.base is None for part in sample.parts.values())  # a view would keep the release


def test_a_long_federation_holds_no_more_than_a_short_one():
    verifier = LiveVerifier([GaussianNoise(0.2, signal=f.C), ClipNorm(f.C)], window=4)

    def held():
        parts = [p for s in verifier.memory.update for p in s.parts.values()]
        return sum(part.nbytes for part in parts), len(verifier.memory.mixing)

    sizes = []
    for number in range(1, 9):
        noise = f.draw(f.generator("noise", number), 0.2)
        update = f.received(number, 0, f.plus(f.clip(f.signal(number, 0)), noise), f.weights_of(number))
        assert all(x.verdict != "violated" for x in verifier.check([update]))
        sizes.append(held())
    assert sizes[3] == sizes[7] and sizes[0] < sizes[3]
