"""The search for the smallest noise that is enough, on the private side of the root."""

import math
from collections.abc import Callable


def smallest_noise(
    excess: Callable[[float], float],
    *,
    start: float,
    factor: float,
    smallest: float,
    largest: float,
    tolerance: float,
    relative_tolerance: float,
) -> float | None:
    """A noise that is enough, within exp(tolerance) of the smallest; None if none up to `largest` is.

    The bracket grows from `start` by a factor, up and then down. Where even `smallest` is enough, the end of
    the bracket above it comes back.

    Args:
        excess: of the logarithm of the noise, falling; not positive where the noise is enough.
        start: noise to begin with.
        factor: step of the bracket.
        smallest: noise below which nothing is sought.
        largest: noise above which nothing is sought.
        tolerance: of the noise's logarithm.
        relative_tolerance: the same relative to the logarithm itself.

    >>> round(smallest_noise(lambda log_noise: 2.0 - log_noise, start=1.0, factor=2.0, smallest=0.01,
    ...                      largest=1e6, tolerance=1e-6, relative_tolerance=1e-9), 3)
    7.389
    """
    from scipy.optimize import brentq  # type: ignore[import-untyped, unused-ignore]

    step = math.log(factor)
    high = math.log(start)
    while excess(high) > 0:
        high += step
        if high > math.log(largest):
            return None
    low = high - step
    while excess(low) <= 0:
        high, low = low, low - step
        if low < math.log(smallest):
            return math.exp(high)
    root = float(brentq(excess, low, high, xtol=tolerance, rtol=relative_tolerance))
    while excess(root) > 0:
        root += tolerance / 2
    return math.exp(root)
