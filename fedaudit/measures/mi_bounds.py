"""Mutual-information values from a critic's scores alone, with their null and their interval.

What a critic is trained by is in `mi_objectives`; an upper bound that needs q(y|x) instead is in `club`.
Everywhere `scores` is (..., K, K): row i is an observation, column j a candidate cause of it, and the
diagonal holds the pairs that belong together. A score may be any number; what is estimated is how much
better the critic ranks the true pair than the mismatched ones.
"""

import math

import torch
from torch import Tensor


def infonce(scores: Tensor) -> Tensor:
    """InfoNCE in nats: ln K + mean_i (f_ii - ln sum_j e^{f_ij}), at most ln K.

    A lower bound on I(X;Y) in expectation over K independent pairs for every critic that was not fitted
    to them; a single value may exceed I(X;Y). It is not an estimate of an information above ln K: it
    saturates there. A term that depends on the row alone cancels. Low variance.

    Source: van den Oord, Li, Vinyals 2018 (arXiv 1807.03748).

    Args:
        scores: critic scores (..., K, K), diagonal = pairs that belong together.

    Returns:
        Nats, shape (...); minus infinity if a true pair scores minus infinity.

    Raises:
        ValueError: if the matrix is not square with K >= 2.

    >>> round(float(infonce(100 * torch.eye(8))), 3) == round(math.log(8), 3)
    True
    """
    K = _candidates(scores)
    return math.log(K) + pair_terms(scores).mean(-1)


def pair_terms(scores: Tensor) -> Tensor:
    """ln softmax_j(f_ij) at the true candidate, one per row: (..., K). InfoNCE is ln K plus their mean."""
    _candidates(scores)
    return scores.diagonal(dim1=-2, dim2=-1) - scores.logsumexp(-1)


def donsker_varadhan(scores: Tensor) -> Tensor:
    """The Donsker-Varadhan value in nats: E_P[f] - ln E_Q[e^f], Q = the K(K-1) off-diagonal pairs.

    With the expectations known it is a lower bound on I(X;Y), tight for f = ln p(y|x)/p(y) + constant.
    From finite K it is neither a bound nor stable: with the optimal critic the standard deviation of the
    partition term grows as sqrt((e^I - 1)/n), and no value above ln(number of pairs) can be trusted.

    Sources: Donsker and Varadhan 1983; Belghazi et al. 2018 (MINE, arXiv 1801.04062); McAllester and
    Stratos 2020 (arXiv 1811.04251); Song and Ermon 2020 (arXiv 1910.06222).

    Args:
        scores: critic scores (..., K, K), diagonal = pairs that belong together.

    Returns:
        Nats, shape (...).

    Raises:
        ValueError: if the matrix is not square with K >= 2.
    """
    return joint_mean(scores) - log_partition(scores)


def nwj(scores: Tensor) -> Tensor:
    """The Nguyen-Wainwright-Jordan value in nats: E_P[f] - e^{-1} E_Q[e^f], Q = the off-diagonal pairs.

    Unbiased for its own expectation, which is a lower bound on I(X;Y) for every critic that was not fitted
    to these pairs, tight for f = 1 + ln p(y|x)/p(y): the level of the scores matters. A single value is no
    bound: with that critic its partition term has standard deviation at least sqrt((e^I - 1)/n) for n
    independent mismatched pairs, exponential in the information, and most values lie above I while a few
    lie far below.

    Sources: Nguyen, Wainwright, Jordan 2010 (arXiv 0809.0853); Poole et al. 2019 (arXiv 1905.06922);
    variance: Song and Ermon 2020 (arXiv 1910.06222).

    Args:
        scores: critic scores (..., K, K), diagonal = pairs that belong together.

    Returns:
        Nats, shape (...).

    Raises:
        ValueError: if the matrix is not square with K >= 2.

    >>> float(nwj(torch.ones(4, 4)))  # an optimal critic of independent pairs
    0.0
    """
    return joint_mean(scores) - (log_partition(scores) - 1).exp()


def smile(scores: Tensor, clip: float = 5.0) -> Tensor:
    """The SMILE value in nats: E_P[f] - ln E_Q[e^{clip(f, -tau, tau)}], Q = the off-diagonal pairs.

    Donsker-Varadhan with the scores clipped inside the log-partition only. That bounds the variance of the
    partition by (e^tau - e^-tau)^2 / 4n for n independent pairs and pays with bias: it is neither a lower
    nor an upper bound, and overestimates where much of E_Q[e^f] comes from scores above tau. tau = infinity
    is Donsker-Varadhan. Critics are trained by `mi_objectives.smile_objective`, not by this value.

    Source: Song and Ermon 2020 (arXiv 1910.06222).

    Args:
        scores: critic scores (..., K, K), diagonal = pairs that belong together.
        clip: tau, positive; nats.

    Returns:
        Nats, shape (...).

    Raises:
        ValueError: if the matrix is not square with K >= 2, or clip is not positive.
    """
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}: use e.g. 5, or inf for Donsker-Varadhan")
    return joint_mean(scores) - log_partition(scores.clamp(-clip, clip))


def joint_mean(scores: Tensor) -> Tensor:
    """E_P[f]: the mean score of the pairs that belong together, (...)."""
    _candidates(scores)
    return scores.diagonal(dim1=-2, dim2=-1).mean(-1)


def log_partition(scores: Tensor) -> Tensor:
    """ln E_Q[e^f] over the K(K-1) mismatched pairs, (...)."""
    K = _candidates(scores)
    diagonal = torch.eye(K, dtype=torch.bool, device=scores.device)
    mismatched = scores.masked_fill(diagonal, -math.inf).flatten(-2)
    return mismatched.logsumexp(-1) - math.log(K * (K - 1))


def top1_accuracy(scores: Tensor) -> Tensor:
    """Fraction of observations whose true candidate has the strictly largest score, (...), chance 1/K."""
    K = _candidates(scores)
    diagonal = torch.eye(K, dtype=torch.bool, device=scores.device)
    best_other = scores.masked_fill(diagonal, -math.inf).amax(-1)
    return (scores.diagonal(dim1=-2, dim2=-1) > best_other).double().mean(-1)


def permutation_null(scores: Tensor, permutations: int, generator: torch.Generator) -> Tensor:
    """InfoNCE of the same scores with the pairing shuffled, (permutations,) nats.

    Row sums do not move when the pairing does, so a shuffled value costs K look-ups. Under independence
    of rows and columns the observed value is exchangeable with these. The shuffles may keep some pairs.

    Args:
        scores: critic scores (K, K).
        permutations: how many shuffles to draw.
        generator: source of the shuffles, on the CPU.

    Raises:
        ValueError: if the matrix is not square with K >= 2, or fewer than one shuffle is asked for.
    """
    K = _candidates(scores)
    if scores.ndim != 2:
        raise ValueError(
            f"shuffles need one (K, K) matrix, got shape {tuple(scores.shape)}: pass one at a time"
        )
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}: use e.g. 199")
    columns = torch.rand(permutations, K, generator=generator).argsort(-1).to(scores.device)
    rows = torch.arange(K, device=scores.device)
    return math.log(K) + scores[rows, columns].mean(-1) - scores.logsumexp(-1).mean()


def permutation_p_value(scores: Tensor, permutations: int, generator: torch.Generator) -> tuple[float, float]:
    """How often shuffled pairs score as high as the true ones, and the mean shuffled value in nats.

    p = (1 + #{null >= observed}) / (1 + permutations): never 0, at most `level` with probability at most
    `level` if X and Y are independent. A small p says that the critic finds SOME dependence in pairs it
    was not fitted to; a large one does not say that there is none. The pairs must be independent of each
    other: for batches that share examples use `batch_null.example_permutation_null`.

    Args:
        scores: critic scores (K, K) of pairs the critic was not fitted to.
        permutations: how many shuffles to draw.
        generator: source of the shuffles, on the CPU.

    Returns:
        The p-value and the mean of the null.

    Raises:
        ValueError: as `permutation_null`.
    """
    null = permutation_null(scores, permutations, generator)
    # equal sums added in another order differ in the last digits: count them as ties
    tolerance = 1e-6 * float(scores.abs().max())
    reached = int((null >= float(infonce(scores)) - tolerance).sum())
    return (1 + reached) / (1 + permutations), float(null.mean())


def bootstrap_interval(
    scores: Tensor, generator: torch.Generator, level: float = 0.95, replicates: int = 1000
) -> tuple[float, float]:
    """Percentile bootstrap interval of InfoNCE over the observations, in nats.

    Rows are drawn with replacement and keep their K candidates: drawing columns too would put copies of
    the true candidate among the mismatched ones. It covers the chance of which observations were
    evaluated, not that of another critic, another split or other candidates.

    Args:
        scores: critic scores (K, K).
        generator: source of the draws, on the CPU.
        level: nominal coverage, inside (0, 1).
        replicates: number of draws.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: if the matrix is not square with K >= 2, or level or replicates are out of range.
    """
    K = _candidates(scores)
    if not 0 < level < 1 or replicates < 1:
        raise ValueError(
            f"level must lie inside (0, 1) and replicates be at least 1, got {level} and {replicates}: "
            "use e.g. 0.95 and 1000"
        )
    terms = pair_terms(scores).double().cpu()
    drawn = torch.randint(K, (replicates, K), generator=generator)
    values = math.log(K) + terms[drawn].mean(-1)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype)
    low, high = values.quantile(tails).tolist()
    return low, high


def gaussian_channel(rows: Tensor, batch: int, noise_std: float) -> float:
    """1/2 logdet(I + b Cov(rows) / s^2) in nats: the most a Gaussian channel of this signal power carries.

    For Y = sum of b independent rows + N(0, s^2 I) the Gaussian input maximises I(X;Y) at given
    covariance, so with the true covariance this is an upper bound on I(X;Y); with the sample covariance
    it is an estimate of that bound, and a low one if rows are few (the log-determinant is concave): 64 rows
    in 20 dimensions lose 2 to 6 %. Drawing rows without replacement only lowers the signal.

    Args:
        rows: signal per example (n, d), n >= 2.
        batch: rows per sum, b.
        noise_std: s > 0, standard deviation per coordinate of the sum.

    Raises:
        ValueError: if there are fewer than two rows, or no noise (then nothing bounds the information).

    >>> round(gaussian_channel(torch.tensor([[-1.0], [1.0]]), 1, 2**0.5), 4) == round(0.5 * math.log(2), 4)
    True
    """
    if len(rows) < 2 or not noise_std > 0:
        raise ValueError(
            f"a Gaussian channel needs at least two rows and noise_std > 0, got {len(rows)} and {noise_std}: "
            "without noise the information has no finite bound"
        )
    centred = rows.double() - rows.double().mean(0)
    ratio = centred.T @ centred / (len(rows) - 1) * (batch / noise_std**2)
    identity = torch.eye(len(ratio), dtype=ratio.dtype, device=ratio.device)
    return 0.5 * float(torch.linalg.slogdet(identity + ratio).logabsdet)


def _candidates(scores: Tensor) -> int:
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2] or scores.shape[-1] < 2:
        raise ValueError(
            f"scores must be (..., K, K) with K >= 2, got {tuple(scores.shape)}: "
            "score every observation against every candidate"
        )
    return scores.shape[-1]
