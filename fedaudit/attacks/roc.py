"""How well scores tell members from non-members: the ROC curve, its area and its start, with intervals.

A score is compared with one threshold for everybody. Intervals are exact or distribution-free where scores
are independent, and a bootstrap over clusters where scores of one client hang together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import beta, norm, rankdata
from torch import Tensor

_RESAMPLES = 1000


@dataclass(frozen=True)
class Rate:
    """A probability, its interval, and why there is none.

    Attributes:
        value: the estimate; NaN where the data cannot give one.
        low: lower end of the interval; NaN with the value.
        high: upper end.
        reason: why the value is NaN; else empty.
    """

    value: float
    low: float
    high: float
    reason: str = ""


def roc(scores: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """False- and true-positive rates of "score at least t", t falling over all scores: from (0, 0) to (1, 1).

    Equal scores are one point: no threshold tells them apart.

    Args:
        scores: (n,), larger for a member.
        members: booleans (n,).

    Returns:
        FPR (k,) and TPR (k,), float64, both rising.

    Raises:
        ValueError: if a side is empty or a score is not finite.

    >>> fpr, tpr = roc(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True]))
    >>> fpr.tolist(), tpr.tolist()
    ([0.0, 0.0, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0])
    """
    inside, outside = _sides(scores, members)
    thresholds = torch.unique(torch.cat([inside, outside])).flip(0)
    fpr, tpr = (
        torch.searchsorted(-side.sort(descending=True).values, -thresholds, right=True).double() / len(side)
        for side in (outside, inside)
    )
    return torch.cat([fpr.new_zeros(1), fpr]), torch.cat([tpr.new_zeros(1), tpr])


def auc(
    scores: Tensor,
    members: Tensor,
    *,
    clusters: Tensor | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Rate:
    """The chance that a random member scores above a random non-member, ties counting half.

    0.5 is guessing. An average over thresholds: 0.55 may be everybody a little, or a few for certain, see
    `true_positives_at`. The interval is DeLong's, from the variances of each side's placements. With clusters
    it is a percentile bootstrap that draws whole clusters. Where all pairs agree (0 or 1) both would shrink
    to a point; there it is Clopper-Pearson's on disjoint pairs, one per cluster if there are clusters.

    Sources: Mann and Whitney 1947; DeLong, DeLong and Clarke-Pearson 1988.

    Args:
        scores: (n,), larger for a member.
        members: booleans (n,).
        clusters: whole numbers (n,), e.g. the client whose update was scored; None: all independent.
        level: coverage of the interval.
        seed: of the bootstrap.

    Returns:
        The area with its interval; the interval is NaN where fewer than two members or non-members, or fewer
        than three clusters, give no spread.

    Raises:
        ValueError: as `roc`, or if the level is not inside (0, 1).

    >>> auc(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([False, True, False, True])).value
    0.75
    """
    _check_level(level)
    inside, outside = _sides(scores, members)
    m, n = len(inside), len(outside)
    above, below = placements(inside, outside)
    value = float(above.mean())
    if value in (0.0, 1.0):
        pairs = min(m, n) if clusters is None else _complete(clusters, members)
        ends = _clopper_pearson(round(value) * pairs, pairs, 1 - level)
        return Rate(value, *ends)
    if clusters is not None:
        return Rate(value, *_auc_bootstrap(scores, members, clusters, level, seed))
    if min(m, n) < 2:
        return Rate(value, math.nan, math.nan)
    spread = math.sqrt(float(above.var() / m + below.var() / n))
    reach = float(norm.ppf((1 + level) / 2)) * spread
    return Rate(value, max(0.0, value - reach), min(1.0, value + reach))


def placements(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """The share of non-members below each member (m,), and of members above each non-member (n,).

    Ties count half; the mean of either is the area under the curve. Scores are float64 on the CPU.

    >>> placements(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 3.0]))[0].tolist()
    [0.5, 1.0]
    """
    m, n = len(inside), len(outside)
    ranks = torch.from_numpy(rankdata(torch.cat([inside, outside]).numpy())).double()
    own = [torch.from_numpy(rankdata(side.numpy())).double() for side in (inside, outside)]
    return (ranks[:m] - own[0]) / n, 1 - (ranks[m:] - own[1]) / m


def true_positives_at(
    fpr: float,
    scores: Tensor,
    members: Tensor,
    *,
    clusters: Tensor | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Rate:
    """The share of members that can be named while at most a share `fpr` of non-members is named wrongly.

    The threshold leaves floor(fpr * n) of n non-members strictly above it. It comes from the same scores, so
    a binomial interval of the members above it would be too short. The interval here covers the threshold as
    well: the false-positive rate of the k-th largest of n non-members' scores is Beta(k, n - k + 1). The low
    end is Clopper-Pearson's at a threshold that surely keeps `fpr`, the high end at one that surely exceeds
    it, with a quarter of 1 - level for each of the four ways to fail: distribution-free, and on the safe
    side. With clusters it is a percentile bootstrap that draws whole clusters and finds the threshold anew;
    where none or all are named, which no bootstrap can doubt, Clopper-Pearson's on one member per cluster.

    Args:
        fpr: false-positive rate in (0, 1), e.g. 0.01.
        scores: (n,), larger for a member.
        members: booleans (n,).
        clusters: whole numbers (n,), e.g. the client whose update was scored; None: all independent.
        level: coverage of the interval.
        seed: of the bootstrap.

    Returns:
        The true-positive rate; NaN with the reason if fewer than 1 / fpr non-members cannot resolve it.

    Raises:
        ValueError: as `roc`, or if `fpr` or the level is not inside (0, 1).

    >>> scores, members = torch.arange(200.0), torch.arange(200) >= 100
    >>> true_positives_at(0.01, scores, members).value, true_positives_at(0.001, scores, members).reason
    (1.0, 'a false-positive rate of 0.001 needs at least 1000 non-members, got 100')
    """
    _check_level(level)
    if not 0 < fpr < 1:
        raise ValueError(f"a false-positive rate lies inside (0, 1), got {fpr}: use e.g. 0.01")
    inside, outside = _sides(scores, members)
    n = len(outside)
    allowed = math.floor(fpr * n + 1e-9)
    if allowed < 1:
        needed = math.ceil(1 / fpr - 1e-9)
        reason = f"a false-positive rate of {fpr:g} needs at least {needed} non-members, got {n}"
        return Rate(math.nan, math.nan, math.nan, reason)
    falling = outside.sort(descending=True).values
    value = float((inside > falling[allowed]).double().mean())
    if clusters is not None and value in (0.0, 1.0):
        count = _complete(clusters, members)
        return Rate(value, *_clopper_pearson(round(value) * count, count, 1 - level))
    if clusters is not None:
        return Rate(value, *_tpr_bootstrap(fpr, scores, members, clusters, level, seed))
    return Rate(value, *_tpr_interval(fpr, inside, falling, (1 - level) / 4))


def _sides(scores: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of members and of non-members, float64."""
    if scores.ndim != 1 or scores.shape != members.shape or members.dtype != torch.bool:
        raise ValueError(
            f"scores (n,) need one boolean each, got {tuple(scores.shape)} and {tuple(members.shape)} of "
            f"{members.dtype}: pass both as vectors"
        )
    inside, outside = scores[members].double().cpu(), scores[~members].double().cpu()
    if not len(inside) or not len(outside):
        raise ValueError(
            f"a curve needs members and non-members, got {len(inside)} and {len(outside)}: give both"
        )
    if not bool(scores.isfinite().all()):
        raise ValueError("scores must be finite, got NaN or infinity: leave those candidates out")
    return inside, outside


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"a level lies inside (0, 1), got {level}: use e.g. 0.95")


def _clopper_pearson(successes: int, trials: int, missing: float) -> tuple[float, float]:
    """Exact two-sided binomial interval that misses the truth with probability `missing` at most."""
    return _at_least(successes, trials, missing / 2), _at_most(successes, trials, missing / 2)


def _at_least(successes: int, trials: int, missing: float) -> float:
    return float(beta.ppf(missing, successes, trials - successes + 1)) if successes else 0.0


def _at_most(successes: int, trials: int, missing: float) -> float:
    return float(beta.isf(missing, successes + 1, trials - successes)) if successes < trials else 1.0


def _tpr_interval(fpr: float, inside: Tensor, falling: Tensor, tail: float) -> tuple[float, float]:
    """Ends of the true-positive rate at `fpr`, given non-members' scores from the largest down."""
    m, n = len(inside), len(falling)
    k = torch.arange(1, n + 1).numpy()
    kept = k[beta.isf(tail, k, n - k + 1) <= fpr]  # the k-th largest surely has no higher rate
    exceeded = k[beta.ppf(tail, k, n - k + 1) >= fpr]
    low, high = 0.0, 1.0
    if len(kept):
        low = _at_least(int((inside > falling[int(kept.max()) - 1]).sum()), m, tail)
    if len(exceeded):
        high = _at_most(int((inside >= falling[int(exceeded.min()) - 1]).sum()), m, tail)
    return low, high


def _complete(clusters: Tensor, members: Tensor) -> int:
    """How many clusters have a member and a non-member."""
    return len(set(clusters[members].tolist()) & set(clusters[~members].tolist()))


def _multiplicities(clusters: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Position of each score's cluster (n,), and how often each bootstrap sample draws it (resamples, K)."""
    names, position = torch.unique(clusters, return_inverse=True)
    K = len(names)
    drawn = torch.randint(K, (_RESAMPLES, K), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(_RESAMPLES, K, dtype=torch.float64)
    return position, counts.scatter_add_(1, drawn, torch.ones_like(counts))


def _auc_bootstrap(
    scores: Tensor, members: Tensor, clusters: Tensor, level: float, seed: int
) -> tuple[float, float]:
    position, counts = _multiplicities(clusters, seed)
    K = counts.shape[1]
    wins = torch.zeros(K, K, dtype=torch.float64)  # of members of one cluster over non-members of another
    outside, owner = scores[~members].double(), position[~members]
    order = [outside[owner == cluster].sort().values for cluster in range(K)]
    for cluster in range(K):
        mine = scores[members & (position == cluster)].double()
        for other, sorted_scores in enumerate(order):
            beaten = torch.searchsorted(sorted_scores, mine) + torch.searchsorted(
                sorted_scores, mine, right=True
            )
            wins[cluster, other] = beaten.double().sum() / 2
    sizes = [torch.bincount(position[side], minlength=K).double() for side in (members, ~members)]
    values = ((counts @ wins) * counts).sum(1) / ((counts @ sizes[0]) * (counts @ sizes[1]))
    return _ends(values, K, level)


def _tpr_bootstrap(
    fpr: float, scores: Tensor, members: Tensor, clusters: Tensor, level: float, seed: int
) -> tuple[float, float]:
    position, counts = _multiplicities(clusters, seed)
    K = counts.shape[1]
    falling, order = scores[~members].double().sort(descending=True)
    owner = position[~members][order]
    inside, holder = scores[members].double(), position[members]
    values = []
    for weights in counts:
        reached = weights[owner].cumsum(0)
        # the first non-member that would be one false positive too many; NaN if a sample has none
        stop = int(torch.searchsorted(reached, torch.floor(fpr * reached[-1] + 1e-9), right=True))
        above = inside > falling[stop] if stop < len(falling) else torch.ones_like(inside, dtype=torch.bool)
        mass = weights[holder]
        values.append((mass * above).sum() / mass.sum())
    return _ends(torch.stack(values), K, level)


def _ends(values: Tensor, K: int, level: float) -> tuple[float, float]:
    """Percentiles of the finite values; NaN with fewer than three clusters."""
    known = values[values.isfinite()]
    if K < 3 or len(known) < _RESAMPLES / 2:
        return math.nan, math.nan
    low, high = known.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=known.dtype)).tolist()
    return low, high


def split_in_half(count: int, generator: torch.Generator) -> Tensor:
    """Which of `count` non-members play the members in a control, at random: booleans with half true.

    >>> int(split_in_half(5, torch.Generator().manual_seed(0)).sum())
    2
    """
    halves: Sequence[int] = torch.randperm(count, generator=generator).tolist()
    return torch.tensor([place < count // 2 for place in halves])
