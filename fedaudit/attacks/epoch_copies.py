"""Images and labels of several local epochs whose order an attacker does not know."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fedaudit.attacks.scores import match


def dealt(labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sorted labels dealt to the batches in turn, so that every batch gets a mixture.

    >>> dealt(torch.tensor([0, 0, 1, 1]), [2, 2]).tolist()
    [0, 1, 0, 1]
    """
    hands: list[list[int]] = [[] for _ in sizes]
    cards = iter(range(len(labels)))
    while any(len(hand) < size for hand, size in zip(hands, sizes, strict=True)):
        for hand, size in zip(hands, sizes, strict=True):
            if len(hand) < size:
                hand.append(next(cards))
    order = torch.tensor(list(itertools.chain.from_iterable(hands)), device=labels.device)
    return labels[order]


def averaged(epochs: list[Tensor]) -> Tensor:
    """The first epoch's images, each averaged with its partners in the other epochs (least total MSE)."""
    total, count = epochs[0].clone(), torch.ones(len(epochs[0]))
    for other in epochs[1:]:
        i, j, _ = match(other, epochs[0])
        total[j] += other[i]
        count[j] += 1
    return total / count.view(-1, *[1] * (total.dim() - 1))
