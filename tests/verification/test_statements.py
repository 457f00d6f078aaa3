"""What clients state of their privacy is added up over rounds, and an epsilon is recomputed from it."""

import pytest

from fedaudit.accounting import Ledger, RenyiOdometer
from fedaudit.claims import EpsilonClaim
from fedaudit.types import ClientUpdate, Guarantee
from fedaudit.verification.epsilon import epsilon_of
from fedaudit.verification.statements import Statements, noise_behind

ORDERS, SHARES = (4.0, 8.0, 16.0), (0.8, 0.1, 0.1)
STEPS = ((1.0, 0.1, 4), (2.0, 0.1, 4))


def filtered(history=STEPS, epsilon=1.0):
    return EpsilonClaim(
        epsilon, 1e-5, "example", "rdp-filter", 2.0, 0.1, 4, history=history, orders=ORDERS, shares=SHARES
    )


def said(noise, steps=4.0):
    return {"clip-norm": 0.5, "noise-std": 0.5 * noise, "sample-rate": 0.1, "steps": steps}


def heard(statements, number, noise):
    update = ClientUpdate(7, number, {}, {}, 10, said(noise))
    return statements.hear(update, Guarantee(float(number), 1e-5, "example", "rdp-filter"))


def test_the_epsilon_of_a_filter_is_its_odometers_reading():
    expected = RenyiOdometer(1e-5, ORDERS, SHARES, Ledger(STEPS)).epsilon
    assert epsilon_of(filtered()) == pytest.approx(expected, rel=1e-12)
    doubled = tuple((2 * noise, rate, steps) for noise, rate, steps in STEPS)
    assert epsilon_of(filtered(), 2.0) == pytest.approx(epsilon_of(filtered(doubled)), rel=1e-12)


def test_steps_with_different_noise_are_composed_by_the_other_accountants_too():
    claim = EpsilonClaim(1.0, 1e-5, "example", "rdp", 2.0, 0.1, 4, history=STEPS)
    alone = EpsilonClaim(1.0, 1e-5, "example", "rdp", 1.0, 0.1, 4)
    assert epsilon_of(claim) > epsilon_of(alone)


def test_a_filter_without_orders_claims_nothing():
    with pytest.raises(ValueError, match="'rdp-filter' fixes its orders in advance, got none"):
        EpsilonClaim(1.0, 1e-5, "example", "rdp-filter", 1.0)


def test_unequal_releases_are_not_one_gaussian_mechanism():
    with pytest.raises(ValueError, match="'analytic' composes equal releases, got a history"):
        EpsilonClaim(1.0, 1e-5, "client", "analytic", 1.0, history=((1.0, 1.0, 1), (2.0, 1.0, 1)))


def test_the_noise_of_every_round_is_remembered():
    statements = Statements()
    heard(statements, 1, noise=1.0)
    found = heard(statements, 2, noise=2.0)
    assert found.rounds == 2 and found.history == STEPS and found.guarantee.epsilon == 2.0


def test_one_round_without_stated_noise_leaves_the_history_unknown():
    statements = Statements()
    statements.add(7, Guarantee(1.0, 1e-5, "example", "rdp-filter"), None)
    found = heard(statements, 2, noise=1.0)
    assert found.rounds == 2 and found.history is None


@pytest.mark.parametrize("steps", [0.0, float("nan"), float("inf")])
def test_steps_that_cannot_be_are_no_statement(steps):
    assert noise_behind(said(1.0, steps)) is None


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("inf"), float("nan")])
def test_an_epsilon_that_bounds_nothing_is_no_claim(epsilon):
    found = Statements().add(0, Guarantee(epsilon, 1e-5, "example", "rdp"), None)
    assert found is not None and not found.usable
