"""Divergences of the sampled Gaussian against Opacus' series and against the integral itself."""

import math

import numpy as np
import pytest
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.integrate import quad

from fedaudit.accounting.renyi import conversion, orders, rdp_curve, rdp_of_step
from fedaudit.accounting.schedule import schedule_cost, schedule_scale


@pytest.mark.parametrize("q", [0.001, 0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.0, 2.5, 20.0])
def test_a_step_diverges_as_much_as_opacus_series_says(sigma, q):
    for order in (1.01, 1.5, 2.0, 3.3, 6.0, 10.9, 24.0, 63.0):
        theirs = float(np.sum(compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=[order])))
        # their series stops at terms of exp(-30) beside a moment near 1
        assert rdp_of_step(sigma, q, order) == pytest.approx(theirs, rel=1e-9, abs=1e-12 / (order - 1))


@pytest.mark.parametrize(
    "sigma, q, order", [(0.8, 0.1, 1.7), (0.8, 0.1, 5.3), (3.0, 0.4, 10.5), (0.25, 0.5, 2.5)]
)
def test_a_fractional_order_is_the_integral_of_its_definition(sigma, q, order):
    def integrand(t):
        log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + t / sigma - 0.5 / sigma**2)
        return math.exp(order * log_ratio - t * t / 2) / math.sqrt(2 * math.pi)

    moment, _ = quad(integrand, -15, order / sigma + 15, limit=500, epsabs=0, epsrel=1e-11)
    assert rdp_of_step(sigma, q, order) == pytest.approx(math.log(moment) / (order - 1), rel=1e-8)


def test_a_curve_holds_what_the_single_orders_hold():
    for sigma, q in ((0.9, 0.07), (4.0, 1.0)):
        at = (1.5, 2.0, 7.0, 7.5, 128.0)
        assert rdp_curve(sigma, q, at).tolist() == pytest.approx(
            [rdp_of_step(sigma, q, order) for order in at], rel=1e-12
        )
        with pytest.raises(ValueError, match="read-only"):
            rdp_curve(sigma, q, at)[0] = 0.0


def test_divergence_falls_with_noise_and_grows_with_sampling_and_order():
    assert rdp_of_step(1.0, 0.1, 4.5) > rdp_of_step(1.1, 0.1, 4.5) > 0
    assert rdp_of_step(1.0, 0.2, 4.5) > rdp_of_step(1.0, 0.1, 4.5)
    spread = [rdp_of_step(1.0, 0.1, order) for order in orders()]
    assert spread == sorted(spread)


def test_huge_divergences_are_numbers():
    assert math.isfinite(rdp_of_step(0.02, 0.01, 1024.0))
    assert rdp_of_step(0.02, 0.01, 1024.0) == pytest.approx(1024 / (2 * 0.02**2), rel=0.01)


def test_an_order_that_is_not_defined_is_refused():
    with pytest.raises(ValueError, match=r"an order is a number > 1, and whole above 64, got 1.0"):
        rdp_of_step(1.0, 0.1, 1.0)
    with pytest.raises(ValueError, match=r"whole above 64, got 70.5"):
        rdp_of_step(1.0, 0.1, 70.5)


def test_conversion_is_the_tightest_of_its_form():
    """sup over x of (1 - e^-x) e^(-(a-1) x) is the constant that the conversion uses."""
    order, delta, rdp = 3.0, 1e-4, 0.7
    epsilon = rdp + conversion(order, delta)
    x = np.linspace(0, 5, 200_001)
    constant = ((1 - np.exp(-x)) * np.exp(-(order - 1) * x)).max()
    assert constant * math.exp((order - 1) * (rdp - epsilon)) == pytest.approx(delta, rel=1e-6)


@pytest.mark.parametrize("relative", [(1.0,) * 7, tuple(0.8**r for r in range(9)), (2.0, 1.0, 2.0)])
@pytest.mark.parametrize("q, order", [(0.1, 4.0), (1.0, 12.0), (0.02, 2.7)])
def test_a_schedule_spends_its_budget_and_hardly_less(relative, q, order):
    scale = schedule_scale(0.5, relative, q, 4, order)
    naive = sum(4 * rdp_of_step(scale * part, q, order) for part in relative)
    assert schedule_cost(scale, relative, q, 4, order) == pytest.approx(naive, rel=1e-12)
    assert 0.5 * (1 - 1e-4) < naive <= 0.5


def test_a_schedule_without_a_budget_is_refused():
    with pytest.raises(ValueError, match=r"a budget must be > 0, got 0.0"):
        schedule_scale(0.0, (1.0,), 0.1, 1, 4.0)
    with pytest.raises(ValueError, match=r"no noise multiplier up to 1e\+07 meets a budget of 1e-30"):
        schedule_scale(1e-30, (1.0,), 1.0, 1, 4.0)
