"""Sparsification: of a client's update only some coordinates leave, the largest or random ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from fedaudit.claims import Claim, Sparsity
from fedaudit.defenses.plain_steps import PlainSteps


def kept_of(size: int, fraction: float) -> int:
    """How many of so many coordinates a fraction keeps, rounded up: at least one.

    >>> kept_of(10, 0.25), kept_of(1, 0.01), kept_of(10, 0.3)
    (3, 1, 3)
    """
    return min(size, max(1, math.ceil(fraction * size * (1 - 1e-12))))  # 0.3 * 10 is a little above 3


def largest(values: Tensor, count: int) -> Tensor:
    """Where the `count` largest magnitudes of a vector (P,) are: a mask (P,) with exactly that many."""
    chosen = torch.zeros(values.shape, dtype=torch.bool)
    return chosen.index_fill_(0, values.abs().topk(count, sorted=False).indices, True)


def at_random(size: int, count: int, generator: Generator) -> Tensor:
    """A mask (P,) with exactly `count` ones, every set of places being equally likely."""
    chosen = torch.zeros(size, dtype=torch.bool)
    return chosen.index_fill_(0, torch.randperm(size, generator=generator)[:count], True)


@dataclass(frozen=True)
class TopK(PlainSteps):
    """Sends the coordinates of largest magnitude and zeros for all others.

    Over "all" coordinates of an update together, or over each tensor by itself ("layer"), which is what
    gradient pruning does against gradient inversion (Zhu, Liu, Han 2019, arXiv 1906.08935, section 5.3; and
    as compression, Aji and Heafield 2017, arXiv 1704.05021).

    No formal guarantee. Which coordinates are sent depends on the data and is itself seen. Biased: what is
    left out is not sent later (no error feedback), so that small fractions slow training down. Measures that
    reason from a step's release do not see it.

    Attributes:
        fraction: share of coordinates that are sent, in (0, 1]; the count is rounded up.
        over: what the share is taken of.

    Raises:
        ValueError: for a fraction outside (0, 1] or an unknown `over`.

    >>> TopK(0.5).protect({"w": torch.tensor([3.0, -4.0, 1.0, 0.5])}, Generator())
    {'w': tensor([ 3., -4.,  0.,  0.])}
    """

    fraction: float = 0.1
    over: Literal["all", "layer"] = "all"

    name: ClassVar[str] = "top-k"

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)
        if self.over not in ("all", "layer"):
            raise ValueError(f"over must be all or layer, got {self.over!r}: choose one")

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The update with all but its largest coordinates set to zero."""
        if self.over == "layer":
            masks: Sequence[Tensor] = [
                largest(change.reshape(-1), kept_of(change.numel(), self.fraction))
                for change in delta.values()
            ]
        else:
            flat = _flat(delta)
            masks = _split(largest(flat, kept_of(len(flat), self.fraction)), delta)
        return _masked(delta, masks)

    def claims(self, update: object, settings: object) -> Sequence[Claim]:
        """At most that share of the coordinates is not zero."""
        return [Sparsity(self.fraction)]


@dataclass(frozen=True)
class RandomSparsify(PlainSteps):
    """Sends a random set of coordinates, a new one for every update, and zeros for all others.

    Exactly ceil(fraction P) of the update's P coordinates are sent, each with the same probability p, and
    divided by p if `unbiased`, so that the expectation is the update itself (Konečný et al. 2016, arXiv
    1610.05492, random masks; Wangni et al. 2018, arXiv 1710.09854). Its squared norm is 1 / p times larger
    on average then.

    No formal guarantee: what is sent is sent as it is, and over several rounds every coordinate is. Measures
    that reason from a step's release do not see it.

    Attributes:
        fraction: share of coordinates that are sent, in (0, 1]; the count is rounded up.
        unbiased: whether what is sent is divided by its probability.

    Raises:
        ValueError: for a fraction outside (0, 1].
    """

    fraction: float = 0.1
    unbiased: bool = True

    name: ClassVar[str] = "random-sparsify"

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The update with all but the drawn coordinates set to zero."""
        size = sum(change.numel() for change in delta.values())
        count = kept_of(size, self.fraction)
        sent = _masked(delta, _split(at_random(size, count, generator), delta))
        return {name: change * (size / count) for name, change in sent.items()} if self.unbiased else sent

    def claims(self, update: object, settings: object) -> Sequence[Claim]:
        """At most that share of the coordinates is not zero."""
        return [Sparsity(self.fraction)]


def _flat(delta: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([change.detach().reshape(-1) for change in delta.values()])


def _split(mask: Tensor, delta: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return torch.split(mask, [change.numel() for change in delta.values()])


def _masked(delta: Mapping[str, Tensor], masks: Sequence[Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.where(mask.reshape(change.shape), change, 0.0)
        for (name, change), mask in zip(delta.items(), masks, strict=True)
    }


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}: choose e.g. 0.1")
