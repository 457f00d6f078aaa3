"""Our central mechanism under the same checks as everybody's: honest it passes, with a planted defect not."""

import math
import re

import numpy as np
import pytest
import torch
from flwr.serverapp import strategy as flower

from fedaudit.claims import (
    HOLDS,
    UNCHECKED,
    VIOLATED,
    AdaptiveClipping,
    Claim,
    ClipNorm,
    EpsilonClaim,
    GaussianNoise,
    IndependentNoise,
    NothingBeside,
    Weights,
)
from fedaudit.defenses import central_mechanism
from fedaudit.defenses.central_mechanism import CentralMechanism
from fedaudit.flower import CentralDP
from fedaudit.flower import central_dp as wrapper
from fedaudit.verification import NoiseMemory, verify_round
from fedaudit.verification.central_rounds import plan_claims
from fedaudit.verification.round import ALPHA

from . import federation as tiny
from . import flower_rounds as f

N = f.N


def wrap(z=0.05, clip=0.5, **options):
    released = []
    return CentralDP(
        flower.FedAvg(**f.COMMON), z, clip, N, seed=3, on_release=released.append, **options
    ), released


def judged(made, app=None, rounds=2, **options):
    strategy, released = made
    seen, weights = f.run(strategy, app or f.client_app(scale=0.0), rounds=rounds, **options)
    memory, findings = NoiseMemory(), []
    for done in released:
        norms = (done.release.clip_norm, done.release.next_clip_norm)
        claims = plan_claims(strategy.plan, norms[0], done.releases, done.guarantee)
        findings += verify_round(
            claims,
            seen[done.round],
            weights[done.round],
            weights[done.round - 1],
            memory=memory,
            clip_norms=norms,
        )
    return findings


def broken(findings):
    return {type(x.claim) for x in findings if x.verdict == VIOLATED}


def of(findings, kind, verdict=VIOLATED):
    return [x for x in findings if isinstance(x.claim, kind) and x.verdict == verdict]


def uneven(partition):
    return 40 if partition == 0 else 4


HONEST = {
    "uniform": ({}, {}),
    "long scalar": ({}, {"scale": 1000.0}),
    "uneven clients": ({}, {"examples": uneven}),
    "capped weights": ({"weights": "capped", "cap": 8}, {"examples": uneven}),
    "capped, own denominator": ({"weights": "capped", "cap": 8, "denominator": 200.0}, {"examples": uneven}),
    "a failed client": ({}, {"examples": lambda partition: 10 if partition else 0}),
    "adaptive": ({"adaptive": True, "count_noise": 0.2, "clip_lr": 0.5}, {"length": 3.0}),
    "zero updates": ({}, {"length": 0.0}),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_round_passes_and_its_noise_is_affirmed(name):
    options, client = HONEST[name]
    findings = judged(wrap(**options), f.client_app(**{"scale": 0.0, **client}))
    assert not broken(findings), [str(x) for x in findings if x.verdict == VIOLATED]
    for kind in (GaussianNoise, ClipNorm, EpsilonClaim, IndependentNoise, NothingBeside):
        assert of(findings, kind, HOLDS), kind
    if name not in ("zero updates", "long scalar"):  # without a signal beside one scalar no weighting shows
        assert of(findings, Weights, HOLDS)
    if name == "adaptive":
        assert len(of(findings, AdaptiveClipping, HOLDS)) == 2


def test_a_poisson_sampled_run_passes_with_the_amplified_epsilon():
    inner = flower.FedAvg(**{**f.COMMON, "min_train_nodes": 1})
    released = []
    strategy = CentralDP(
        inner, 0.3, 0.5, 4, clients=N, sampling="poisson", seed=3, on_release=released.append
    )
    findings = judged((strategy, released), rounds=4)
    assert not broken(findings) and {len(of(findings, EpsilonClaim, HOLDS))} == {4}
    assert len({done.replies for done in released}) > 1
    assert all(x.claim.sample_rate == 0.5 for x in of(findings, EpsilonClaim, HOLDS))


def test_integer_counters_are_not_released():
    assert not broken(judged(wrap(), arrays=f.initial(counter=True)))


def test_clipping_by_the_server_of_a_long_scalar_is_seen_to_work():
    findings = judged(wrap(), f.client_app(scale=1000.0), rounds=1)
    (clip,) = of(findings, ClipNorm, HOLDS)
    assert "made of updates clipped as claimed" in clip.reason and clip.measured <= 0.5 * (1 + 1e-6)


def test_honest_releases_raise_an_alarm_in_at_most_one_of_a_hundred():
    """100 releases of the mechanism itself, with clients of every size and some that fail."""
    mechanism = CentralMechanism(0.8, 0.5, 6)
    plan = wrapper.CentralPlan(mechanism, 6, 6)
    memory, alarms = NoiseMemory(window=20), []
    for number in range(1, 101):
        before = tiny.weights_of(number)
        replied = 6 - number % 3
        updates = [
            tiny.received(number, i, tiny.signal(number, i), before, 10 * (i + 1)) for i in range(replied)
        ]
        made = mechanism.release(
            [u.delta for u in updates],
            [u.num_examples for u in updates],
            before,
            0.5,
            np.random.default_rng(number),
        )
        findings = verify_round(
            plan_claims(plan, 0.5), updates, tiny.applied(before, made.change), before, memory=memory
        )
        alarms += [number] if broken(findings) else []
    assert len(alarms) <= 1 and ALPHA <= 0.001, alarms  # more have probability under 0.005


# --- planted defects ----------------------------------------------------------------------------------


def half_noise(monkeypatch):
    honest = CentralMechanism.noise_std
    monkeypatch.setattr(CentralMechanism, "noise_std", lambda self, clip: honest(self, clip) / 2)


def unsplit_noise(monkeypatch):
    monkeypatch.setattr(CentralMechanism, "update_multiplier", property(lambda self: self.noise_multiplier))


def no_noise_on_scalars(monkeypatch):
    honest = CentralMechanism.release

    def release(self, updates, examples, like, clip, source):
        made = honest(self, updates, examples, like, clip, source)
        silent = honest(
            CentralMechanism(1e-12, self.clip_norm, self.divisor), updates, examples, like, clip, source
        )
        return central_mechanism.CentralRelease(
            {**made.change, "b": silent.change["b"]}, clip, made.noise_std, clip
        )

    monkeypatch.setattr(CentralMechanism, "release", release)


def scalar_left_out(monkeypatch):
    honest = central_mechanism.clip_update

    def clip(delta, norm):
        kept = honest(delta, norm)
        return {n: kept[n] if t.dim() else t.double() for n, t in delta.items()}

    monkeypatch.setattr(central_mechanism, "clip_update", clip)


def no_clipping(monkeypatch):
    monkeypatch.setattr(
        central_mechanism, "clip_update", lambda delta, _: {n: t.double() for n, t in delta.items()}
    )


def weights_by_examples(monkeypatch):
    monkeypatch.setattr(CentralMechanism, "weight", lambda self, n: n * N / (40 + 4 * (N - 1)))


def cap_not_kept(monkeypatch):
    monkeypatch.setattr(CentralMechanism, "weight", lambda self, n: float(n))


def divided_by_replies(monkeypatch):
    monkeypatch.setattr(CentralMechanism, "weight", lambda self, n: N / (N - 1))


def one_seed(monkeypatch):
    monkeypatch.setattr(CentralDP, "_source", lambda self, purpose: np.random.default_rng(purpose))


def counts_the_clipped(monkeypatch):
    honest = CentralMechanism._following

    def following(self, clip, within, source):
        return honest(self, clip, -within, source)

    monkeypatch.setattr(CentralMechanism, "_following", following)


def one_round_of_epsilon(monkeypatch):
    honest = wrapper.CentralPlan.guarantee
    monkeypatch.setattr(
        wrapper.CentralPlan, "guarantee", lambda self, ledger: honest(self, self.after(self.ledger()))
    )


ADAPTING = {"adaptive": True, "count_noise": 0.03, "clip_lr": 0.5}
DEFECTS = {
    "half the noise": (half_noise, {}, {}, {GaussianNoise, EpsilonClaim}, r"at most 0\.5"),
    "noise not split": (
        *(unsplit_noise, ADAPTING, {"length": 3.0}, {GaussianNoise, EpsilonClaim}),
        "of the claimed",
    ),
    "a tensor without noise": (no_noise_on_scalars, {}, {}, {GaussianNoise, EpsilonClaim}, "'b'"),
    "a scalar left out of the clipping": (
        *(scalar_left_out, {}, {"scale": 1000.0}, {ClipNorm, EpsilonClaim}),
        "'scale' enters the aggregate unclipped",
    ),
    "no clipping": (no_clipping, {}, {"length": 3.0}, {ClipNorm, EpsilonClaim}, "clipped not at all"),
    "weights by num-examples": (
        *(weights_by_examples, {}, {"examples": uneven, "length": 3.0}, {Weights, EpsilonClaim}),
        r"weights by num-examples, up to 0\.588",
    ),
    "a cap that is not kept": (
        *(cap_not_kept, {"weights": "capped", "cap": 8}, {"examples": uneven, "length": 3.0}),
        *({Weights, EpsilonClaim}, r"weights by uncapped examples, up to 0\.625 .* instead of 0\.125"),
    ),
    "divided by those who replied": (
        *(divided_by_replies, {}, {"examples": lambda p: 10 if p else 0, "length": 3.0}),
        *({Weights, EpsilonClaim}, "weights by replies, up to 0.1429 .* instead of 0.125"),
    ),
    "one seed for all rounds": (one_seed, {}, {}, {IndependentNoise}, "share noise"),
    "the clipped counted": (
        *(counts_the_clipped, ADAPTING, {"length": 3.0}, {AdaptiveClipping}),
        "the norm moves the wrong way",
    ),
    "the epsilon of one round for all": (
        *(one_round_of_epsilon, {}, {}, {EpsilonClaim}),
        "as described has epsilon",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_planted_in_our_mechanism_is_found_and_no_other_claim_is_blamed(name, monkeypatch):
    plant, options, client, kinds, evidence = DEFECTS[name]
    plant(monkeypatch)
    findings = judged(wrap(**options), f.client_app(**{"scale": 0.0, **client}), rounds=4)
    assert broken(findings) == kinds, [str(x) for x in findings if x.verdict == VIOLATED]
    reasons = [x.reason for x in findings if x.verdict == VIOLATED]
    assert any(re.search(evidence, reason) for reason in reasons), reasons


def test_a_released_counter_is_found(monkeypatch):
    honest = CentralDP._through

    def through(self, number, noised):
        made = honest(self, number, noised)
        made["steps"] = f.Array(np.asarray(13, np.int64))
        return made

    monkeypatch.setattr(CentralDP, "_through", through)
    findings = judged(wrap(), arrays=f.initial(counter=True), rounds=1)
    assert (
        broken(findings) == {GaussianNoise}
        and "'steps' was released" in of(findings, GaussianNoise)[0].reason
    )


def test_the_loss_beside_an_update_is_found():
    findings = judged(wrap(), f.client_app(scale=0.0, metrics={"train-loss": 0.5}), rounds=1)
    assert broken(findings) == {NothingBeside}


# --- claims -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "std"),
    [
        ({}, 0.05 * 0.5 / N),
        ({"weights": "capped", "cap": 8}, 0.05 * 0.5 / N),
        ({"weights": "capped", "cap": 8, "denominator": 200.0}, 0.05 * 0.5 * 8 / 200),
        ({"adaptive": True, "count_noise": 0.05}, (0.05**-2 - 0.1**-2) ** -0.5 * 0.5 / N),
    ],
)
def test_claimed_and_applied_noise_are_worked_out_apart_and_agree(options, std):
    strategy, _ = wrap(**options)
    claims: list[Claim] = plan_claims(strategy.plan, 0.5)
    (noise,) = [claim for claim in claims if isinstance(claim, GaussianNoise)]
    assert noise.std == pytest.approx(std) == strategy.plan.mechanism.noise_std(0.5)
    assert not [claim for claim in claims if isinstance(claim, EpsilonClaim)]


def test_weights_say_what_they_are_divided_by():
    assert (
        str(Weights("uniform", divisor=8.0)) == "aggregation weights: uniform, divided by 8 whoever replies"
    )
    capped = Weights("capped", divisor=64.0, most_examples=8)
    assert str(capped) == "aggregation weights: capped at 8 examples, divided by 64 whoever replies"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Weights("capped"), "capped weights state most_examples and divisor"),
        (lambda: Weights("uniform", most_examples=3), "capped weights state most_examples and divisor"),
        (lambda: Weights("num-examples", divisor=3.0), "shares of the examples have no divisor, got 3.0"),
        (lambda: Weights(divisor=-1.0), "divisor must be a number > 0, got -1.0"),
        (lambda: AdaptiveClipping(cohort=0.0), "cohort must be a number > 0, got 0.0"),
    ],
)
def test_a_claim_that_means_nothing_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_count_over_a_planned_cohort_takes_missing_updates_for_halves():
    updates = f.run(flower.FedAvg(**f.COMMON), f.client_app(length=0.3, scale=0.0), rounds=1)[0][1][:6]
    share = 0.5 + 6 * 0.5 / N
    norms = (1.0, math.exp(-0.2 * (share - 0.5)))
    for cohort, verdict in ((float(N), HOLDS), (None, VIOLATED)):
        claim = AdaptiveClipping(0.5, 0.2, 0.01, cohort)
        (finding,) = verify_round([claim], updates, clip_norms=norms)
        assert finding.verdict == verdict
    assert torch.stack([u.flat for u in updates]).norm(dim=1).max() < 1.0 and finding.verdict != UNCHECKED
