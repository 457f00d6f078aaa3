"""Was this example in the update? Scores of candidates against observed updates, and what a member gains.

Every score is larger for what looks more like a member. Those made of gradients need no gradient in memory:
inner products <g_i, y_r> of candidates' gradients with observed sums, and norms, are enough.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedaudit.attacks.roc import placements

VARIANCE_FLOOR = 1e-8
"""Added to the variance over other clients, as in the reference implementation of FedMIA."""


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
    return length_along(observed @ gradients.T, gradients.norm(dim=1))


def length_along(products: Tensor, norms: Tensor) -> Tensor:
    """The matched filter of inner products: <g_i, y_r> / |g_i|, see `matched_filter`.

    Args:
        products: <g_i, y_r> (R, n).
        norms: |g_i| (n,).

    Returns:
        Scores (R, n); 0 for a candidate whose gradient is zero.
    """
    return products / torch.where(norms > 0, norms, torch.inf)


def cosine(products: Tensor, norms: Tensor, observed_norms: Tensor) -> Tensor:
    """Cosine of each candidate's gradient to each observed sum: <g_i, y_r> / (|g_i| |y_r|).

    Near weights that generalise, gradients of an overparameterised model behave like independent directions:
    about 0 with a spread of 1 / sqrt(P) for a non-member. Early in training all gradients share a direction,
    and the cosine tells more about the class than about membership. It does not depend on the learning rate.

    Source: Li, Li and Ribeiro, ICLR 2023, "Effective passive membership inference attacks in federated
    learning against overparameterized models".

    Args:
        products: <g_i, y_r> (R, n).
        norms: |g_i| (n,).
        observed_norms: |y_r| (R,).

    Returns:
        Scores (R, n) in [-1, 1]; 0 where a gradient or a sum is zero.

    >>> cosine(torch.tensor([[6.0, 0.0]]), torch.tensor([2.0, 0.0]), torch.tensor([6.0])).tolist()
    [[0.5, 0.0]]
    """
    return length_along(length_along(products, norms).T, observed_norms).T


def gradient_difference(products: Tensor, norms: Tensor) -> Tensor:
    """How much shorter a sum becomes without the candidate: |y|^2 - |y - g|^2 = 2 <g_i, y_r> - |g_i|^2.

    Up to a factor the log-likelihood ratio of "y has g in it once" in isotropic Gaussian noise, so y must be
    in the unit of ONE example's gradient: a mean over B examples times a learning rate makes <g, y> vanish
    beside |g|^2, and what is left is the gradient norm. Not a probability.

    Source: Li, Li and Ribeiro, ICLR 2023.

    Args:
        products: <g_i, y_r> (R, n).
        norms: |g_i| (n,).

    Returns:
        Scores (R, n), in the unit of a squared gradient.

    >>> gradient_difference(torch.tensor([[4.0, 0.0]]), torch.tensor([2.0, 2.0])).tolist()
    [[4.0, -4.0]]
    """
    return 2 * products - norms.square()


def against_others(scores: Tensor) -> Tensor:
    """How far a candidate's score stands above what it gets from the round's OTHER updates, in [0, 1].

    Phi((s_ri - m_ri) / sd_ri) with m and sd^2 (unbiased, plus 1e-8) of s_qi over q != r: clients hold
    different examples, so the others show how the candidate scores where it is out. Close to 1 for a member;
    roughly uniform for others if clients are alike and many. It is no p-value: with few others the standard
    deviation is itself a guess, and values above 8 standard deviations are all 1.

    Source: FedMIA, Zhu et al., CVPR 2025, arXiv 2402.06289 (of the loss FedMIA-I, of the cosine FedMIA-II).

    Args:
        scores: one kind of score of each candidate against each update (R, n), R at least 3.

    Returns:
        (R, n), float64.

    Raises:
        ValueError: if there are fewer than two other updates.

    >>> against_others(torch.tensor([[5.0], [1.0], [3.0]]))[0]
    tensor([0.9831], dtype=torch.float64)
    """
    R = len(scores)
    if R < 3:
        raise ValueError(
            f"a score against the others needs at least two other updates, got {max(R - 1, 0)}: use a round "
            "of three clients or more, or a score of one update alone"
        )
    s = scores.double()
    centred = s - s.mean(0)  # keeps the sums below from cancelling
    others = (centred.sum(0) - centred) / (R - 1)
    squares = (centred.square().sum(0) - centred.square() - (R - 1) * others.square()).clamp_min(0)
    found: Tensor = torch.special.ndtr((centred - others) / (squares / (R - 2) + VARIANCE_FLOOR).sqrt())
    return found


def average_over_rounds(scores: Sequence[Tensor]) -> Tensor:
    """The mean score over rounds, for candidates and updates in the same order in each: (R, n).

    For `against_others` this is FedMIA's "all for one". For other scores it presumes rounds on one scale.

    Raises:
        ValueError: if there is no round, or shapes differ.

    >>> average_over_rounds([torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]])]).tolist()
    [[0.5, 1.0]]
    """
    shapes = {tuple(round_scores.shape) for round_scores in scores}
    if len(shapes) != 1:
        raise ValueError(
            f"rounds are averaged for the same updates and candidates, got shapes {sorted(shapes)}: "
            "keep the clients that took part in every round"
        )
    return torch.stack([round_scores.double() for round_scores in scores]).mean(0)


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
    for column, member in zip(scores.T.double().cpu(), inside.T.cpu(), strict=True):
        above, _ = placements(column[member], column[~member])
        found.append(2 * above.mean() - 1)
    return torch.stack(found)
