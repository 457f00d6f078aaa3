"""Spearman's rank correlation, pooled within strata, with a bootstrap interval over clusters."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho and its percentile interval.

    Attributes:
        value: rho in [-1, 1]; NaN if one side does not vary.
        low: lower end of the interval; NaN where there are too few clusters.
        high: upper end.
        points: pairs used.
        clusters: independent groups the pairs come from.
    """

    value: float
    low: float
    high: float
    points: int
    clusters: int


def spearman(x: ArrayLike, y: ArrayLike, strata: Sequence[Hashable] | None = None) -> float:
    """Spearman's rho of x and y, without unit: the correlation of their ranks, ties at their mean rank.

    With strata, ranks are taken within each stratum, centred and scaled to [-1/2, 1/2] there, and all strata
    are pooled: what is left is whether y follows x AMONG the points of a stratum. Differences between strata
    count nothing, and neither does a stratum in which one side does not vary.

    Args:
        x: first values (n,).
        y: second values (n,).
        strata: stratum of each pair; None is one stratum.

    Returns:
        rho in [-1, 1]; NaN if one side varies in no stratum.

    Raises:
        ValueError: if lengths differ.

    >>> spearman([1, 2, 3, 4], [1, 4, 9, 16])
    1.0
    >>> spearman([1, 2, 11, 12], [2, 1, 12, 11], ["a", "a", "b", "b"])
    -1.0
    """
    a, b = np.asarray(x, float), np.asarray(y, float)
    labels = _codes(strata if strata is not None else [0] * len(a))
    if not len(a) == len(b) == len(labels):
        raise ValueError(f"pairs need one length, got {len(a)}, {len(b)} and {len(labels)}: match them")
    first, second = _ranks(a, b, labels)
    scale = math.sqrt(float(first @ first) * float(second @ second))
    return round(float(first @ second) / scale, 12) if scale > 0 else math.nan


def rank_correlation(
    x: ArrayLike,
    y: ArrayLike,
    *,
    strata: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> RankCorrelation:
    """Spearman's rho with a percentile bootstrap interval; pairs with NaN on a side are left out.

    Clusters are drawn with replacement, whole: pairs of one client share its data and are not independent.
    The interval covers the chance of which clusters were looked at, not another federation or attack.

    Args:
        x: first values (n,).
        y: second values (n,).
        strata: ranks are taken within these (see `spearman`).
        clusters: independent groups of pairs; None makes each pair its own.
        level: nominal coverage.
        replicates: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: if lengths differ or the level is not inside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"a level lies inside (0, 1), got {level}: use e.g. 0.95")
    a, b = np.asarray(x, float), np.asarray(y, float)
    stratum = _codes(strata if strata is not None else [0] * len(a))
    cluster = _codes(clusters if clusters is not None else list(range(len(a))))
    if not len(a) == len(b) == len(stratum) == len(cluster):
        raise ValueError(
            f"pairs need one length, got {len(a)} and {len(b)}: match values, strata and clusters"
        )
    known = np.isfinite(a) & np.isfinite(b)
    a, b, stratum, cluster = a[known], b[known], stratum[known], _codes(cluster[known].tolist())
    value = spearman(a, b, stratum.tolist()) if len(a) else math.nan
    members = [np.flatnonzero(cluster == c) for c in range(int(cluster.max(initial=-1)) + 1)]
    found: list[float] = []
    if len(members) >= 3:
        generator = np.random.default_rng(seed)
        for _ in range(replicates):
            rows = np.concatenate([members[c] for c in generator.integers(len(members), size=len(members))])
            drawn = spearman(a[rows], b[rows], stratum[rows].tolist())
            if not math.isnan(drawn):
                found.append(drawn)
    ends = [math.nan, math.nan]
    if len(found) >= replicates / 2:
        ends = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return RankCorrelation(value, ends[0], ends[1], len(a), len(members))


def _codes(labels: Sequence[Hashable]) -> NDArray[np.int64]:
    numbers: dict[Hashable, int] = {}
    return np.asarray([numbers.setdefault(label, len(numbers)) for label in labels], np.int64)


def _ranks(
    a: NDArray[np.float64], b: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centred ranks of both sides within strata; zero where one side does not vary."""
    first, second = np.zeros(len(a)), np.zeros(len(b))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        ranks = [rankdata(side[rows]) - (len(rows) + 1) / 2 for side in (a, b)]
        if all(rank.any() for rank in ranks):
            first[rows], second[rows] = (rank / max(len(rows) - 1, 1) for rank in ranks)
    return first, second
