"""Where the examples of a batch are in the tensors of a forward pass, found by changing one example.

The model runs twice on two examples, with the same random numbers; in the second run another example takes
the second one's place. What changes belongs to the second example. So the batch dimension, the order in which
a dimension joins examples with tokens, and whether examples are independent at all are observed, not guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-4  # of the largest entry: rounding is far below, and an example that matters is far above


@dataclass(frozen=True)
class Layout:
    """One dimension of a tensor joins B examples with `places` places of each.

    Attributes:
        dim: the dimension.
        places: F, how many entries of it belong to one example.
        examples_first: whether an example's entries lie together, (B, F); else (F, B).
    """

    dim: int
    places: int
    examples_first: bool

    def by_example(self, t: Tensor) -> Tensor:
        """(..., B * F, ...) to (B, ..., F, ...)."""
        split = (-1, self.places) if self.examples_first else (self.places, -1)
        t = t.reshape(*t.shape[: self.dim], *split, *t.shape[self.dim + 1 :])
        return t.movedim(self.dim if self.examples_first else self.dim + 1, 0)


def most_different(tensors: Sequence[Tensor]) -> int:
    """The example that differs from the first in most entries of tensors (B, ...).

    Raises:
        ValueError: if all examples are equal.

    >>> most_different([torch.tensor([[1, 2], [1, 2], [1, 4], [3, 4]])])
    3
    """
    counts = torch.stack([(t != t[:1]).sum(1).cpu() for t in map(_matrix, tensors)]).sum(0)
    if not bool(counts.any()):
        raise ValueError(
            "which entries belong to which example is seen where inputs differ, got a batch of equal inputs: "
            "measure with example_gram"
        )
    return int(counts.argmax())


def find_layouts(first: Tensor, second: Tensor, at_most: int) -> list[Layout]:
    """The layouts along the first `at_most` dimensions that explain what changed; none if nothing did.

    Args:
        first: a tensor of the run on two examples.
        second: the same tensor of the run in which the second example is another one.
        at_most: how many leading dimensions may join examples.

    >>> a, b = torch.zeros(3, 2, 4), torch.zeros(3, 2, 4)
    >>> b[:, 1] = 1.0
    >>> find_layouts(a, b, at_most=2)
    [Layout(dim=1, places=1, examples_first=True)]
    """
    if first.shape != second.shape or not bool((changed := _changed(first, second)).any()):
        return []
    found = []
    for dim in range(min(at_most, first.ndim)):
        places, odd = divmod(first.shape[dim], 2)
        if odd or places == 0:
            continue
        for examples_first in (True, False) if places > 1 else (True,):
            layout = Layout(dim, places, examples_first)
            if not bool(layout.by_example(changed)[0].any()):
                found.append(layout)
    return found


def is_coupled(first: Tensor, second: Tensor) -> bool:
    """Whether something changed that belongs to no single example."""
    if first.shape != second.shape:
        return True
    return bool(_changed(first, second).any()) and not find_layouts(first, second, first.ndim)


def _matrix(t: Tensor) -> Tensor:
    return t.detach().reshape(len(t), -1)


def _changed(first: Tensor, second: Tensor) -> Tensor:
    if not first.is_floating_point():
        return first != second
    first, second = first.detach(), second.detach()
    return ~((first - second).abs() <= TOLERANCE * first.abs().max())
