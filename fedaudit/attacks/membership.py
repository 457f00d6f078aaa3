"""Was this example in the update? Scores of candidates against an observed update, and how well they tell."""

import torch
from torch import Tensor


def matched_filter(gradients: Tensor, observed: Tensor) -> Tensor:
    """How far each observed sum of gradients points along each candidate's gradient: <g_i, y_r> / |g_i|.

    The most powerful statistic for a KNOWN candidate in Gaussian noise where the rest of the sum is noise to
    the observer. It presumes gradients at the weights the update started from. Not a probability.

    Source: Neyman and Pearson 1933; for federated updates Li et al. 2023 (cosine scores).

    Args:
        gradients: candidates' gradients (n, P).
        observed: sums of gradients, i.e. updates with their sign turned (R, P).

    Returns:
        Scores (R, n) in the unit of `observed`; 0 for a candidate whose gradient is zero.

    >>> matched_filter(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 1.0], [-1.0, 0.0]])).tolist()
    [[3.0], [-1.0]]
    """
    norms = gradients.norm(dim=1)
    return observed @ gradients.T / torch.where(norms > 0, norms, torch.inf)


def membership_advantage(scores: Tensor, inside: Tensor) -> Tensor:
    """2 AUC - 1 of each candidate's score over repetitions in which it was in or out, (n,), without unit.

    AUC is the chance that the score of a random repetition WITH the candidate is above that of one without,
    ties counting half (Mann-Whitney). 1 is certain, 0 is guessing, negative is worse than guessing. It is an
    average over thresholds: a small value does not exclude confident guesses about few repetitions.

    Args:
        scores: (R, n).
        inside: whether the candidate was in (R, n), boolean.

    Raises:
        ValueError: if a candidate was in, or out, of every repetition.

    >>> scores = torch.tensor([[1.0], [2.0], [3.0]])
    >>> membership_advantage(scores, torch.tensor([[False], [False], [True]])).tolist()
    [1.0]
    """
    if scores.shape != inside.shape or not bool((inside.any(0) & (~inside).any(0)).all()):
        raise ValueError(
            f"every candidate must be in some repetitions and out of others, got {tuple(scores.shape)} and "
            f"{tuple(inside.shape)}, in {inside.sum(0).tolist()} of {len(inside)}: draw more repetitions"
        )
    found = []
    for column, member in zip(scores.T.double(), inside.T, strict=True):
        differences = column[member][:, None] - column[~member][None]
        found.append(differences.sign().mean())
    return torch.stack(found)
