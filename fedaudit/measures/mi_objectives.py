"""What a critic is trained by where the value of a bound has a bad gradient.

InfoNCE and NWJ (`mi_bounds`) are their own objectives. `scores` is (K, K), diagonal = pairs that belong
together; every function returns something to MAXIMISE. None is to be reported as an estimate from the
batches it was maximised on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fedaudit.measures.mi_bounds import donsker_varadhan, joint_mean, log_partition, smile


def js_objective(scores: Tensor) -> Tensor:
    """E_P[-softplus(-f)] - E_Q[softplus(f)], the Jensen-Shannon f-GAN bound, (...); at most 0.

    Its maximum over all critics is 2 JSD(P, Q) - 2 ln 2, reached at f = ln dP/dQ: a stable way to learn the
    log density ratio, since no exponential of a score enters. It is not an estimate of I(X;Y).

    Source: Nowozin, Cseke, Tomioka 2016 (arXiv 1606.00709); Poole et al. 2019 (arXiv
    1905.06922).

    Args:
        scores: critic scores (..., K, K).

    Raises:
        ValueError: if the matrix is not square with K >= 2.
    """
    own = scores.diagonal(dim1=-2, dim2=-1)
    joint = -joint_mean(softplus(-scores))
    K = scores.shape[-1]
    mismatched = softplus(scores).sum((-2, -1)) - softplus(own).sum(-1)
    return joint - mismatched / (K * (K - 1))


def smile_objective(scores: Tensor, clip: float = 5.0) -> Tensor:
    """The value of `smile` with the gradient of `js_objective`: js + stopgrad(smile - js), (...).

    Source: Song and Ermon 2020 (arXiv 1910.06222).

    Args:
        scores: critic scores (..., K, K).
        clip: tau of `smile`, nats.

    Raises:
        ValueError: as `smile`.
    """
    js = js_objective(scores)
    return js + (smile(scores, clip) - js).detach()


@dataclass
class PartitionAverage:
    """Exponential moving average of E_Q[e^f] over training steps, in logarithms; one per critic.

    Attributes:
        momentum: weight of the past, in [0, 1); 0 gives the plain gradient of Donsker-Varadhan.
        log_value: logarithm of the average; None before the first step.
    """

    momentum: float = 0.9
    log_value: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}: use e.g. 0.9")

    def update(self, log_partition: Tensor) -> Tensor:
        """Take in this step's ln E_Q[e^f] and return the logarithm of the average."""
        now = log_partition.detach()
        if self.log_value is None or self.momentum == 0:
            self.log_value = now
        else:
            weight = now.new_tensor([self.momentum, 1 - self.momentum]).log()
            self.log_value = torch.stack([weight[0] + self.log_value, weight[1] + now]).logsumexp(0)
        return self.log_value


def mine_objective(scores: Tensor, average: PartitionAverage, drift: float = 0.0) -> Tensor:
    """The Donsker-Varadhan value with MINE's corrected gradient, a scalar; updates `average`.

    The gradient of ln E_Q[e^f] over a batch, E_Q[e^f grad f] / E_Q[e^f], is a ratio of two means of the
    same few pairs and biased. Here the denominator is the moving average over steps:

        G = E_P[grad f] - E_Q[e^f grad f] / EMA(E_Q[e^f])

    That lowers the bias, by as much as the critic moves slowly; it does nothing about the variance of the
    value, nor about the constant of f, which is free to drift. And it is unstable where ratios are
    heavy-tailed (an information of about ln K nats and more): after one batch with a huge E_Q[e^f] the
    average stays high, nothing holds the scores down meanwhile, and they run away. `drift` > 0 subtracts
    drift (ln E_Q[e^f])^2, which holds the level near the ratio's own and stops both.

    Sources: Belghazi et al. 2018 (arXiv 1801.04062), section 3.2; the penalty: Choi and Lee 2020,
    Regularized Mutual Information Neural Estimation (arXiv 2011.07932).

    Args:
        scores: critic scores (K, K).
        average: state of this critic's training; changed in place.
        drift: weight of the penalty; 0 is MINE as published.

    Raises:
        ValueError: if there is not one square matrix with K >= 2.
    """
    if scores.ndim != 2:
        raise ValueError(
            f"one step's scores are one (K, K) matrix, got shape {tuple(scores.shape)}: pass one at a time"
        )
    partition = log_partition(scores)
    surrogate = joint_mean(scores) - (partition - average.update(partition)).exp()
    objective = surrogate + (donsker_varadhan(scores) - surrogate).detach()
    return objective - drift * partition.square() if drift else objective
