"""Bootstrap intervals over seeds and the clients within them, and what few seeds allow them to say.

Two-stage resampling: seeds are drawn with replacement, then the clients of each drawn seed; all rounds of a
client stay together, and in a difference the client is drawn for both defenses at once. The clients of
two draws of one seed are drawn anew.

Measured coverage of the nominal 95 % interval for normal values, ten clients per seed, 2000 repetitions
(`tests/report/test_resampling.py` repeats it; r is the share of the variance that lies between seeds):

    seeds        3       5       10
    r = 0        97 %    98 %    99 %
    r = 0.1      91 %    94 %    97 %
    r = 0.5      79 %    87 %    93 %
    Student-t    95 %    95 %    95 %   (any r, over the seeds' means)

So with three seeds it is trustworthy where clients differ much more than seeds do, and too narrow otherwise:
no bootstrap can know how seeds differ from three of them. The t interval holds in every row, and is
therefore what the report judges by; the bootstrap interval stands beside it, needs no normal distribution,
and need not be symmetric.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
MIN_SEEDS = 6
"""Seeds that a bootstrap over seeds alone needs: it never leaves the range of n values, and that range holds
the middle of a continuous distribution with probability 1 - 2^(1-n), 75 % for three and 97 % for six."""


def bootstrap_interval(
    seeds: Sequence[Array], level: float = 0.95, replicates: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a mean over seeds of a ratio of sums over clients, or of such a difference.

    A seed's value is sum(column 0) / sum(column 1) over its clients; with four columns minus
    sum(column 2) / sum(column 3). The two-stage scheme and its coverage: see the module.

    Args:
        seeds: per seed an array (clients, 2) or (clients, 4): sums and counts of each client's numbers. A
            quantity without clients has one row.
        level: nominal coverage.
        replicates: bootstrap draws.
        seed: of the draws.

    Returns:
        Both ends; NaN for fewer than two seeds, and for fewer than `MIN_SEEDS` if no seed has two clients.

    >>> low, high = bootstrap_interval([np.array([[v, 1.0], [v + 1, 1.0]]) for v in (0.0, 1.0, 2.0)])
    >>> 0 <= low < 1.5 < high <= 3
    True
    """
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, got {level}: choose e.g. 0.95")
    n, clients = len(seeds), max((len(rows) for rows in seeds), default=0)
    if n < 2 or (clients < 2 and n < MIN_SEEDS):
        return math.nan, math.nan
    draw = np.random.default_rng(seed)
    chosen = draw.integers(n, size=(replicates, n))
    values = np.empty((replicates, n))
    for place, rows in enumerate(seeds):
        where = chosen == place
        values[where] = _drawn(rows, int(where.sum()), draw)
    means = values.mean(axis=1)
    means = means[np.isfinite(means)]  # a draw without any row of one defense has no difference
    if not len(means):
        return math.nan, math.nan
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _drawn(rows: Array, draws: int, draw: np.random.Generator) -> Array:
    """A seed's value under `draws` resamples of its clients."""
    sums = rows[draw.integers(len(rows), size=(draws, len(rows)))].sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value: Array = sums[:, 0] / sums[:, 1]
        return value if rows.shape[1] == 2 else value - sums[:, 2] / sums[:, 3]
