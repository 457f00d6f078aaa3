"""Epsilon from a noise multiplier: the one that was claimed, and the one that was measured."""

import math

from fedaudit.accounting import Accountant, Ledger
from fedaudit.accounting import epsilon as account
from fedaudit.claims import EpsilonClaim
from fedaudit.gaussian_mechanism import gaussian_epsilon


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
