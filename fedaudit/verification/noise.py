"""Is there noise of the claimed size on every coordinate? Tests that hold whatever signal the noise hides.

Everything here is in units of the claimed standard deviation: a residual z = signal + noise, the noise being
N(0, s^2 I) with s = 1 if the claim holds. Two facts carry the tests. ||z||^2 is stochastically smallest
without a signal, so a central chi-square limit from below is valid for every signal; with ||signal|| <= S the
noncentral chi-square with noncentrality S^2 is a limit from above. And no interval of width h holds a
coordinate with a probability above h / sqrt(2 pi), so coordinates that crowd together are not noised.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
WIDTH = 0.01
"""Width of the bins that coordinates are counted in, in standard deviations."""
_SQRT_2PI = math.sqrt(2 * math.pi)


def scale_interval(
    norm: float, size: int, level: float, *, signal: float = 0.0, slack: float = 0.0
) -> tuple[float, float]:
    """Interval of the noise scale s that misses the true one with probability at most `level`.

    z = signal + rounding + s N(0, I_P), ||signal|| <= `signal`, ||rounding|| <= `slack`. The upper end,
    (norm + slack) / sqrt(chi2_P(level / 2)), holds for every signal; the lower end solves
    P(chi2_P((signal / s)^2) >= ((norm - slack) / s)^2) = level / 2 and is 0 where the signal may be all.

    Args:
        norm: ||z||.
        size: P, number of coordinates.
        level: probability of missing, both ends together.
        signal: bound on the signal's norm; infinite if unknown.
        slack: bound on the norm of rounding errors.

    >>> low, high = scale_interval(100.0, 10_000, 0.01)
    >>> bool(low < 1 < high), round(high - low, 3)
    (True, 0.036)
    """
    high = (norm + slack) / math.sqrt(max(_quantile(level / 2, size), 1e-300))
    left = norm - slack
    if left <= 0 or not math.isfinite(signal) or left <= signal * 1e-6:
        return 0.0, high
    most = left / math.sqrt(_quantile(level / 2, size, upper=True))
    return (most if signal == 0 else _scale_below(left, size, level / 2, signal, most)), high


def exceeding(norm: float, size: int, signal: float) -> float:
    """P(||z|| >= `norm`) at most, for z = signal + N(0, I_P) and a signal of at most this norm."""
    from scipy.special import chndtr

    # scipy.stats.ncx2 agrees to a relative 1e-5 and is a hundred times slower
    return 1.0 - float(chndtr(norm**2, size, signal**2))


@lru_cache(maxsize=65536)
def _quantile(level: float, size: int, upper: bool = False) -> float:
    """Chi-square quantile that `level` of the probability lies below, or above."""
    from scipy.stats import chi2

    return float(chi2.isf(level, size) if upper else chi2.ppf(level, size))


def _scale_below(norm: float, size: int, level: float, signal: float, most: float) -> float:
    """The smallest noise scale that, with the largest signal, reaches this norm with probability `level`."""
    from scipy.optimize import brentq

    def excess(log_scale: float) -> float:
        s = math.exp(log_scale)
        return exceeding(norm / s, size, signal / s) - level

    lowest = math.log(most) - 5.0  # below e^-5 of the largest scale it is as good as none
    if excess(lowest) >= 0:
        return 0.0
    if excess(math.log(most)) <= 0:  # numerically the two limits coincide
        return most
    return math.exp(float(brentq(excess, lowest, math.log(most), xtol=1e-3)))


def signal_noticed(size: int, signal: float, times: float, level: float) -> bool:
    """Whether a signal of `times` the allowed norm would be too long for noise and signal together.

    True if its expected squared norm, P + (times signal)^2, lies above the limit that the allowed signal
    keeps with probability 1 - level / 2.

    >>> signal_noticed(100, 30.0, 2.0, 1e-4), signal_noticed(100_000, 1.0, 2.0, 1e-4)
    (True, False)
    """
    from scipy.stats import ncx2

    if not math.isfinite(signal):
        return False
    limit = _quantile(level / 2, size, upper=True) if signal == 0 else ncx2.isf(level / 2, size, signal**2)
    return float(limit) <= size + (times * signal) ** 2


def missing_p_value(squared: float, size: int) -> float:
    """P(||z||^2 <= `squared`) at most, for any signal, if every one of `size` coordinates is noised."""
    from scipy.special import chdtr

    return float(chdtr(size, squared))


def crowding_p_value(z: Vector, resolution: float = 0.0) -> float:
    """Probability at most that so many coordinates share one bin of width 0.01, for any signal.

    A coordinate lies in a given interval of width h with probability at most p = h / sqrt(2 pi), so the
    others in the bin of coordinate i are stochastically fewer than Binomial(P - 1, p); a union over i gives
    the bound. Zeros, clamped values, few levels and un-noised copies of a value crowd.

    Args:
        z: residual (P,).
        resolution: spacing of the numbers that z was rounded to, in standard deviations.

    >>> crowding_p_value(np.zeros(50)) < 1e-60, crowding_p_value(np.linspace(-2, 2, 50)) > 0.01
    (True, True)
    """
    from scipy.special import bdtrc

    if z.size < 2:
        return 1.0
    _, counts = np.unique(np.floor(z / WIDTH), return_counts=True)
    p = min(1.0, (WIDTH + resolution) / _SQRT_2PI)
    most = int(counts.max())
    return 1.0 if most < 2 else min(1.0, z.size * float(bdtrc(most - 2, z.size - 1, p)))


def shape_p_value(z: Vector) -> float:
    """Kolmogorov-Smirnov p-value of z (P,) against N(0, 1): for residuals without any signal."""
    from scipy.special import ndtr
    from scipy.stats import kstwo

    steps = np.arange(z.size + 1) / z.size
    below = ndtr(np.sort(z))
    distance = max(float((steps[1:] - below).max()), float((below - steps[:-1]).max()))
    return float(kstwo.sf(distance, z.size))


def correlation_interval(
    squared_x: Vector, squared_y: Vector, inner: Vector, size: int, level: float
) -> tuple[Vector, Vector]:
    """Intervals of the correlation between the noises of two residuals, for any two signals.

    ||x - y||^2 >= 2 (1 - rho) chi2_P and ||x + y||^2 >= 2 (1 + rho) chi2_P, both stochastically and whatever
    the signals, because a signal only adds. Each end fails with probability at most level / 2. It presumes
    noise of the claimed size in both.

    Args:
        squared_x: ||x||^2, x in units of its claimed noise; any shape.
        squared_y: ||y||^2.
        inner: <x, y>.
        size: P.
        level: probability of missing.

    >>> thousand = np.array(1000.0)
    >>> low, high = correlation_interval(thousand, thousand, thousand, 1000, 0.01)  # the same noise twice
    >>> round(float(low), 3), bool(high > 1)
    (1.0, True)
    """
    least = max(_quantile(level / 2, size), 1e-300)
    minus = np.maximum(squared_x + squared_y - 2 * inner, 0.0) / 2
    plus = np.maximum(squared_x + squared_y + 2 * inner, 0.0) / 2
    return 1 - minus / least, plus / least - 1


def prefix_pairs(parts: Sequence[Vector], smallest: int) -> list[tuple[int, int, int]]:
    """Pairs (i, j, m) of tensors with at least `smallest` coordinates, m the shorter one's number."""
    long = [i for i, part in enumerate(parts) if part.size >= smallest]
    return [(i, j, min(parts[i].size, parts[j].size)) for n, i in enumerate(long) for j in long[n + 1 :]]
