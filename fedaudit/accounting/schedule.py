"""Noise over several rounds for a given Rényi divergence: a schedule's shape is given, its scale is found."""

import math
from collections import Counter
from functools import lru_cache

from fedaudit.accounting.renyi import rdp_of_step
from fedaudit.accounting.smallest_noise import smallest_noise

_SMALLEST, _LARGEST = 1e-3, 1e7
_TOLERANCE = 1e-6


def schedule_cost(
    scale: float, relative: tuple[float, ...], sample_rate: float, steps: int, order: float
) -> float:
    """Rényi divergence of rounds of `steps` steps with noise multipliers scale * relative, in nats.

    >>> schedule_cost(2.0, (1.0, 0.5), sample_rate=1.0, steps=3, order=4.0)
    7.5
    """
    return math.fsum(
        count * steps * rdp_of_step(scale * part, sample_rate, order)
        for part, count in Counter(relative).items()
    )


@lru_cache(maxsize=1 << 14)
def schedule_scale(
    budget: float, relative: tuple[float, ...], sample_rate: float, steps: int, order: float
) -> float:
    """The smallest scale whose rounds together cost at most `budget` at this order.

    Within a factor 1.00001 of the smallest, and always on the private side. Results are remembered.

    Args:
        budget: Rényi divergence in nats, > 0.
        relative: noise multiplier of each round, up to the scale that is sought.
        sample_rate: probability with which an example enters a step.
        steps: of each round.
        order: Rényi order.

    Raises:
        ValueError: for a budget <= 0 or so small that no noise multiplier up to 1e7 meets it.

    >>> round(schedule_scale(7.5, (1.0, 0.5), sample_rate=1.0, steps=3, order=4.0), 3)
    2.0
    """
    if not budget > 0:
        raise ValueError(f"a budget must be > 0, got {budget}: nothing can be released")

    def excess(log_scale: float) -> float:
        cost = schedule_cost(math.exp(log_scale), relative, sample_rate, steps, order)
        return math.log(max(cost, 1e-300) / budget)

    found = smallest_noise(
        excess,
        start=1.0,
        factor=4.0,
        smallest=_SMALLEST,  # a budget met below it is met by almost any noise
        largest=_LARGEST,
        tolerance=_TOLERANCE,
        relative_tolerance=1e-12,
    )
    if found is None:
        raise ValueError(f"no noise multiplier up to {_LARGEST:.0e} meets a budget of {budget}: raise it")
    return found
