"""How well held-out batches would score if what is seen of an example said nothing about its gradient.

Held-out batches are drawn from a few dozen examples and share them. A chance relation between features and
gradients of those few examples therefore shows in every batch at once: the K pairs (batch, observation)
are far from K independent pairs, and shuffling them gives a null much narrower than the chance it has to
stand for (about twice the nominal false alarms were seen). What is exchangeable is the examples.
"""

import torch
from torch import Tensor

from fedaudit.measures.batch_critic import BatchCritic, Pool, score_batches
from fedaudit.measures.mi_bounds import infonce

_BLOCK = 50  # permutations scored at once


def example_permutation_null(
    critic: BatchCritic,
    pool: Pool,
    members: Tensor,
    temperature: float,
    permutations: int,
    generator: torch.Generator,
) -> Tensor:
    """InfoNCE of the same batches after their examples' gradients were dealt out anew, (permutations,) nats.

    Each time a permutation of the pool's examples gives example i the gradient coordinates of another,
    the batches (the same memberships) are summed from these and observed with fresh noise, and the critic
    scores them against the batches' unchanged features.

    If coordinates are independent of features, example by example, the value that was observed and these
    are exchangeable, whatever the batches share and whatever the critic: it must only not have been
    fitted to this pool. The same holds if the noise hides the coordinates altogether; then nothing but
    the fresh noise differs. A critic that is told the coordinates themselves leaves only this second way
    for the null to be true.

    Args:
        critic: a critic fitted to other examples.
        pool: the held-out examples.
        members: the batches that were scored (K, n).
        temperature: factor on the scores.
        permutations: how many to draw.
        generator: source of permutations and noise, on the CPU.

    Raises:
        ValueError: if fewer than one permutation is asked for.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}: use e.g. 199")
    values = []
    for start in range(0, permutations, _BLOCK):
        orders = torch.rand(min(_BLOCK, permutations - start), len(pool.coordinates), generator=generator)
        dealt = pool.coordinates[orders.argsort(-1).to(pool.coordinates.device)]
        observed = pool.noisy(members @ dealt, generator)
        values.append(infonce(temperature * score_batches(critic, pool, members, observed)))
    return torch.cat(values)


def exceedance(observed: float, null: Tensor) -> float:
    """(1 + #{null >= observed}) / (1 + #null): a p-value if all are exchangeable under the null.

    Never 0, and at most `level` with probability at most `level`. Values that differ by rounding alone
    count as ties.

    >>> exceedance(2.0, torch.tensor([0.0, 1.0, 3.0]))
    0.5
    """
    tolerance = 1e-9 * max(1.0, abs(observed))
    return (1 + int((null >= observed - tolerance).sum())) / (1 + len(null))
