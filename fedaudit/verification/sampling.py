"""Are batches Poisson samples? Sizes and inclusion counts of true Poisson samples vary in a known way."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedaudit.verification.noise import Vector

TESTS = 3


def sampling_p_values(batches: Sequence[Tensor], num_examples: int, rate: float) -> dict[str, float]:
    """p-values of T batches against Poisson sampling at `rate`; each is valid or an upper bound.

    "total": all inclusions together are Binomial(n T, q), two-sided.
    "equal sizes": k of the T sizes are b with probability P(Binomial(T, P(size = b)) >= k); the smallest over
    b, times the number of values that b can take.
    "equal uses": the same for how often each of the n examples was used, Binomial(T, q). Shuffling uses all
    examples equally often and makes batches of one size.

    Args:
        batches: indices of the examples of each step, each (B,).
        num_examples: n.
        rate: q.

    Raises:
        ValueError: if there is no batch.

    >>> import torch
    >>> epoch = list(torch.randperm(160).split(16))
    >>> max(sampling_p_values(epoch, 160, 0.1)[name] for name in ("equal sizes", "equal uses")) < 1e-6
    True
    """
    from scipy.stats import binom

    if not batches:
        raise ValueError("sampling is judged by at least one batch, got none: record a step")
    steps = len(batches)
    sizes = np.array([len(batch) for batch in batches])
    uses = np.zeros(num_examples, dtype=np.int64)
    for batch in batches:
        np.add.at(uses, batch.numpy(), 1)
    total, n = int(sizes.sum()), num_examples * steps
    tails = float(binom.cdf(total, n, rate)), float(binom.sf(total - 1, n, rate))
    size_masses: Vector = binom.pmf(np.arange(num_examples + 1), num_examples, rate)
    use_masses: Vector = binom.pmf(np.arange(steps + 1), steps, rate)
    return {
        "total": min(1.0, 2 * min(tails)),
        "equal sizes": _equal(np.bincount(sizes), steps, size_masses),
        "equal uses": _equal(np.bincount(uses), num_examples, use_masses),
    }


def _equal(counts: NDArray[np.int64], draws: int, masses: Vector) -> float:
    """P(some value is drawn at least as often, for its own mass, as the most striking one), by a union."""
    from scipy.stats import binom

    size = min(len(counts), len(masses))
    tails = np.asarray(binom.sf(counts[:size] - 1, draws, masses[:size]))
    return min(1.0, len(masses) * float(tails.min(initial=1.0)))
