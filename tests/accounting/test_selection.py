"""The price of choosing the best of several private trainings, against exact small mechanisms."""

import math

import numpy as np
import pytest

from fedaudit.accounting import Ledger, epsilon, search_epsilon
from fedaudit.accounting.renyi import orders
from fedaudit.accounting.selection import geometric_selection, poisson_selection

P, OTHER = np.array([0.6, 0.3, 0.1]), np.array([0.55, 0.29, 0.16])  # three outcomes, the last one the best
ORDERS = np.array([1.5, 2.0, 3.0, 5.0, 8.0, 16.0, 32.0])


def renyi(p, q, order):
    return math.log(float((p**order * q ** (1 - order)).sum())) / (order - 1)


def larger(p, q):
    """Divergences in the worse direction."""
    return np.array([max(renyi(p, q, a), renyi(q, p, a)) for a in ORDERS])


def best_of_poisson(p, mean):
    """P[best <= i] = exp(-mean (1 - F_i)); nothing at all with probability exp(-mean)."""
    below = np.exp(-mean * (1 - np.concatenate([[0.0], np.cumsum(p)])))
    return np.concatenate([below[:1], np.diff(below)])


def best_of_geometric(p, mean):
    """P[best <= i] = sum_k g (1 - g)^(k - 1) F_i^k with g = 1 / mean."""
    g = 1 / mean
    total = np.concatenate([[0.0], np.cumsum(p)])
    return np.diff(g * total / (1 - (1 - g) * total))


@pytest.mark.parametrize("mean", [1.0, 3.0, 20.0])
def test_the_best_of_a_poisson_number_diverges_by_no_more_than_stated(mean):
    exact = larger(best_of_poisson(P, mean), best_of_poisson(OTHER, mean))
    assert (exact <= poisson_selection(larger(P, OTHER), ORDERS, mean) + 1e-12).all()


@pytest.mark.parametrize("mean", [1.0, 3.0, 20.0])
def test_the_best_of_a_geometric_number_diverges_by_no_more_than_stated(mean):
    exact = larger(best_of_geometric(P, mean), best_of_geometric(OTHER, mean))
    assert (exact <= geometric_selection(larger(P, OTHER), ORDERS, mean) + 1e-12).all()


def test_a_geometric_number_that_is_always_one_costs_three_trials_in_the_bound():
    curve = larger(P, OTHER)
    stated = geometric_selection(curve, ORDERS, 1.0)
    np.testing.assert_allclose(stated, curve + (2 * (1 - 1 / ORDERS) * curve).min())


def test_poisson_adds_the_mean_times_one_trials_delta_at_the_allowed_epsilon():
    """One Gaussian release, q = 1: rdp(a) = a / (2 sigma^2); delta by the conversion, order by order."""
    sigma, mean, at = 3.0, 4.0, np.array(orders())
    curve = at / (2 * sigma**2)
    found = poisson_selection(curve, at, mean)
    for i in (5, 50, 120):
        allowed = math.log(1 + 1 / (at[i] - 1))
        logs = [(a - 1) * (a / 18 - allowed + math.log((a - 1) / a)) - math.log(a) for a in at]
        delta = math.exp(min(0.0, *logs))
        assert found[i] == pytest.approx(curve[i] + mean * delta + math.log(mean) / (at[i] - 1), rel=1e-12)


def test_released_trials_compose_and_a_random_number_costs_less_than_many_of_them():
    one = Ledger().add(1.0, 0.01, 1000)
    single, delta = epsilon(one, 1e-5), 1e-5
    composed = search_epsilon([one] * 30, delta, "all released")
    assert composed == pytest.approx(epsilon(Ledger().add(1.0, 0.01, 30_000), delta))
    for kind in ("poisson", "geometric"):
        assert single < search_epsilon([one] * 30, delta, kind) < composed
        assert search_epsilon([one] * 10, delta, kind) < search_epsilon([one] * 30, delta, kind)


def test_the_setting_that_spends_most_counts_for_every_trial():
    little, much = Ledger().add(3.0, 0.01, 100), Ledger().add(1.0, 0.01, 100)
    mixed = search_epsilon([little, much], 1e-5, "poisson")
    assert mixed == search_epsilon([much, much], 1e-5, "poisson")
    assert search_epsilon([little, much], 1e-5, "all released") < search_epsilon(
        [much] * 2, 1e-5, "all released"
    )


def test_impossible_searches_are_refused():
    with pytest.raises(ValueError, match="at least one trial and 0 < delta < 1, got 0 trials"):
        search_epsilon([], 1e-5, "poisson")
    with pytest.raises(ValueError, match=r"got 1 trials and delta=1\.0"):
        search_epsilon([Ledger()], 1.0, "poisson")
    with pytest.raises(ValueError, match=r"a number > 0 and >= 1, got 0\.5"):
        geometric_selection(np.zeros(7), ORDERS, 0.5)
    with pytest.raises(ValueError, match=r"a number > 0 and >= 0, got 0\.0"):
        poisson_selection(np.zeros(7), ORDERS, 0.0)
