"""Epsilon from a noise multiplier: the one that was claimed, and the one that was measured."""

import math

from fedaudit.accounting import Ledger, RenyiOdometer
from fedaudit.accounting import epsilon as account
from fedaudit.claims import EpsilonClaim
from fedaudit.maths.gaussian_mechanism import gaussian_epsilon


def epsilon_of(claim: EpsilonClaim, noise_scale: float = 1.0) -> float:
    """Epsilon of the claim's mechanism with `noise_scale` times the claimed noise, in every step.

    Infinite where the noise is too small for the accountant to bound anything.

    >>> steps = ((1.0, 0.01, 500), (2.0, 0.01, 500))
    >>> claim = EpsilonClaim(2.0, 1e-5, "example", "rdp-filter", 2.0, history=steps, orders=(8.0, 16.0))
    >>> round(epsilon_of(claim), 2), epsilon_of(claim, 0.5) > 4
    (1.82, True)
    """
    scaled = tuple((noise * noise_scale, rate, steps) for noise, rate, steps in claim.entries)
    if not all(noise > 1e-3 for noise, _, _ in scaled):
        return math.inf
    if not all(noise <= 1e6 for noise, _, _ in scaled):  # also for an infinite scale
        return 0.0
    if claim.accountant == "analytic":
        return gaussian_epsilon(scaled[0][0], claim.delta, claim.steps)
    try:
        if claim.accountant == "rdp-filter":
            return RenyiOdometer(claim.delta, claim.orders, claim.shares, Ledger(scaled)).epsilon
        return account(Ledger(scaled), claim.delta, claim.accountant)
    except (ValueError, OverflowError):
        return math.inf
