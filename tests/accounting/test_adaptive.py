"""The odometer and the filter under noise that is chosen from outputs."""

import math
from functools import cache

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from fedaudit.accounting import Ledger, RenyiFilter, RenyiOdometer, epsilon, noise_multiplier_for
from fedaudit.accounting.adaptive import MAIN_SHARE, ORDERS
from fedaudit.errors import BudgetExhaustedError

DELTA = 1e-5
NOISES = (0.7, 1.0, 1.5, 2.5, 4.0)


def adaptive_history(seed, present=True):
    """Steps (noise, sample rate, steps) whose noise follows what a simulated mechanism released."""
    draws = np.random.default_rng(seed)
    rates, level = (1.0, 0.3, 0.05), 2
    for number in range(int(draws.integers(1, 9))):
        sigma, rate, steps = NOISES[level], rates[int(draws.integers(3))], int(draws.integers(1, 6))
        yield sigma, rate, steps
        taken = draws.binomial(steps, rate) * present
        released = (taken + sigma * math.sqrt(steps) * draws.normal()) / steps
        level = int(np.clip(level + (1 if released > 0.4 else -1) * (1 + number % 2), 0, len(NOISES) - 1))


def event(history):
    return dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps
            )
            for sigma, q, steps in history
        ]
    )


def exact_gaussian(history):
    """Exact epsilon of Gaussian steps without sampling (Balle and Wang 2018, theorem 8)."""
    mu = math.sqrt(sum(steps / sigma**2 for sigma, _, steps in history))

    def excess(eps):
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - DELTA

    return brentq(excess, 0, 500)


def test_the_odometer_never_reads_less_than_the_realised_history_cost_in_1000_adaptive_ones():
    whole_histories = {}
    for seed in range(1000):
        odometer, readings = RenyiOdometer(DELTA), [0.0]
        for step in adaptive_history(seed):
            odometer = odometer.spend(*step)
            readings.append(odometer.epsilon)
            assert readings[-1] >= epsilon(odometer.ledger, DELTA), seed
            assert odometer.privacy_loss >= readings[-1], seed
        assert readings == sorted(readings), seed
        unsampled = tuple((sigma, 1.0, steps) for sigma, _, steps in odometer.ledger.history)
        whole_histories[unsampled] = None
    assert len(whole_histories) > 300  # the noise really took many paths
    for history in whole_histories:
        assert RenyiOdometer(DELTA, ledger=Ledger(history)).epsilon >= exact_gaussian(history)


@pytest.mark.parametrize("seed", [5, 10, 25, 35])
def test_the_odometer_never_reads_less_than_privacy_loss_distributions_say(seed):
    ledger = Ledger(tuple(adaptive_history(seed)))
    assert RenyiOdometer(DELTA, ledger=ledger).epsilon >= epsilon(ledger, DELTA, "pld")


def test_an_adversary_who_stops_at_the_worst_moment_finds_delta_at_most():
    """The guarantee itself: E_P[(1 - exp(eps_tau - L_tau))_+] <= delta, and |L_n| <= privacy_loss for all n.

    One example moves a Gaussian by 1; the adversary lowers the noise while the loss runs high and stops as
    soon as it exceeds the reading.
    """
    delta, runs, noises = 0.02, 40_000, np.array([0.8, 1.6, 3.2])
    draws = np.random.default_rng(3)

    @cache
    def reading(counts):
        ledger = Ledger(tuple((float(s), 1.0, c) for s, c in zip(noises, counts, strict=True) if c))
        odometer = RenyiOdometer(delta, ledger=ledger)
        return (
            odometer.epsilon,
            odometer.privacy_loss,
            sum(c / (2 * s * s) for s, c in zip(noises, counts, strict=True)),
        )

    loss, counts = np.zeros(runs), np.zeros((runs, 3), dtype=int)
    failed, everywhere, naive = np.zeros(runs), np.zeros(runs, bool), np.zeros(runs)
    running = np.ones(runs, bool)
    for _ in range(8):
        choice = np.where(loss > 1.0, 0, np.where(loss > 0.0, 1, 2))
        sigma = noises[choice]
        step = 0.5 / sigma**2 + draws.normal(size=runs) / sigma  # ln dP/dQ of one output under P
        loss = np.where(running, loss + step, loss)
        counts[running, choice[running]] += 1
        found = np.array([reading(tuple(row)) for row in counts.tolist()])
        failed = np.where(running, np.maximum(0, 1 - np.exp(found[:, 0] - loss)), failed)
        naive = np.where(running, np.maximum(0, 1 - np.exp(found[:, 2] - loss)), naive)
        everywhere |= loss > found[:, 1]
        running &= loss <= found[:, 0]
    assert failed.mean() <= delta
    assert everywhere.mean() <= delta
    assert naive.mean() > 5 * delta  # the expected loss alone, a wrong odometer, fails this check


@pytest.mark.parametrize(
    "history",
    [
        ((3.0, 0.1, 10), (4.0, 0.3, 5), (8.0, 1.0, 2)),
        ((1.1, 256 / 60000, 3000), (0.9, 128 / 60000, 300)),
        ((5.0, 1.0, 50), (10.0, 1.0, 100), (2.0, 0.1, 20)),
    ],
    ids=["three noises", "small rates", "mostly unsampled"],
)
def test_heterogeneous_composition_agrees_with_dp_accounting(history):
    ledger = Ledger(history)
    exact = PLDAccountant().compose(event(history)).get_epsilon(DELTA)
    assert epsilon(ledger, DELTA, "pld") == pytest.approx(exact, rel=0.02)
    theirs = RdpAccountant().compose(event(history)).get_epsilon(DELTA)
    assert epsilon(ledger, DELTA, "rdp") == pytest.approx(theirs, rel=0.01)
    own = [order for order in ORDERS if order.is_integer()]
    single = RenyiOdometer(DELTA, orders=(8.0,), ledger=ledger).epsilon
    assert single == pytest.approx(RdpAccountant([8]).compose(event(history)).get_epsilon(DELTA), rel=1e-9)
    shared = RdpAccountant(own).compose(event(history)).get_epsilon(DELTA / len(own))
    equal = RenyiOdometer(DELTA, orders=tuple(own), ledger=ledger).epsilon
    assert equal == pytest.approx(shared, rel=1e-9)


PLANS = [(0.5, 0.01, 1000), (2.0, 0.08, 125), (8.0, 0.124, 90), (8.0, 1.0, 20), (20.0, 0.05, 60)]


@pytest.mark.parametrize("target, q, steps", PLANS)
def test_a_planned_history_costs_its_epsilon_and_the_documented_loss(target, q, steps):
    sigma = noise_multiplier_for(target, DELTA, q, steps)
    plan = Ledger().add(sigma, q, steps)
    planned = RenyiFilter.for_plan(target, DELTA, plan)
    loss = -math.log(MAIN_SHARE) / (planned.orders[0] - 1)
    reading = planned.after(plan).odometer.epsilon
    assert reading - epsilon(plan, DELTA) == pytest.approx(loss, rel=1e-6)
    assert loss / target < 0.02


@pytest.mark.parametrize("q, steps", [(0.05, 100), (1.0, 10)])
def test_one_order_loses_nothing_where_it_is_the_best(q, steps):
    ledger = Ledger().add(2.0, q, steps)
    best = RenyiFilter.for_plan(1.0, DELTA, ledger).orders[0]
    assert RenyiOdometer(DELTA, (best,), ledger=ledger).epsilon == pytest.approx(epsilon(ledger, DELTA))


def test_equal_shares_lose_what_the_docstring_says():
    ledger = Ledger().add(1.0, 0.3, 30)
    best = min(ORDERS, key=lambda order: RenyiOdometer(DELTA, (order,), ledger=ledger).epsilon)
    single = RenyiOdometer(DELTA, (best,), ledger=ledger).epsilon
    assert RenyiOdometer(DELTA, ledger=ledger).epsilon <= single + math.log(len(ORDERS)) / (best - 1) + 1e-12


@pytest.mark.parametrize("seed", range(40))
def test_a_filter_is_never_exceeded_by_adaptive_requests(seed):
    draws = np.random.default_rng(seed)
    target = float(draws.uniform(0.5, 12))
    filtered = (
        RenyiFilter.for_plan(target, DELTA, Ledger().add(1.5, 0.1, 60))
        if seed % 2
        else RenyiFilter(target, DELTA)
    )
    refused = 0
    for _ in range(60):
        step = (
            NOISES[int(draws.integers(5))],
            float(draws.choice([0.05, 0.3, 1.0])),
            int(draws.integers(1, 20)),
        )
        if filtered.admits(*step):
            filtered = filtered.spend(*step)
            assert filtered.odometer.epsilon <= target and epsilon(filtered.ledger, DELTA) <= target
        else:
            refused += 1
            before = filtered
            with pytest.raises(
                BudgetExhaustedError, match=f"above the budget of {target:.4g} at delta=1.0e-05"
            ):
                filtered.spend(*step)
            assert filtered == before
            assert epsilon(filtered.ledger.add(*step), DELTA) > target - math.log(200) / 0.4
    assert refused > 0


def test_a_filter_with_one_order_stops_where_the_sum_passes_its_budget():
    """Feldman and Zrnic's rule, written out for the Gaussian: a / (2 sigma^2) per step."""
    order, target = 6.0, 3.0
    budget = target - math.log((order - 1) / order) + (math.log(DELTA) + math.log(order)) / (order - 1)
    filtered = RenyiFilter(target, DELTA, (order,))
    spent = 0.0
    for sigma in (5.0, 3.0, 9.0, 4.0, 6.0, 3.0, 5.0, 4.0):
        cost = order / (2 * sigma**2)
        assert filtered.remaining[order] == pytest.approx(budget - spent)
        assert filtered.admits(sigma, 1.0, 1) == (spent + cost <= budget)
        if spent + cost > budget:
            break
        filtered, spent = filtered.spend(sigma, 1.0, 1), spent + cost
    else:
        raise AssertionError("the budget was never reached")


def test_a_spent_filter_has_nothing_left_at_the_orders_that_are_used_up():
    filtered = RenyiFilter(1.0, DELTA)
    assert filtered.admits(50.0, 1.0, 10)
    full = filtered.spend(50.0, 1.0, 10)
    assert set(full.remaining) <= set(filtered.remaining)
    assert all(full.remaining[order] < filtered.remaining[order] for order in full.remaining)
    assert RenyiFilter(1.0, DELTA, (4.0,)).remaining == {}  # delta alone costs more than 1 at this order
    assert not RenyiFilter(1.0, DELTA, (4.0,)).admits(1000.0, 0.001, 1)


def test_nothing_spent_reads_nothing():
    assert RenyiOdometer(DELTA).epsilon == RenyiOdometer(DELTA).privacy_loss == 0.0
    assert RenyiFilter(1.0, DELTA).admits(0.1, 1.0, 0)


def test_both_survive_as_plain_numbers():
    filtered = (
        RenyiFilter.for_plan(4.0, DELTA, Ledger().add(1.0, 0.1, 50)).spend(1.3, 0.1, 7).spend(2.0, 0.2, 1)
    )
    lists = filtered.to_lists()
    assert all(isinstance(value, (float, list)) for value in lists.values())
    again = RenyiFilter.from_lists(lists)
    assert again == filtered and again.odometer.epsilon == filtered.odometer.epsilon
    odometer = RenyiOdometer(DELTA, (2.0, 8.0), (0.2, 0.7)).spend(1.0, 0.5, 3)
    assert RenyiOdometer.from_lists(odometer.to_lists()) == odometer


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: RenyiOdometer(0.0), r"delta must lie in \(0, 1\), got 0.0"),
        (lambda: RenyiOdometer(DELTA, (1.0, 2.0)), r"different numbers > 1, got \(1.0, 2.0\)"),
        (lambda: RenyiOdometer(DELTA, (2.0, 2.0)), "different numbers > 1"),
        (lambda: RenyiOdometer(DELTA, (2.0, 3.0), (0.9, 0.2)), r"add up to at most 1, got \(0.9, 0.2\)"),
        (lambda: RenyiOdometer(DELTA, (2.0, 3.0), (1.0,)), "for 2 orders"),
        (lambda: RenyiFilter(0.0, DELTA), "epsilon must be a number > 0, got 0.0"),
        (
            lambda: RenyiFilter(1.0, DELTA).admits(0.0, 0.1, 1),
            "noise multiplier must be a number > 0, got 0.0",
        ),
        (lambda: RenyiFilter.for_plan(1.0, DELTA, Ledger()), "an empty ledger has no best order"),
        (lambda: RenyiOdometer.from_lists({"delta": DELTA}), "has 'orders', got .*: it is damaged"),
        (lambda: RenyiFilter.from_lists({}), "has 'epsilon'"),
    ],
)
def test_nonsensical_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
