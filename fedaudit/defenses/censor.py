"""Datapoint censorship: a client leaves out its most unique examples and trains on the others."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Generator, Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from fedaudit.defenses.plain_steps import PlainSteps
from fedaudit.types import StepRelease


@dataclass(frozen=True)
class Censor(PlainSteps):
    """Each client audits its own examples' gradient uniqueness (GNQ) and removes the most unique.

    Abdelghafar, Aliakbarpour, Jermaine 2025, arXiv 2510.10902v1 ("datapoint censorship": audit, remove the
    top share, retrain). ceil(fraction n) of n examples go, in `onion` passes with an audit before each. By
    default the audit is made anew in every round, at the weights that were broadcast, among ALL of the
    client's examples: an example that was left out may come back. With `permanent` a client decides once:
    it rehearses, training from the run's initial weights on what is left, removes by the sum of GNQ over
    the audits before and after each rehearsed round, and keeps out what it removed for the whole run. With
    several passes the rehearsal is repeated on what is left. Differs from [2510.10902v1]: a client cannot
    retrain the federation, so that what is rehearsed is its own local training alone; and uniqueness takes a
    ridge, see `fedaudit.measures.gradient_uniqueness`.

    Removal peels an onion (Carlini et al. 2022, arXiv 2206.10469): what is left may be as exposed as what
    went. Every removal is therefore followed by a re-audit, and a client that measures itself (observer
    "client") reports `censored-examples`, `uniqueness-before` and `uniqueness-after`, mean and maximum over
    the examples that are left, at one ridge. At one ridge GNQ can only rise when others go.

    No formal guarantee: the selection itself depends on the data. One example more or less changes which
    others are kept, the examples left out still decide who stays, and a low membership advantage on average
    is no bound. It may fall on minorities first, whose examples are the unusual ones. What is public is the
    number of examples that are left: it follows from the number of a client's examples alone. The audit runs
    in evaluation mode (no dropout, batch normalisation by running statistics), costs O(n^2) inner products
    of gradients and O(n^3) algebra per client and audit, and holds an n x n matrix.

    Attributes:
        fraction: share of a client's examples to remove, in [0, 1), rounded up; one example always stays.
            0 removes nothing and audits nothing.
        onion: passes in which they are removed, an audit before each.
        permanent: decide once and for the whole run instead of in every round.
        rehearsal: rounds of local training of a rehearsal; with `permanent` only.
        ridge_share: ridge as a share of the mean squared norm of the gradients of all n examples.

    Raises:
        ValueError: for an option out of range.

    >>> Censor(0.1).removals(25), Censor(0.5, onion=3).removals(10), Censor(0.0).removals(10)
    ((3,), (1, 2, 2), ())
    """

    fraction: float = 0.1
    onion: int = 1
    permanent: bool = False
    rehearsal: int = 1
    ridge_share: float = 0.01

    name: ClassVar[str] = "censor"

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction must lie in [0, 1), got {self.fraction}: choose e.g. 0.1")
        for option in ("onion", "rehearsal"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be >= 1, got {getattr(self, option)}: choose e.g. 1")
        if not (self.ridge_share > 0 and math.isfinite(self.ridge_share)):
            raise ValueError(f"ridge-share must be a number > 0, got {self.ridge_share}: choose e.g. 0.01")
        if self.rehearsal > 1 and not self.permanent:
            raise ValueError(
                f"rehearsal belongs to permanent=true, got rehearsal={self.rehearsal} without: set permanent"
            )

    def removals(self, num_examples: int) -> tuple[int, ...]:
        """How many of a client's examples go in each pass; a function of their number alone."""
        wanted = math.ceil(self.fraction * num_examples * (1 - 1e-12))  # 0.3 * 10 is a little above 3
        total = max(0, min(wanted, num_examples - 1))
        passes = min(self.onion, total)
        gone = [total * step // passes for step in range(passes + 1)] if passes else [0]
        return tuple(after - before for before, after in pairwise(gone))

    def prepare(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        release: StepRelease,
        expected_batch_size: int,
        generator: Generator | None,
    ) -> tuple[nn.Module, Optimizer]:
        """Both unchanged.

        Raises:
            ValueError: if a rehearsal could not be repeated.
        """
        drops = [m for m in model.modules() if isinstance(m, _DropoutNd) and m.p > 0]
        if self.permanent and drops:
            raise ValueError(
                f"a rehearsal is repeated without knowing random masks, got {type(drops[0]).__name__} with "
                f"p={drops[0].p}: set permanent=false or p=0"
            )
        return model, optimizer

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The update itself: it was made without the examples that were removed."""
        return dict(delta)
