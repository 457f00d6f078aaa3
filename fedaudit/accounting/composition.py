"""Epsilon of a whole ledger whose noise was decided in advance, and the noise that a target needs."""

import math
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np

from fedaudit.accounting.ledger import Entry, Ledger, check_delta, check_step
from fedaudit.accounting.renyi import conversion, orders, rdp_of_step
from fedaudit.accounting.smallest_noise import smallest_noise

Accountant = Literal["rdp", "prv", "pld"]

_LARGEST_NOISE = 1e6
_SMALLEST_NOISE = 0.02


def epsilon(ledger: Ledger, delta: float, accountant: Accountant = "rdp") -> float:
    """Upper bound on epsilon at `delta` of everything in the ledger; 0 for an empty one.

    "rdp" adds Rényi divergences of the sampled Gaussian (Mironov, Talwar, Zhang 2019, arXiv
    1908.10530) and converts once by Balle et al. 2020 (arXiv 1905.09982, theorem 21),
    eps = rdp(a) + ln((a-1)/a) - (ln delta + ln a)/(a-1), minimised over orders 1.01 to 1024. Beyond
    those orders (epsilon under about 0.01, or in the hundreds) the bound holds but is looser.
    "prv" composes privacy random variables by FFT (Gopi et al. 2021, arXiv 2106.02848; Opacus) and
    returns its upper end, 0.01 above the estimate. "pld" composes privacy loss distributions
    (dp-accounting, pessimistic rounding). All three accept a sample rate of 1. "rdp" costs
    milliseconds and is 5 to 25 % larger at epsilons of 1 to 10, and much larger under 0.2; "prv" and
    "pld" cost tenths of a second.

    It is a bound under the mechanism's assumptions (Poisson sampling, secret noise, noise decided before
    the first step), not a measurement, and not a client-level guarantee. Results are remembered.

    Args:
        ledger: every step taken.
        delta: probability in (0, 1) with which the bound may fail.
        accountant: how to compose.

    Raises:
        ValueError: for a delta outside (0, 1), an unknown accountant, or a case that "prv" cannot
            compute.

    >>> round(epsilon(Ledger().add(1.0, 0.01, steps=1000), delta=1e-5), 3)
    2.101
    """
    _check_target(delta, accountant)
    totals: dict[tuple[float, float], int] = {}
    for noise_multiplier, sample_rate, steps in ledger.history:
        key = (noise_multiplier, sample_rate)
        totals[key] = totals.get(key, 0) + steps
    return _epsilon(tuple((*key, totals[key]) for key in sorted(totals)), delta, accountant)


@lru_cache(maxsize=4096)
def noise_multiplier_for(
    epsilon: float, delta: float, sample_rate: float, steps: int, accountant: Accountant = "rdp"
) -> float:
    """The smallest noise multiplier whose epsilon after `steps` steps is at most `epsilon`.

    Within a factor 1.0002 ("rdp") or 1.002 ("prv", "pld") of the smallest, and always on the private
    side; multipliers under 0.02 are not sought. Results are remembered. "rdp" takes
    milliseconds, "prv" and "pld" seconds.

    Opacus' `get_noise_multiplier` solves the same equation to an absolute tolerance of 0.01 in
    epsilon. It cannot reach targets under about 0.15, as its orders end at 63, has no "pld", and
    evaluates every order for every guess, which counts where every client has its own sample rate.

    Raises:
        ValueError: for arguments out of range, or if no noise multiplier up to 1e6 is enough.

    >>> round(noise_multiplier_for(2.101, 1e-5, 0.01, 1000), 2)
    1.0
    """
    _check_target(delta, accountant)
    check_step(1.0, sample_rate, steps)
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be a number > 0, got {epsilon}: choose e.g. 8")

    def excess(log_noise: float) -> float:
        reached = _epsilon(((math.exp(log_noise), sample_rate, steps),), delta, accountant)
        return math.log(min(max(reached, 1e-12), 1e12) / epsilon)

    # "rdp" is cheap and gives a noise multiplier that is a little too large for the other two
    start = 1.0 if accountant == "rdp" else noise_multiplier_for(epsilon, delta, sample_rate, steps, "rdp")
    found = smallest_noise(
        excess,
        start=start,
        factor=2.0,
        smallest=_SMALLEST_NOISE,  # a target met below it is met by almost any noise
        largest=_LARGEST_NOISE,
        tolerance=1e-4 if accountant == "rdp" else 1e-3,
        relative_tolerance=1e-9,
    )
    if found is None:
        raise ValueError(
            f"no noise multiplier up to {_LARGEST_NOISE:.0e} reaches epsilon={epsilon} at delta={delta} "
            f"after {steps} steps with accountant {accountant!r}: raise epsilon or take fewer steps"
        )
    return found


@lru_cache(maxsize=16384)
def _epsilon(history: tuple[Entry, ...], delta: float, accountant: Accountant) -> float:
    if not history:
        return 0.0
    compose = {"rdp": _rdp_epsilon, "prv": _prv_epsilon, "pld": _pld_epsilon}[accountant]
    return max(0.0, compose(history, delta))  # the conversions may fall below 0, where 0 holds


def _rdp_epsilon(history: tuple[Entry, ...], delta: float) -> float:
    return _best(history, delta)[0]


def best_order(ledger: Ledger, delta: float) -> float:
    """The Rényi order at which `epsilon` of a ledger is attained; it depends on no output.

    Raises:
        ValueError: for an empty ledger or a delta outside (0, 1).
    """
    check_delta(delta)
    if not ledger.history:
        raise ValueError("an empty ledger has no best order, got no steps: plan some")
    return _best(ledger.history, delta)[1]


def _best(history: tuple[Entry, ...], delta: float) -> tuple[float, float]:
    """Smallest bound over orders, and its order."""

    def at(index: int) -> float:
        order = orders()[index]
        rdp = sum(steps * rdp_of_step(noise, rate, order) for noise, rate, steps in history)
        return rdp + conversion(order, delta)

    # (a-1)*at is convex in a, so `at` falls, then rises: bisection finds the minimum with few of the
    # costly divergences. Any order gives a valid bound, so rounding can only loosen it.
    low, high = 0, len(orders()) - 1
    while low < high:
        middle = (low + high) // 2
        if at(middle) <= at(middle + 1):
            high = middle
        else:
            low = middle + 1
    return at(low), orders()[low]


def _prv_epsilon(history: tuple[Entry, ...], delta: float) -> float:
    from fedaudit.opacus_parts import PRVAccountant

    accountant = PRVAccountant()  # type: ignore[no-untyped-call]
    accountant.history = list(history)
    try:
        with np.errstate(divide="ignore"):  # log(1 - q) at q = 1 is -inf, and right
            return float(accountant.get_epsilon(delta))
    except RuntimeError as error:
        raise ValueError(
            f"accountant 'prv' cannot compute epsilon of {history} at delta={delta} ({error}): "
            "use 'rdp' or 'pld'"
        ) from error


@lru_cache(maxsize=64)
def _pld_of_step(noise_multiplier: float, sample_rate: float) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(noise_multiplier, sampling_prob=sample_rate)


def _pld_epsilon(history: tuple[Entry, ...], delta: float) -> float:
    parts = [_pld_of_step(noise, rate).self_compose(steps) for noise, rate, steps in history]
    total = parts[0]
    for part in parts[1:]:
        total = total.compose(part)
    return float(total.get_epsilon_for_delta(delta))


def _check_target(delta: float, accountant: str) -> None:
    check_delta(delta)
    if accountant not in get_args(Accountant):
        raise ValueError(f"an accountant is one of {', '.join(get_args(Accountant))}, got {accountant!r}")
