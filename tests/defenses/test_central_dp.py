"""The defense "central-dp": its options, its budget, and its place among other defenses."""

import math

import pytest
import torch
from torch import Generator

from fedaudit.accounting import Ledger, epsilon
from fedaudit.attacks.threat_card import ThreatCard
from fedaudit.defenses.base import CentralDefense
from fedaudit.defenses.central_dp import CentralPrivacy
from fedaudit.defenses.chain import central
from fedaudit.errors import ConfigError
from fedaudit.registry import DEFENSES, changes_update
from fedaudit.spec import parse_spec
from fedaudit.training.local import weights_to_send


def built(text):
    return DEFENSES.build(parse_spec(text))


def spent(plan, rounds):
    ledger = plan.ledger()
    for _ in range(rounds):
        ledger = plan.after(ledger)
    return ledger


@pytest.mark.parametrize(("sampling", "rate"), [("fixed", 1.0), ("poisson", 0.2)])
def test_the_planned_rounds_spend_the_target_and_not_more(sampling, rate):
    plan = CentralPrivacy(epsilon=5.0, sampling=sampling, rounds=7).central_plan(50, 10)
    z = plan.mechanism.noise_multiplier
    guarantee = plan.guarantee(spent(plan, 7))
    assert 4.95 < guarantee.epsilon <= 5.0
    assert guarantee.epsilon == epsilon(Ledger(((z, rate, 7),)), 1e-5)
    assert (guarantee.unit, guarantee.delta, guarantee.accountant) == ("client", 1e-5, "rdp")
    assert plan.admits(spent(plan, 6)) and not plan.admits(spent(plan, 7))


def test_a_tighter_accountant_states_less_of_the_same_rounds():
    rdp, pld = (
        CentralPrivacy(noise_multiplier=2.0, accountant=name).central_plan(9, 9) for name in ("rdp", "pld")
    )
    tight, loose = pld.guarantee(spent(pld, 3)), rdp.guarantee(spent(rdp, 3))
    assert tight.epsilon < loose.epsilon and tight.accountant == "pld"


def test_only_poisson_sampling_is_amplified():
    noise = {
        sampling: CentralPrivacy(epsilon=5.0, sampling=sampling, rounds=7)
        .central_plan(50, 10)
        .mechanism.noise_multiplier
        for sampling in ("fixed", "poisson")
    }
    everybody = CentralPrivacy(epsilon=5.0, rounds=7).central_plan(10, 10).mechanism.noise_multiplier
    assert noise["fixed"] == everybody > 2 * noise["poisson"]


def test_a_stated_noise_makes_epsilon_the_budget_and_zero_is_none():
    plan = CentralPrivacy(epsilon=9.0, noise_multiplier=1.0).central_plan(10, 10)
    allowed = [rounds for rounds in range(20) if plan.admits(spent(plan, rounds))]
    assert allowed == list(range(len(allowed)))
    assert plan.guarantee(spent(plan, len(allowed))).epsilon <= 9.0
    assert plan.guarantee(spent(plan, len(allowed) + 1)).epsilon > 9.0
    free = CentralPrivacy(epsilon=0.0, noise_multiplier=0.1).central_plan(10, 10)
    assert free.admits(spent(free, 1000))


def test_options_reach_the_mechanism():
    text = (
        "central-dp(noise-multiplier=1.1, clip=0.5, adaptive=true, quantile=0.7, clip-lr=0.1, count-noise=2)"
    )
    made = built(text).central_plan(40, 10).mechanism
    assert (made.noise_multiplier, made.clip_norm, made.divisor, made.most_examples) == (1.1, 0.5, 10, 0)
    moves = made.adaptive
    assert (moves.quantile, moves.lr, moves.count_noise, moves.cohort) == (0.7, 0.1, 2.0, 10)
    capped = built("central-dp(weights=capped, cap=50, rounds=3)").central_plan(40, 10).mechanism
    assert (capped.most_examples, capped.divisor) == (50, 500)
    stated = built("central-dp(weights=capped, cap=50, denominator=900, rounds=3)").central_plan(40, 10)
    assert stated.mechanism.noise_std(1.0) == pytest.approx(stated.mechanism.noise_multiplier * 50 / 900)


@pytest.mark.parametrize(("cohort", "z", "expected"), [(1000, 1.0, 50.0), (4, 1.0, 1.5), (4, 0.01, 0.2)])
def test_noise_on_the_count_follows_the_cohort_unless_that_would_cost_too_much(cohort, z, expected):
    defense = CentralPrivacy(noise_multiplier=z, adaptive=True)
    assert defense.central_plan(cohort, cohort).mechanism.adaptive.count_noise == pytest.approx(expected)


def test_clients_leave_everything_to_the_server():
    delta = {"w": torch.randn(3), "s": torch.tensor(2.0)}
    defense = built("central-dp")
    sent = defense.protect(delta, Generator())
    assert all(sent[name] is delta[name] for name in delta)
    after = {"w": torch.ones(3), "s": torch.tensor(1.0), "n": torch.tensor(4)}
    before = {"w": torch.zeros(3), "s": torch.tensor(0.0), "n": torch.tensor(3)}
    returned = weights_to_send(defense, before, after, Generator())
    assert all(returned[name] is after[name] for name in after)


def test_it_is_told_from_every_other_defense():
    others = ["none", "dp-sgd", "gaussian", "top-k", "leakage-adaptive", "top-k then sign"]
    assert all(central(built(name)) is None for name in others)
    alone, last = built("central-dp"), built("top-k(fraction=0.2) then central-dp(epsilon=3)")
    assert central(alone) is alone and isinstance(alone, CentralDefense)
    assert central(last).epsilon == 3.0 and central(last.over_rounds(9)).rounds == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("central-dp then top-k", "central-dp acts on the aggregate, got top-k after it: write it last"),
        ("dp-sgd then central-dp", "one part of a chain accounts for privacy, got dp-sgd and central-dp"),
        ("gaussian then central-dp", "one part of a chain accounts for privacy"),
        ("central-dp(epsilon=0)", "epsilon > 0 or noise-multiplier > 0, got 0 for both"),
        ("central-dp(clip=0)", "clip-norm must be a number > 0, got 0.0"),
        ("central-dp(epsilon=-1)", "epsilon must be a number >= 0, got -1.0"),
        ("central-dp(delta=0)", r"delta must lie in \(0, 1\), got 0.0"),
        ("central-dp(weights=capped)", "weights=capped goes with cap > 0"),
        ("central-dp(cap=5)", "weights=capped goes with cap > 0"),
        ("central-dp(denominator=5)", "weights=capped goes with cap > 0"),
        ("central-dp(count-noise=5)", "count-noise belongs to adaptive clipping, got 5"),
        ("central-dp(quantile=2)", r"quantile must lie in \[0, 1\], got 2.0"),
        ("central-dp(sampling=shuffled)", "'fixed' or 'poisson'"),
        ("central-dp(accountant=gdp)", "'rdp', 'prv' or 'pld'"),
    ],
)
def test_what_means_nothing_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        built(text)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CentralPrivacy().central_plan(10, 10), "divides epsilon over rounds, got none"),
        (
            lambda: CentralPrivacy(rounds=1, delta=0.05).central_plan(20, 5),
            r"under 1 / clients = 0.05, got 0.05",
        ),
        (lambda: CentralPrivacy(rounds=1).central_plan(5, 6), "whole number from 1 to 5, got 6"),
        (lambda: CentralPrivacy(weights="shares"), "weights must be one of uniform, capped, got 'shares'"),
        (
            lambda: CentralPrivacy(noise_multiplier=4.0, adaptive=True, count_noise=1.0).central_plan(9, 9),
            "the count alone would spend more",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_too_little_noise_for_a_bound_is_no_guarantee():
    plan = CentralPrivacy(noise_multiplier=1e-9, epsilon=1.0).central_plan(5, 5)
    assert plan.guarantee(spent(plan, 1)) is None
    assert not plan.admits(plan.ledger()) and not math.isnan(plan.mechanism.noise_std(1.0))


def test_an_attacker_at_the_server_meets_the_update_as_without_it():
    assert changes_update("central-dp(epsilon=8)") == []
    assert changes_update("top-k(fraction=0.1) then central-dp") == ["top-k"]
    card = ThreatCard(3, 0, 64, "sgd", "train", False, False, "joint", "central-dp", 4)
    assert "no defense" in card.favours
    pruned = ThreatCard(3, 0, 64, "sgd", "train", False, False, "joint", "top-k then central-dp", 4)
    assert "no defense" not in pruned.favours
