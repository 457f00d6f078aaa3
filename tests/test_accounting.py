import subprocess
import sys

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.stats import norm

from fedaudit.accounting import Ledger, epsilon, noise_multiplier_for, renyi

# q, sigma, steps, delta, epsilon by privacy loss distributions, by Opacus' Rényi accountant
TABLE = [
    (0.01, 1.0, 1000, 1e-5, 1.828, 2.101),
    (0.01, 1.1, 10000, 1e-5, 5.193, 5.632),
    (256 / 60000, 1.1, 14040, 1e-5, 2.380, 2.594),
    (0.1, 1.0, 100, 1e-3, 4.784, 5.641),
    (0.2, 1.0, 50, 1e-2, 5.228, 6.44),
    (1.0, 1.0, 1, 1e-5, 4.377, 4.729),
    (1.0, 5.0, 100, 1e-5, 9.997, 10.726),
]


@pytest.mark.parametrize("accountant, tolerance", [("rdp", 0.01), ("prv", 0.02), ("pld", 0.02)])
@pytest.mark.parametrize("q, sigma, steps, delta, pld, rdp", TABLE, ids=lambda v: f"{v:.3g}")
def test_epsilon_agrees_with_the_reference_table(q, sigma, steps, delta, pld, rdp, accountant, tolerance):
    reached = epsilon(Ledger().add(sigma, q, steps), delta, accountant)
    assert reached == pytest.approx(rdp if accountant == "rdp" else pld, rel=tolerance)


@pytest.mark.parametrize("sigma, steps", [(1.0, 1), (5.0, 100), (20.0, 10)])
@pytest.mark.parametrize("accountant, excess", [("rdp", 0.35), ("prv", 0.012), ("pld", 0.001)])
def test_epsilon_of_the_plain_gaussian_mechanism_is_just_above_its_closed_form(
    sigma, steps, accountant, excess
):
    delta = 1e-5
    reached = epsilon(Ledger().add(sigma, 1.0, steps), delta, accountant)

    def exact_delta(eps):  # Balle and Wang 2018, theorem 8, for mu = sqrt(steps) / sigma
        mu = steps**0.5 / sigma
        return norm.cdf(mu / 2 - eps / mu) - norm.cdf(-mu / 2 - eps / mu) * 2.718281828459045**eps

    assert exact_delta(reached) <= delta
    assert exact_delta(reached - excess * max(1.0, reached / 4)) > delta


@pytest.mark.parametrize(
    "sigma, q, steps, rounds", [(1.0, 32 / 600, 19, 10), (0.8, 0.25, 4, 50), (3.0, 1.0, 1, 30)]
)
def test_rounds_add_up_to_opacus_own_accountant_stepped_as_often(sigma, q, steps, rounds):
    from opacus.accountants import RDPAccountant

    ledger = Ledger()
    reference = RDPAccountant()
    for _ in range(rounds):
        ledger = ledger.add(sigma, q, steps)
        for _ in range(steps):
            reference.step(noise_multiplier=sigma, sample_rate=q)
    assert ledger.steps == steps * rounds
    assert epsilon(ledger, 1e-5) == pytest.approx(reference.get_epsilon(1e-5), rel=1e-9)


@pytest.mark.parametrize("accountant", ["rdp", "prv", "pld"])
def test_rounds_cost_as_much_as_the_same_steps_at_once(accountant):
    rounds = Ledger().add(1.0, 0.1, 5).add(1.0, 0.1, 5).add(1.0, 0.1, 10)
    assert epsilon(rounds, 1e-5, accountant) == epsilon(Ledger(((1.0, 0.1, 20),)), 1e-5, accountant)
    one_round = epsilon(Ledger().add(1.0, 0.1, 5), 1e-5, accountant)
    assert epsilon(rounds, 1e-5, accountant) > one_round


@pytest.mark.parametrize("accountant", ["rdp", "prv", "pld"])
def test_more_steps_never_cost_less(accountant):
    reached = [epsilon(Ledger().add(1.2, 0.01, steps), 1e-5, accountant) for steps in (1, 10, 100)]
    assert reached == sorted(reached)
    assert reached[0] > 0


def test_a_history_of_several_noises_agrees_with_dp_accounting():
    history = ((3.0, 0.1, 10), (4.0, 0.3, 5), (8.0, 1.0, 2))
    event = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps
            )
            for sigma, q, steps in history
        ]
    )
    exact = PLDAccountant().compose(event).get_epsilon(1e-5)
    assert epsilon(Ledger(history), 1e-5, "pld") == pytest.approx(exact, rel=1e-3)
    assert epsilon(Ledger(history), 1e-5, "prv") == pytest.approx(exact, abs=0.02)
    orders = [order for order in renyi.orders() if order.is_integer()]
    summed = RdpAccountant(orders).compose(event).get_epsilon(1e-5)
    assert epsilon(Ledger(history), 1e-5, "rdp") == pytest.approx(summed, rel=1e-6)
    assert epsilon(Ledger(history[::-1]), 1e-5, "rdp") == epsilon(Ledger(history), 1e-5, "rdp")


@pytest.mark.parametrize("sigma, q, steps", [(0.7, 0.01, 3), (1.0, 0.2, 500), (8.0, 0.002, 5), (2.0, 1.0, 7)])
def test_bisection_over_orders_finds_the_smallest_bound(sigma, q, steps):
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    orders = list(renyi.orders())
    rdp = compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=orders)
    smallest, _ = get_privacy_spent(orders=orders, rdp=rdp, delta=1e-5)
    assert epsilon(Ledger().add(sigma, q, steps), 1e-5) == pytest.approx(smallest, rel=1e-9)


def test_an_empty_ledger_has_spent_nothing():
    assert epsilon(Ledger(), 1e-5) == 0.0
    assert Ledger().add(1.0, 0.1, 0) == Ledger()


def test_epsilon_is_never_negative_where_delta_alone_covers_the_mechanism():
    assert epsilon(Ledger().add(1000.0, 0.001, 1), 0.5) == 0.0


def test_a_ledger_survives_as_lists_of_plain_numbers():
    ledger = Ledger().add(1.5, 0.1, 4).add(1.5, 0.1, 4).add(2.0, 0.25, 1)
    lists = ledger.to_lists()
    assert lists == {"noise-multipliers": [1.5, 2.0], "sample-rates": [0.1, 0.25], "steps": [8, 1]}
    assert all(type(step) is int for step in lists["steps"])
    assert Ledger.from_lists(lists) == ledger
    assert Ledger.from_lists({}) == Ledger()


def test_a_damaged_ledger_is_refused():
    with pytest.raises(ValueError, match="equal lengths, got 1, 1, 0"):
        Ledger.from_lists({"noise-multipliers": [1.0], "sample-rates": [0.1], "steps": []})
    with pytest.raises(ValueError, match=r"sample rate must lie in \(0, 1\], got 1\.1"):
        Ledger.from_lists({"noise-multipliers": [1.0], "sample-rates": [1.1], "steps": [1]})


@pytest.mark.parametrize(
    "target, q, steps, accountant",
    [
        (8.0, 0.08, 125, "rdp"),
        (0.05, 0.01, 100, "rdp"),
        (3.0, 1.0, 20, "rdp"),
        (3.0, 1.0, 20, "prv"),
        (1.0, 1.0, 5, "pld"),
    ],
)
def test_the_noise_found_is_enough_and_hardly_more(target, q, steps, accountant):
    sigma = noise_multiplier_for(target, 1e-5, q, steps, accountant)
    assert epsilon(Ledger().add(sigma, q, steps), 1e-5, accountant) <= target
    factor = 1.0002 if accountant == "rdp" else 1.002
    assert epsilon(Ledger().add(sigma / factor, q, steps), 1e-5, accountant) > target


def test_the_noise_found_agrees_with_opacus_within_its_tolerance():
    from opacus.accountants.utils import get_noise_multiplier

    theirs = get_noise_multiplier(
        target_epsilon=4.0, target_delta=1e-5, sample_rate=0.02, steps=200, accountant="rdp"
    )
    ours = noise_multiplier_for(4.0, 1e-5, 0.02, 200)
    assert ours == pytest.approx(theirs, rel=2e-3)


def test_a_very_generous_target_gets_little_noise_and_still_holds():
    sigma = noise_multiplier_for(1e5, 1e-5, 1.0, 1)
    assert 0 < sigma < 0.1
    assert epsilon(Ledger().add(sigma, 1.0, 1), 1e-5) <= 1e5


def test_a_target_below_the_accountants_precision_is_refused():
    with pytest.raises(ValueError, match=r"no noise multiplier up to 1e\+06 reaches epsilon=1e-09"):
        noise_multiplier_for(1e-9, 1e-12, 1.0, 10)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Ledger().add(0.0, 0.1, 1), "noise multiplier must be a number > 0, got 0.0"),
        (lambda: Ledger().add(float("inf"), 0.1, 1), "noise multiplier must be a number > 0, got inf"),
        (lambda: Ledger().add(1.0, 0.0, 1), r"sample rate must lie in \(0, 1\], got 0.0"),
        (lambda: Ledger().add(1.0, 0.1, -1), "steps must be a whole number >= 1, got -1"),
        (lambda: Ledger(((1.0, 0.1, 1.5),)), "steps must be a whole number >= 1, got 1.5"),
        (lambda: epsilon(Ledger(), 0.0), r"delta must lie in \(0, 1\), got 0.0"),
        (lambda: epsilon(Ledger(), 1e-5, "gdp"), "one of rdp, prv, pld, got 'gdp'"),
        (lambda: noise_multiplier_for(0.0, 1e-5, 0.1, 1), "epsilon must be a number > 0, got 0.0"),
        (lambda: noise_multiplier_for(1.0, 1e-5, 0.1, 0), "steps must be a whole number >= 1, got 0"),
    ],
)
def test_nonsensical_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_opacus_is_imported_late_and_leaves_the_root_logger_alone():
    code = (
        "import logging, sys, fedaudit.accounting, fedaudit.training.local, fedaudit.defenses.dp_sgd\n"
        "assert 'opacus' not in sys.modules, 'imported early'\n"
        "import fedaudit.opacus_parts\n"
        "assert not logging.root.handlers, logging.root.handlers\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
