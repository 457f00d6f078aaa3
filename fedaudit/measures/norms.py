"""How long each update is, and how far it points along the cohort's mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedaudit.measures.cohort import cohort_gram, shared_gram, shared_shapes
from fedaudit.measures.layers import layers_of
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Estimate, Observer, RoundContext

_ROUNDING = 1e-14


def update_norms(deltas: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Euclidean norms of N updates (N,), accumulated in float64.

    Args:
        deltas: N updates by parameter name.

    Returns:
        Norms (N,), float64, in the parameters' unit.

    Raises:
        ValueError: if there is no update, names or shapes differ, or an update is not finite.

    >>> update_norms([{"w": torch.tensor([3.0]), "b": torch.tensor([4.0])}]).tolist()
    [5.0]
    """
    return _finite(_squared_norms(deltas).sum(1)).sqrt()


def _squared_norms(deltas: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Squared norm of every tensor of every update (N, tensors)."""
    names = list(shared_shapes(deltas))
    parts = [
        torch.linalg.vector_norm(delta[n].detach(), dtype=torch.float64) for delta in deltas for n in names
    ]
    return torch.stack(parts).reshape(len(deltas), -1).square()


def update_cosines(deltas: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Cosines (N,) between N updates u_i and their unweighted mean m: <u_i, m> / (|u_i| |m|), in float64.

    m includes u_i itself, so a cosine is about 1 / sqrt(N) and not 0 where all updates are orthogonal and of
    equal length. Where u_i or m is zero there is no direction and the cosine is defined as 0.

    Args:
        deltas: N updates by parameter name.

    Returns:
        Cosines (N,), float64, in [-1, 1] up to rounding.

    Raises:
        ValueError: if there is no update, names or shapes differ, or an update is not finite.

    >>> update_cosines([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 0.0])}]).tolist()
    [1.0, 0.0]
    """
    return _cosines(cohort_gram(deltas))[0]


def _cosines(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines (N,), squared norms of the updates (N,) and of their mean (), from inner products (N, N)."""
    squared, dots, mean_squared = _finite(gram.diagonal()), gram.mean(1), gram.mean()
    # where updates cancel, what is left of their mean is the rounding of N^2 inner products
    mean_squared = torch.where(mean_squared > _ROUNDING * squared.mean(), mean_squared, 0.0)
    scale = (squared * mean_squared).sqrt()
    return torch.where(scale > 0, dots / scale, 0.0), squared, mean_squared


def _finite(squared: Tensor) -> Tensor:
    if not bool(squared.isfinite().all()):
        bad = (~squared.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"updates must be finite, got NaN or infinity in updates {bad}: leave these out")
    return squared


@dataclass
class UpdateNorm:
    """Euclidean norm of every client's update, whole and layer by layer (server; exact).

    The norm is no leakage by itself: it grows with the learning rate and with the number of local steps, and
    noise that protects a client makes it larger.
    """

    name: str = field(default="update-norm", init=False, repr=False)
    unit: str = field(default="1", init=False, repr=False)
    scope: Literal["client", "round"] = field(default="client", init=False, repr=False)
    observers: tuple[Observer, ...] = field(default=("server",), init=False, repr=False)

    def needs(self, observer: Observer) -> Needs:
        """Nothing beyond the updates."""
        return Needs.NOTHING

    def __call__(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Estimate]:
        """One norm per update, in order."""
        if not updates:
            return []
        squared = _squared_norms([update.delta for update in updates])
        norms = _finite(squared.sum(1)).sqrt()
        columns = {name: column for column, name in enumerate(updates[0].delta)}
        layers = {
            layer: squared[:, [columns[name] for name in names]].sum(1).sqrt().tolist()
            for layer, names in layers_of(columns).items()
        }
        return [
            Estimate(norm, self.unit, "exact", layers={layer: each[i] for layer, each in layers.items()})
            for i, norm in enumerate(norms.tolist())
        ]


@dataclass
class UpdateCosine:
    """Cosine of every client's update to the unweighted mean of the round's updates (server; exact).

    A client far from the others stands out, which is a sign and not a measure of leakage: independent noise
    on every update pulls all cosines towards 1 / sqrt(N). A zero update, or updates that cancel to a zero
    mean, have no direction: the value is 0 and `extra["reason"]` says so.
    """

    name: str = field(default="update-cosine", init=False, repr=False)
    unit: str = field(default="1", init=False, repr=False)
    scope: Literal["client", "round"] = field(default="client", init=False, repr=False)
    observers: tuple[Observer, ...] = field(default=("server",), init=False, repr=False)

    def needs(self, observer: Observer) -> Needs:
        """At least two updates of the round."""
        return Needs.COHORT

    def __call__(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Estimate]:
        """One cosine per update, in order."""
        if not updates:
            return []
        cosines, squared, mean_squared = _cosines(shared_gram(updates, ctx))
        if float(mean_squared) == 0:
            reasons = ["the mean of the cohort is zero"] * len(updates)
        else:
            reasons = ["the update is zero" if norm == 0 else "" for norm in squared.tolist()]
        return [
            Estimate(cosine, self.unit, "exact", extra={"reason": reason} if reason else {})
            for cosine, reason in zip(cosines.tolist(), reasons, strict=True)
        ]
