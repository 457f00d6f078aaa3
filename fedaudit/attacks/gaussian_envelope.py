"""What Gaussian noise of known size leaves to a membership test, in closed form."""

import math
from collections.abc import Callable

import torch
from scipy.stats import binom, norm
from torch import Tensor


def gaussian_tpr(mu: Tensor, fpr: float, *, steps: int = 1, rate: float = 1.0) -> float:
    """TPR of the matched filter where all but Gaussian noise is known: the mean of Phi(mu - Phi^-1(1 - FPR)).

    Of a candidate with gradient g (clipped, if the release clips) in a sum with noise of standard deviation s
    = sigma C in every coordinate, mu = |g| / s: the trade-off of mu-GDP. After `steps` releases at about the
    same weights the observer has their sum, with the candidate in K ~ Binomial(steps, rate) of them: the mean
    over K of Phi(K mu / sqrt(steps) - Phi^-1(1 - FPR)). No test of the update does better, as far as weights
    stay the same within the round; for one step this is exact. Presence is "added or not", all others known:
    an observer who does not know them stays below. It covers what THIS update tells, not what earlier rounds
    left in the broadcast weights, and it is no differential-privacy guarantee.

    Source: Dong, Roth and Su 2019, arXiv 1905.02383 (mu-GDP).

    Args:
        mu: separation of each candidate in one step (n,).
        fpr: false-positive rate in (0, 1).
        steps: releases that were summed.
        rate: probability that the candidate is in one of them, independently.

    Raises:
        ValueError: if there is no candidate or an argument is out of range.

    >>> gaussian_tpr(torch.tensor([0.0, 0.0]), 0.01)
    0.01
    """
    if not 0 < fpr < 1:
        raise ValueError(f"a false-positive rate lies inside (0, 1), got {fpr}: use e.g. 0.01")
    bar = float(norm.isf(fpr))
    return _envelope(mu, steps, rate, lambda shift: torch.special.ndtr(shift - bar))


def gaussian_auc(mu: Tensor, *, steps: int = 1, rate: float = 1.0) -> float:
    """Area under the curve of `gaussian_tpr`: for one step the mean of Phi(mu / sqrt 2).

    >>> gaussian_auc(torch.tensor([1.0]))
    0.76025
    """
    return _envelope(mu, steps, rate, lambda shift: torch.special.ndtr(shift / math.sqrt(2)))


def _envelope(mu: Tensor, steps: int, rate: float, curve: Callable[[Tensor], Tensor]) -> float:
    if not len(mu) or steps < 1 or not 0 <= rate <= 1 or not bool((mu >= 0).all()):
        raise ValueError(
            f"an envelope needs separations >= 0, steps >= 1 and a rate in [0, 1], got {len(mu)} of them, "
            f"steps={steps}, rate={rate}: correct them"
        )
    uses = torch.arange(steps + 1).double()
    chances = torch.from_numpy(binom.pmf(uses.numpy(), steps, rate))
    shifts = mu.double()[:, None] * uses / math.sqrt(steps)
    return float((curve(shifts) * chances).sum(1).mean())
