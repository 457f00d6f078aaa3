"""Correlated Gaussian vectors and the closed forms they have."""

import math

import torch
from torch import Tensor


def correlation(information: float, D: int) -> float:
    """rho per coordinate such that I = -D/2 ln(1 - rho^2) nats."""
    return math.sqrt(1 - math.exp(-2 * information / D))


def pairs(information: float, D: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x and y (n, D) in float64, unit variances, correlation rho per coordinate."""
    rho = correlation(information, D)
    x, other = torch.randn(2, n, D, generator=generator, dtype=torch.float64)
    return x, rho * x + math.sqrt(1 - rho**2) * other


def log_ratio(x: Tensor, y: Tensor, information: float) -> Tensor:
    """ln p(y|x)/p(y) of vectors that broadcast, summed over the last dimension."""
    rho = correlation(information, x.shape[-1])
    square = (y - rho * x).square() / (1 - rho**2) - y.square()
    return (-0.5 * square - 0.5 * math.log(1 - rho**2)).sum(-1)


def optimal_scores(information: float, D: int, K: int, generator: torch.Generator) -> Tensor:
    """The log density ratio of K draws against each other (K, K): row i = y_i, column j = x_j."""
    x, y = pairs(information, D, K, generator)
    return log_ratio(x[None], y[:, None], information)


def spread_of_joint(information: float, D: int, K: int) -> float:
    """Standard deviation of the mean of K log ratios of true pairs: each has variance D rho^2."""
    return math.sqrt(D * correlation(information, D) ** 2 / K)


def spread_of_partition(information: float, K: int) -> float:
    """Largest standard deviation of the mean ratio over the K(K-1) mismatched pairs.

    A ratio has variance E_P[r] - 1 = e^{2I} - 1 here. Ratios that share one draw are uncorrelated, since
    E[r | x] = E[r | y] = 1; only (i, j) and (j, i) are not, at most doubling the variance of the mean.
    """
    return math.sqrt(2 * (math.exp(2 * information) - 1) / (K * (K - 1)))
