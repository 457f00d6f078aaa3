"""Exact epsilon of unsampled Gaussian releases, and the noise a target needs; valid for every epsilon."""

import math

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

    if not noise_multiplier > 0:
        raise ValueError(f"a noise multiplier must be > 0, got {noise_multiplier}: no noise, no epsilon")
    _check_delta(delta)
    mu = math.sqrt(steps) / noise_multiplier

    def excess(eps: float) -> float:
        return gaussian_delta(eps, mu) - delta

    if excess(0.0) <= 0:
        return 0.0
    if excess(LARGEST) > 0:
        return math.inf
    return float(brentq(excess, 0.0, LARGEST, xtol=1e-9))


def gaussian_noise_multiplier(epsilon: float, delta: float, steps: int = 1) -> float:
    """The smallest sigma whose `steps` unsampled Gaussian releases are (epsilon, delta)-DP together.

    Inverts the same delta(epsilon) for mu, in which it rises, and returns sqrt(steps) / mu; a relative 1e-9
    above the root, so on the private side.

    Raises:
        ValueError: for an epsilon that is not positive and finite, a delta outside (0, 1) or steps < 1.

    >>> round(gaussian_noise_multiplier(1.0, 1e-5), 6)
    3.730632
    """
    from scipy.optimize import brentq

    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be a number > 0, got {epsilon}: choose e.g. 8")
    _check_delta(delta)
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}: count the releases")
    low, high = 1.0, 1.0
    while gaussian_delta(epsilon, low) > delta:
        low /= 2
    while gaussian_delta(epsilon, high) < delta:
        high *= 2
    mu = float(brentq(lambda mu: gaussian_delta(epsilon, mu) - delta, low, high, xtol=1e-14, rtol=1e-12))
    return math.sqrt(steps) / mu * (1 + 1e-9)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """delta at which a Gaussian release with sensitivity over standard deviation mu has this epsilon."""
    from scipy.special import log_ndtr

    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = float(log_ndtr(-mu / 2 - epsilon / mu)) + epsilon
    return math.exp(first) - math.exp(min(second, 0.0))


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}: choose it well below 1 / clients")
