"""CLUB: an upper bound on mutual information from a conditional q(y|x) instead of a critic."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedaudit.measures.critics import perceptron


class GaussianConditional(nn.Module):
    """q(y|x) = N(mu(x), diag e^{v(x)}), two perceptrons.

    Args:
        x_dims: features of x.
        y_dims: D, features of y.
        hidden: width of the two hidden layers of each perceptron.
        bounded: pass v through tanh, which confines variances to [1/e, e]: right only for y of unit scale
            and little dependence. CLUB's published code does so; here it is off unless asked for.
        generator: source of the initial weights, on the CPU.
    """

    def __init__(
        self, x_dims: int, y_dims: int, hidden: int, generator: torch.Generator, bounded: bool = False
    ) -> None:
        super().__init__()
        self.mean = perceptron(x_dims, hidden, y_dims, 2, generator)
        self.log_variance = perceptron(x_dims, hidden, y_dims, 2, generator)
        self.bounded = bounded

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu (K, D) and v (K, D) of each row."""
        log_variance = self.log_variance(x)
        return self.mean(x), log_variance.tanh() if self.bounded else log_variance


def log_likelihood(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    """ln q(y|x) in nats, summed over the last dimension; arguments broadcast."""
    squares = (y - mean).square() * (-log_variance).exp()
    return -0.5 * (squares + log_variance + math.log(2 * math.pi)).sum(-1)


def club(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    """E_P[ln q(y|x)] - E_Q[ln q(y|x)] in nats over all K(K-1) mismatched pairs, a scalar.

    With q the true conditional it is unbiased for I(X;Y) + KL(p(x)p(y) || p(x,y)), an upper bound on
    I(X;Y), and not a tight one: for D pairs of unit Gaussians with correlation rho it is
    D rho^2 / (1 - rho^2), where I = -D/2 ln(1 - rho^2). With a fitted q it is an upper bound only while
    KL(p(x,y) || q(y|x)p(x)) is at most KL(p(x)p(y) || q(y|x)p(x)); a poor fit can take it below I(X;Y), or
    below zero on pairs q was not fitted to. On the pairs q WAS fitted to, overfitting raises it.

    Source: Cheng et al. 2020 (arXiv 2006.12013). Differs from it: the true pairs are not among the
    mismatched ones, where their presence lowers the value by the factor (K - 1)/K.

    Args:
        mean: mu of each x (K, D).
        log_variance: ln variance of each x (K, D).
        y: what belongs to each x (K, D).

    Raises:
        ValueError: if the shapes differ or K < 2.
    """
    K = _rows(mean, log_variance, y)
    pairs = log_likelihood(mean[:, None], log_variance[:, None], y[None])  # (K, K): x by row, y by column
    own = pairs.diagonal()
    return own.mean() - (pairs.sum() - own.sum()) / (K * (K - 1))


def club_sampled(mean: Tensor, log_variance: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """`club` with one mismatched y per x, uniform over the K - 1 others: same expectation, O(K), noisier.

    Source: Cheng et al. 2020 (arXiv 2006.12013).

    Args:
        mean: mu of each x (K, D).
        log_variance: ln variance of each x (K, D).
        y: what belongs to each x (K, D).
        generator: source of the choice, on the CPU.

    Raises:
        ValueError: if the shapes differ or K < 2.
    """
    K = _rows(mean, log_variance, y)
    other = (torch.arange(K) + torch.randint(1, K, (K,), generator=generator)) % K
    matched = log_likelihood(mean, log_variance, y)
    return (matched - log_likelihood(mean, log_variance, y[other.to(y.device)])).mean()


def fit_conditional(
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    batch: int,
    generator: torch.Generator,
    hidden: int = 256,
    lr: float = 1e-3,
    bounded: bool = False,
    watch: Callable[[int, float], None] = lambda step, value: None,
) -> GaussianConditional:
    """q(y|x) fitted to pairs by maximum likelihood: Adam on batches drawn with replacement.

    Evaluate `club` on OTHER pairs than these.

    Args:
        x: (n, x_dims).
        y: (n, D).
        steps: how many.
        batch: pairs per step.
        generator: source of weights and batches, on the CPU.
        hidden: width of the hidden layers.
        lr: peak learning rate, decayed to zero along a cosine.
        bounded: as `GaussianConditional`.
        watch: called with the step and its mean log-likelihood in nats.

    Raises:
        ValueError: if x and y do not hold the same number of rows, at least one.
    """
    if len(x) != len(y) or len(x) < 1:
        raise ValueError(f"x and y must hold as many rows each, at least one, got {len(x)} and {len(y)}")
    conditional = GaussianConditional(x.shape[1], y.shape[1], hidden, generator, bounded).to(x)
    optimiser = torch.optim.Adam(conditional.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (batch,), generator=generator).to(x.device)
        mean, log_variance = conditional(x[rows])
        likelihood = log_likelihood(mean, log_variance, y[rows]).mean()
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(-likelihood)
        optimiser.step()
        schedule.step()
        watch(step, float(likelihood.detach()))
    return conditional


def _rows(mean: Tensor, log_variance: Tensor, y: Tensor) -> int:
    if not mean.shape == log_variance.shape == y.shape or mean.ndim != 2 or len(mean) < 2:
        raise ValueError(
            "mean, log_variance and y must all be (K, D) with K >= 2, got "
            f"{tuple(mean.shape)}, {tuple(log_variance.shape)} and {tuple(y.shape)}"
        )
    return len(mean)
