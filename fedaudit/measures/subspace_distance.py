"""How far apart the gradients with and without a latent attribute lie: principal angles of their subspaces.

Two matrices have as rows gradients of batches with and without the attribute; their distance is the geodesic
one between the subspaces that their k leading right singular vectors span. Subspaces of few gradients differ
even where nothing distinguishes them, so a distance means something only beside the same distance between
random halves of examples that agree on the attribute.

In the spirit of Mo et al. 2021-2022, arXiv 2105.13929 ("subspace distance" for latent information), after its
description in words: the null that is subtracted, the sizes of the compared sets and the scaling of rows are
this module's own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedaudit.measures.attributes import check_attribute, follows_label, latent_attribute
from fedaudit.measures.draws import generator_for
from fedaudit.measures.layer_coordinates import layer_coordinates
from fedaudit.measures.options import check_at_least
from fedaudit.measures.principal_angles import (
    angles_between,
    disjoint_pools,
    grassmann_distance,
    projection_distance,
)
from fedaudit.measures.released_directions import noise_beside
from fedaudit.measures.round_examples import broadcast_model, round_examples
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Estimate, Observer, RoundContext, Skip

_RESOLVED = 1e-12  # share of the largest squared singular value below which a direction is lost in rounding


@dataclass(frozen=True)
class SubspaceComparison:
    """A distance and what chance alone would make of it, in radians.

    Attributes:
        distance: mean Grassmann distance between subspaces with and without the attribute.
        null_mean: the same between halves of examples that agree on it.
        null_std: standard deviation of one such null distance over the repetitions.
        projection: mean projection distance minus that of the null, without unit.
    """

    distance: float
    null_mean: float
    null_std: float
    projection: float

    @property
    def corrected(self) -> float:
        """distance - null_mean."""
        return self.distance - self.null_mean


def compare_subspaces(
    without: Tensor,
    having: Tensor,
    k: int,
    *,
    batches: int,
    batch: int = 1,
    repetitions: int = 20,
    noise_std: float = 0.0,
    dimensions: int | None = None,
    generator: torch.Generator,
) -> SubspaceComparison:
    """Distance between the gradient subspaces of batches with and without an attribute, beside its null.

    Each repetition draws two disjoint pools of p = floor(min(n0, n1) / 2) examples of either kind and forms
    `batches` sums of `batch` gradients in every pool, each example about as often as any other. Pools of
    different kinds give four distances, the two pools of a kind give the null. So all compared matrices have
    the same number of rows and of different examples behind them, and share none: where both kinds are alike,
    both distances have the same mean. Rows are divided by their norm, so no single gradient leads.

    Args:
        without: gradients (n0, r) of examples without the attribute, in an orthonormal basis.
        having: gradients (n1, r) of examples with it, in the same basis.
        k: dimension of the subspaces, at most min(batches, p).
        batches: rows of a matrix.
        batch: examples in a sum, at most p.
        repetitions: how often pools are drawn, at least 2.
        noise_std: standard deviation of noise on every one of P coordinates of every sum.
        dimensions: P >= r; None is r.
        generator: source of the draws.

    Raises:
        ValueError: if there are too few examples, or a pool spans fewer than k directions.
    """
    if repetitions < 2:
        raise ValueError(f"a standard deviation needs repetitions, at least 2, got {repetitions}: raise it")
    pool = min(len(without), len(having)) // 2
    if not 1 <= batch <= pool or not 1 <= k <= min(batches, pool):
        raise ValueError(
            f"two pools of each kind hold max(k, batch) examples, got {len(without)} and {len(having)} "
            f"for k={k}, batch={batch}, batches={batches}: lower k or batch, or give more examples"
        )
    sums = []
    for rows in (without.double(), having.double()):
        drawn = disjoint_pools(len(rows), pool, repetitions, generator)
        dealt = _dealt(pool, batches, batch, repetitions * 2, generator).reshape(
            repetitions, 2, batches, batch
        )
        chosen = drawn[torch.arange(repetitions)[:, None, None, None], torch.arange(2)[:, None, None], dealt]
        sums.append(rows[chosen].sum(3))
    every = torch.cat(sums, 1)  # (repetitions, 4, batches, r)
    if noise_std > 0:
        every = _noisy(every, noise_std, dimensions or every.shape[-1], generator)
    norms = every.norm(dim=-1, keepdim=True)
    subspaces = _leading(every / torch.where(norms > 0, norms, 1.0), k)
    null = torch.stack([angles_between(subspaces[:, a], subspaces[:, b]) for a, b in ((0, 1), (2, 3))])
    across = torch.stack([angles_between(subspaces[:, a], subspaces[:, b]) for a in (0, 1) for b in (2, 3)])
    null_distance = grassmann_distance(null)
    return SubspaceComparison(
        float(grassmann_distance(across).mean()),
        float(null_distance.mean()),
        float(null_distance.std()),
        float(projection_distance(across).mean() - projection_distance(null).mean()),
    )


def _leading(rows: Tensor, k: int) -> Tensor:
    """The k leading right singular vectors (..., r, k) of rows (..., m, r) by way of their Gram matrices.

    Several times faster than singular value decompositions for m << r. Their orthonormality loses digits with
    the squared ratio of the first to the k-th singular value, which is refused where float32 loses it anyway.
    """
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    if not bool((values[..., -k] > _RESOLVED * values[..., -1]).all()):
        raise ValueError(f"a subspace of k={k} dimensions needs rows that span as many: lower k")
    leading: Tensor = rows.mT @ (vectors[..., -k:] / values[..., -k:].sqrt().unsqueeze(-2))
    return leading


def _dealt(pool: int, batches: int, batch: int, times: int, generator: torch.Generator) -> Tensor:
    """Positions in a pool (times, batches, batch): dealt from shuffled packs until all batches are full."""
    per_pack = pool // batch
    packs = math.ceil(batches / per_pack)
    keys = torch.rand(times, packs, pool, generator=generator)
    return keys.argsort(dim=2)[:, :, : per_pack * batch].reshape(times, -1, batch)[:, :batches]


def _noisy(rows: Tensor, noise_std: float, dimensions: int, generator: torch.Generator) -> Tensor:
    """Rows (repetitions, 4, m, r) with noise on all P dimensions, in r + at most 4 m coordinates."""
    repetitions, sets, m, r = rows.shape
    noisy = []
    for repetition in rows:
        inside, beside = noise_beside(sets * m, r, dimensions, generator)
        signal = repetition.reshape(sets * m, r) + noise_std * inside
        noisy.append(torch.cat([signal, noise_std * beside], 1))
    return torch.stack(noisy).reshape(repetitions, sets, m, -1)


@dataclass
class SubspaceDistance:
    """How far gradients with a latent attribute lie from those without (server, client, oracle).

    The Grassmann distance in radians between the k leading directions of batch gradients with and without the
    attribute, minus the same distance between random halves of examples that agree on it: see
    `compare_subspaces`. A batch gradient is the sum of the per-example gradients at the broadcast weights,
    clipped as the release clips and with the noise of one step, whatever number of examples that step has.
    The value is that of the whole gradient; `layers` has every layer that spans k directions and has more
    than k parameters ("layers-left-out" names the others).

    About 0 means that these k directions do not tell the attribute, not that nothing does: a classifier may
    still find it in others (see usable information), and with few examples the null is wide. It may be
    negative. A value is to be read in units of `extra["null-std"]`, which is the spread of one null distance
    and no standard error of the value. That spread is wide where the k-th and the next singular value are
    close: choose k where they are not. Distances with other k, batches, batch or numbers of examples are not
    comparable, nor are those of layers with few parameters to those of layers with many.

    Observers: a client uses its own examples, an oracle those of all clients, a server its reference examples
    under the least protected release among the clients.

    Source: in the spirit of Mo et al., arXiv 2105.13929; see the module for what differs.

    Attributes:
        attribute: "brightness", "contrast" or "label:K".
        k: dimension of the compared subspaces.
        batches: batch gradients that span one subspace.
        batch: examples in a batch.
        repetitions: how often batches are drawn.
        examples: largest number of examples, drawn evenly from the clients.
        chunk: examples per forward and backward pass.
    """

    attribute: str = "brightness"
    k: int = 4
    batches: int = 16
    batch: int = 4
    repetitions: int = 20
    examples: int = 256
    chunk: int = 64

    name: ClassVar[str] = "subspace-distance"
    unit: ClassVar[str] = "rad"
    scope: ClassVar[Literal["client", "round"]] = "round"
    observers: ClassVar[tuple[Observer, ...]] = ("server", "client", "oracle")

    def __post_init__(self) -> None:
        check_attribute(self.attribute)
        check_at_least(
            self, k=1, batches=self.k, batch=1, repetitions=2, chunk=1, examples=4 * max(self.k, self.batch)
        )

    def needs(self, observer: Observer) -> Needs:
        """Examples, the model, and how a single client's step is released."""
        if observer == "server":
            return Needs.REFERENCE | Needs.MODEL | Needs.RELEASE | Needs.SINGLE
        return Needs.EVIDENCE | Needs.MODEL

    def __call__(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> list[Estimate | Skip]:
        """One estimate for the round, or a Skip where too few examples have or lack the attribute."""
        if not updates:
            return []
        used = round_examples(updates, ctx, self.examples, self.name)
        try:
            having = latent_attribute(self.attribute, used.x, used.y).cpu()
        except ValueError as error:
            return [Skip(str(error))]
        counts = (int((~having).sum()), int(having.sum()))
        needed = 2 * max(self.k, self.batch)
        if min(counts) < needed:
            return [
                Skip(
                    f"{self.name} needs at least {needed} examples with and without {self.attribute}, got "
                    f"{counts[1]} and {counts[0]}: give more examples or lower k or batch"
                )
            ]
        model, loss = broadcast_model(ctx, used.weights)
        found = layer_coordinates(
            model,
            loss,
            used.x,
            used.y,
            clip_norm=used.release.clip_norm,
            per_layer=used.release.per_layer,
            chunk=self.chunk,
        )

        def compared(rows: Tensor, dimensions: int, where: str) -> SubspaceComparison:
            return compare_subspaces(
                rows[~having],
                rows[having],
                self.k,
                batches=self.batches,
                batch=self.batch,
                repetitions=self.repetitions,
                noise_std=used.release.noise_std,
                dimensions=dimensions,
                generator=generator_for(ctx, self.name, where, used.key),
            )

        whole = compared(found.whole, sum(found.sizes.values()), "whole")
        layers: dict[str, float] = {}
        left_out: list[str] = []
        for layer, rows in found.layers.items():
            try:
                if found.sizes[layer] <= self.k:
                    raise ValueError("every direction of so small a layer is in both subspaces")
                layers[layer] = compared(rows, found.sizes[layer], layer).corrected
            except ValueError:  # sizes were checked: what is left is a layer that spans too few directions
                left_out.append(layer)
        extra: dict[str, float | int | str | bool] = {
            "attribute": self.attribute,
            "attribute-is-label": follows_label(having, used.y.cpu()),
            "having": counts[1],
            "without": counts[0],
            "pool": min(counts) // 2,
            "k": self.k,
            "batches": self.batches,
            "batch": self.batch,
            "repetitions": self.repetitions,
            "distance": whole.distance,
            "null-mean": whole.null_mean,
            "null-std": whole.null_std,
            "projection": whole.projection,
            "ceiling": math.pi / 2 * math.sqrt(self.k),
            "layers-left-out": ", ".join(left_out),
            **used.described,
        }
        return [Estimate(whole.corrected, self.unit, "estimate", extra=extra, layers=layers)]
