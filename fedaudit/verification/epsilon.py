"""Epsilon from a noise multiplier: the one that was claimed, and the one that was measured."""

import math

from fedaudit.accounting import Accountant, Ledger
from fedaudit.accounting import epsilon as account
from fedaudit.claims import EpsilonClaim

LARGEST = 1e4
"""Above this epsilon there is no privacy to speak of; it is not computed further."""


def gaussian_epsilon(noise_multiplier: float, delta: float, steps: int = 1) -> float:
    """Exact epsilon at `delta` of `steps` Gaussian releases without sampling.

    They compose to one with mu = sqrt(steps) / sigma, whose delta(epsilon) = Phi(mu/2 - epsilon/mu) -
    e^epsilon Phi(-mu/2 - epsilon/mu) (Balle and Wang 2018, arXiv 1805.06530, theorem 8) falls in epsilon;
    this inverts it. Infinite above 10^4. It is valid for every epsilon, unlike the classic
    sigma = sqrt(2 ln(1.25 / delta)) / epsilon, which holds below 1 only.

    Raises:
        ValueError: for a noise multiplier <= 0 or a delta outside (0, 1).

    >>> round(gaussian_epsilon(1.0, 1e-5), 3), round(gaussian_epsilon(0.5, 1e-5), 3)
    (4.377, 9.997)
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    if not noise_multiplier > 0:
        raise ValueError(f"a noise multiplier must be > 0, got {noise_multiplier}: no noise, no epsilon")
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}: choose it well below 1 / clients")
    mu = math.sqrt(steps) / noise_multiplier

    def excess(eps: float) -> float:
        first, second = float(log_ndtr(mu / 2 - eps / mu)), float(log_ndtr(-mu / 2 - eps / mu)) + eps
        return math.exp(first) - math.exp(min(second, 0.0)) - delta

    if excess(0.0) <= 0:
        return 0.0
    if excess(LARGEST) > 0:
        return math.inf
    return float(brentq(excess, 0.0, LARGEST, xtol=1e-9))


def epsilon_of(claim: EpsilonClaim, noise_scale: float = 1.0) -> float:
    """Epsilon of the claim's mechanism with `noise_scale` times the claimed noise.

    Infinite where the noise is too small for the accountant to bound anything.
    """
    noise = claim.noise_multiplier * noise_scale
    if not noise > 1e-3:
        return math.inf
    if not math.isfinite(noise) or noise > 1e6:
        return 0.0
    if claim.accountant == "analytic":
        return gaussian_epsilon(noise, claim.delta, claim.steps)
    composed: Accountant = claim.accountant
    try:
        return account(Ledger(((noise, claim.sample_rate, claim.steps),)), claim.delta, composed)
    except (ValueError, OverflowError):
        return math.inf
