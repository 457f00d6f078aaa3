"""The values that travel between client, server, measures, attacks and records."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedaudit.needs import Needs

Observer = Literal["server", "client", "oracle"]
Kind = Literal["exact", "estimate", "lower", "upper"]
STATED = ("clip-norm", "noise-std", "sample-rate")
"""Names of the scalars by which a client states its release, where that differs between rounds."""
NOISE_MULTIPLIER = "noise-multiplier"
"""Quantity of a client's noise over its clip norm, where a defense changes it between rounds."""
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Guarantee:
    """A differential-privacy guarantee; epsilon never travels without the other three.

    Attributes:
        epsilon: privacy loss bound.
        delta: failure probability that epsilon is stated at.
        unit: whose presence is protected.
        accountant: how epsilon was composed ("rdp", "prv", "pld").
    """

    epsilon: float
    delta: float
    unit: Literal["example", "client"]
    accountant: str

    def __str__(self) -> str:
        return f"({self.epsilon:.3g}, {self.delta:.1e})-DP per {self.unit} [{self.accountant}]"


@dataclass(frozen=True)
class StepRelease:
    """What one local step makes visible: sum_i b_i clip(g_i, clip_norm) + N(0, noise_std^2 I).

    Attributes:
        clip_norm: largest norm of a per-example gradient; None if gradients are not clipped.
        noise_std: standard deviation added to every coordinate of the SUM; 0 if none.
        sample_rate: probability (or fraction) with which an example enters the step.
        per_layer: whether each of the L trainable parameter tensors is clipped by itself, at
            clip_norm / sqrt(L), so that the whole is no longer than clip_norm either.
    """

    clip_norm: float | None
    noise_std: float
    sample_rate: float
    per_layer: bool = False

    def __repr__(self) -> str:
        layers = ", per_layer=True" if self.per_layer else ""
        return (
            f"StepRelease(clip_norm={self.clip_norm}, noise_std={self.noise_std}, "
            f"sample_rate={self.sample_rate}{layers})"
        )

    @classmethod
    def stated(cls, reported: Mapping[str, float]) -> "StepRelease | None":
        """The release that a client's scalars state; None if they state none, or one that cannot be.

        >>> StepRelease.stated({"clip-norm": 1.0, "noise-std": 0.5, "sample-rate": 0.1})
        StepRelease(clip_norm=1.0, noise_std=0.5, sample_rate=0.1)
        """
        said = [reported.get(name, math.nan) for name in STATED]
        possible = all(map(math.isfinite, said)) and min(said) > 0 and said[-1] <= 1
        return cls(said[0], said[1], said[2]) if possible else None


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """What one client sent in one round. Nobody writes into it.

    Attributes:
        client_id: the data partition where it is known, else the node's id.
        node_id: the node's id in the federation.
        round: server round, from 1.
        summed: the clients whose updates this is the weighted mean of, where a server sees nothing else
            (secure aggregation); client_id is -1 then and num_examples their total. Empty for one client's.
        before: the parameters and buffers that were broadcast, by name.
        delta: returned minus broadcast, by name, for floating-point entries.
        num_examples: number of local examples the client states.
        reported: scalars the client reported beside its update.
        integers: what came back of the integer entries that were sent (counters of batches), by name; they
            are no part of the update, and of those left out nobody knows what the client sent.
    """

    client_id: int
    round: int
    before: Mapping[str, Tensor]
    delta: Mapping[str, Tensor]
    num_examples: int
    reported: Mapping[str, float] = field(default_factory=dict)
    node_id: int = 0
    summed: tuple[int, ...] = ()
    integers: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def flat(self) -> Tensor:
        """The update as one vector (P,), in the order of `delta`."""
        return torch.cat([d.detach().reshape(-1).to(torch.float32) for d in self.delta.values()])

    def gradient(self, ctx: "RoundContext") -> dict[str, Tensor]:
        """The mean gradient that plain SGD without momentum must have used: -delta / (lr * steps).

        Exact for one step of plain SGD; for several steps it is their average along the path.

        Raises:
            ValueError: if the learning rate or the number of steps is unknown or zero.
        """
        steps, lr = ctx.steps(self), ctx.lr
        if not lr or not steps:
            raise ValueError(f"a gradient needs lr > 0 and steps > 0, got lr={lr}, steps={steps}: state both")
        return {name: -d / (lr * steps) for name, d in self.delta.items()}


@dataclass(frozen=True, eq=False)
class LocalEvidence:
    """A client's own examples; exists on the client, or as an oracle in simulation, and is never sent.

    Attributes:
        x: local examples (n, *input_shape).
        y: labels (n,).
        release: what one local step of this client makes visible.
    """

    x: Tensor
    y: Tensor
    release: StepRelease


@dataclass(frozen=True, eq=False)
class RoundContext:
    """What the observer knows about a round; `None` means unknown.

    Attributes:
        round: server round, from 1.
        build_model: returns a fresh model of the federation's architecture.
        loss: SUM-reduced loss (outputs, labels) -> scalar.
        lr: local learning rate of this round; None where a step is not lr times a gradient.
        optimizer: the clients' optimiser, e.g. "sgd", "adam", "sgd with momentum".
        local_steps: optimiser steps per client; 0 or None means by epochs.
        local_epochs: passes over the local data where local_steps is not set.
        batch_size: local batch size (the expected one under Poisson sampling).
        input_shape: shape of one example.
        num_classes: C.
        value_range: smallest and largest value of an input.
        reference: the observer's own examples and labels.
        release: what one local step of a given client makes visible.
        evidence: a client's own examples; only for the observers client and oracle.
        guarantee: the privacy guarantee a given client states after this round, if it states one.
        observer: who is looking.
        seed: seed of everything random the observer does in this round.
        device: where to compute.
        num_updates: valid updates in this round.
        summed: how many clients' updates the one that is seen is the sum of; 0 where single ones are seen.
        shared: what measures of this round computed for one another, by name; not an input.
    """

    round: int
    build_model: Callable[[], nn.Module] | None = None
    loss: Loss | None = None
    lr: float | None = None
    optimizer: str | None = None
    local_steps: int | None = None
    local_epochs: int | None = None
    batch_size: int | None = None
    input_shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    value_range: tuple[float, float] = (0.0, 1.0)
    reference: tuple[Tensor, Tensor] | None = None
    release: Callable[[ClientUpdate], StepRelease] | None = None
    evidence: Callable[[ClientUpdate], LocalEvidence] | None = None
    guarantee: Callable[[ClientUpdate], Guarantee | None] | None = None
    observer: Observer = "server"
    seed: int = 0
    device: str = "cpu"
    num_updates: int = 0
    summed: int = 0
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def steps(self, update: ClientUpdate) -> int | None:
        """Optimiser steps this client took, as agreed; None if unknown."""
        if self.local_steps:
            return self.local_steps
        if self.local_epochs is None or not self.batch_size:
            return None
        return self.local_epochs * math.ceil(update.num_examples / self.batch_size)

    @property
    def known(self) -> Needs:
        """The pieces of knowledge this context holds."""
        trained = self.lr is not None and (self.local_steps or self.local_epochs) and self.batch_size
        pieces = {
            Needs.COHORT: self.num_updates >= 2,
            Needs.SINGLE: not self.summed,
            Needs.MODEL: self.build_model is not None and self.loss is not None,
            Needs.TRAINING: bool(trained),
            Needs.SHAPE: self.input_shape is not None and self.num_classes is not None,
            Needs.REFERENCE: self.reference is not None,
            Needs.RELEASE: self.release is not None,
            Needs.EVIDENCE: self.evidence is not None,
        }
        known = Needs.NOTHING
        for piece, holds in pieces.items():
            if holds:
                known |= piece
        return known


@dataclass(frozen=True)
class Estimate:
    """One number, raw and never clamped, with what kind of number it is.

    Attributes:
        value: the number.
        unit: "nats", "1", "dB", ...
        kind: exact, estimate, or a lower or upper bound.
        low: lower end of its interval, if there is one.
        high: upper end of its interval, if there is one.
        extra: the settings and side results a reader needs: ridge, ceiling, p-value, ...
        layers: the same quantity for each layer alone, by module name; empty if it is not layer-wise.
    """

    value: float
    unit: str
    kind: Kind
    low: float | None = None
    high: float | None = None
    extra: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """Stands in a measure's answer where one update cannot be measured while the others can.

    Attributes:
        reason: why, as a phrase that can follow "skipped: ".
    """

    reason: str


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an attack recovered.

    Attributes:
        x: reconstructed inputs (B, *input_shape).
        y: recovered or assumed labels (B,).
        objective: the attack's own final objective; the only thing it may select by.
        steps: optimiser iterations spent, over all restarts.
        conditions: what the attack assumed: labels, batch size, mode, restarts, ...
    """

    x: Tensor
    y: Tensor
    objective: float
    steps: int
    conditions: Mapping[str, float | int | str | bool] = field(default_factory=dict)


@runtime_checkable
class Measure(Protocol):
    """A quantity computed from a round's updates.

    `scope` "client": one estimate per update, in order. `scope` "round": exactly one estimate.
    `observers` are those who may compute it; the auditor runs it once for each one enabled.
    """

    name: str
    unit: str
    scope: Literal["client", "round"]
    observers: tuple[Observer, ...]

    def needs(self, observer: Observer) -> Needs:
        """What this observer must know."""
        ...

    def __call__(self, updates: Sequence[ClientUpdate], ctx: RoundContext) -> Sequence[Estimate | Skip]:
        """The estimates for these updates; `Skip` where one update cannot be measured."""
        ...


@runtime_checkable
class PerExample(Protocol):
    """A measure that speaks of single examples too."""

    def per_example(self, update: ClientUpdate, ctx: RoundContext) -> Tensor:
        """One number for each of the client's own examples (n,), in the order of `ctx.evidence(update)`."""
        ...


@dataclass(frozen=True, eq=False)
class Truth:
    """The examples behind an update; only a simulation's oracle has them, to score attacks with.

    Attributes:
        x: the examples the client used in this round, each once (n, *input_shape).
        y: their labels (n,).
        others: what else the client holds (m, *input_shape); None if unknown.
    """

    x: Tensor
    y: Tensor
    others: Tensor | None = None


class Oracle(Protocol):
    """Looks at the clients' data; exists in simulation only."""

    def evidence(self, update: ClientUpdate) -> LocalEvidence:
        """The client's local examples."""
        ...

    def truth(self, update: ClientUpdate) -> Truth:
        """The examples the client really used for this update."""
        ...


@runtime_checkable
class Attack(Protocol):
    """A reconstruction from one update and what the server knows; it never sees the truth."""

    name: str
    needs: Needs

    def reconstruct(self, update: ClientUpdate, ctx: RoundContext) -> Reconstruction:
        """The reconstruction with the best own objective."""
        ...
