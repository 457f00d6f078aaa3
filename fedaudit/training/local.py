"""Local training: which examples a step uses, and the steps themselves, with or without a defense.

The plan (`plan_batches`) is apart from the training (`train_locally`), so that whoever knows the
seed, an oracle in simulation, can say which examples a client used without training again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from fedaudit.config.sections import TrainConfig
from fedaudit.defenses.base import Defense, training_under
from fedaudit.defenses.none import NoDefense
from fedaudit.types import Loss, StepRelease

_PLAIN = NoDefense()


@dataclass(frozen=True)
class TrainSettings:
    """How a client trains in one round.

    Attributes:
        optimizer: "sgd" or "adam"; its state does not survive the round.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: factor on the weights added to the gradient.
        batch_size: the expected one under Poisson sampling.
        local_epochs: passes over the data, where local_steps is 0.
        local_steps: optimiser steps; 0 means by epochs.
        proximal_mu: FedProx (Li et al. 2020, arXiv 1812.06127): adds mu/2 ||w - w_0||^2 to the loss,
            w_0 the weights at the start of the round; 0 is plain FedAvg.

    Raises:
        ValueError: for a value out of range.
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 16
    local_epochs: int = 1
    local_steps: int = 0
    proximal_mu: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be sgd or adam, got {self.optimizer!r}: choose one")
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}: choose e.g. 0.1")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"momentum belongs to sgd, got {self.momentum} with {self.optimizer}: set it to 0"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}: choose e.g. 16")
        if self.local_steps < 1 and self.local_epochs < 1:
            raise ValueError(f"local_epochs must be >= 1, got {self.local_epochs}: or set local_steps")
        for name in ("momentum", "weight_decay", "local_steps", "proximal_mu"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}: 0 turns it off")


def settings_in_round(
    train: TrainConfig, defense: Defense, round_number: int, proximal_mu: float = 0.0
) -> TrainSettings:
    """Local training in a round: as the run agreed it, changed by the defense, the rate decayed.

    Args:
        train: what the run agreed.
        defense: may have its clients train with other settings (`ChangesTraining`).
        round_number: from 1.
        proximal_mu: FedProx's, from the server.
    """
    agreed = TrainSettings(
        optimizer=train.optimizer,
        lr=train.lr,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        batch_size=train.batch_size,
        local_epochs=train.local_epochs,
        local_steps=train.local_steps,
        proximal_mu=proximal_mu,
    )
    changed = training_under(defense, agreed)
    return replace(changed, lr=changed.lr * train.lr_decay ** (round_number - 1))


@dataclass(frozen=True)
class TrainResult:
    """What one round of local training did.

    Attributes:
        loss: mean loss over the examples seen, each before its step; NaN if none were. It depends on
            the data without noise, so no differential privacy guarantee covers it.
        steps: optimiser steps, empty batches included.
        examples_seen: examples used, repetitions included.
    """

    loss: float
    steps: int
    examples_seen: int


def steps_per_round(num_examples: int, settings: TrainSettings) -> int:
    """Optimiser steps a client with this many examples takes in one round.

    >>> steps_per_round(100, TrainSettings(batch_size=16, local_epochs=2))
    14
    """
    return settings.local_steps or settings.local_epochs * math.ceil(num_examples / settings.batch_size)


def client_seed(seed: int, client_id: int, round: int) -> int:
    """Seed of everything random that one client does in one round, in [0, 2^63).

    Well mixed (numpy's SeedSequence): neighbouring seeds, clients and rounds share nothing.
    The three numbers may have up to 64 bits. Of the seed, torch's generators on a CPU use the lowest 32
    bits only: among n client-rounds about n^2 / 2^33 pairs share their streams.
    """
    return _mix(seed, client_id, round)


def _mix(*numbers: int) -> int:
    """One number in [0, 2^63) that depends on every bit of the lowest 64 of each."""
    words = [word for number in numbers for word in (number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def plan_batches(num_examples: int, settings: TrainSettings, *, poisson: bool, seed: int) -> list[Tensor]:
    """Indices of the examples in each step of one round, each (B,) of dtype int64.

    Without `poisson`: shuffled epochs without replacement, the last batch of an epoch may be smaller;
    with local_steps, as many epochs as that takes, cut off. With `poisson`: every step includes every
    example independently with probability q = min(1, batch_size / num_examples), so that sizes vary
    and a batch may be empty.

    The same arguments give the same plan. The stream differs from that of a generator with the same
    seed, so that noise drawn from such a generator is independent of the plan.

    Raises:
        ValueError: if there is no example.
    """
    if num_examples < 1:
        raise ValueError(f"a client needs at least one example to train, got {num_examples}")
    steps = steps_per_round(num_examples, settings)
    generator = Generator().manual_seed(_mix(seed))
    if poisson:
        from fedaudit.opacus_parts import UniformWithReplacementSampler

        sampler = UniformWithReplacementSampler(
            num_samples=num_examples,
            sample_rate=min(1.0, settings.batch_size / num_examples),
            generator=generator,
            steps=steps,
        )
        return [torch.tensor(indices, dtype=torch.int64) for indices in sampler]
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches.extend(torch.split(torch.randperm(num_examples, generator=generator), settings.batch_size))
    return batches[:steps]


def train_locally(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    batches: Sequence[Tensor],
    settings: TrainSettings,
    *,
    loss: Loss = F.cross_entropy,
    defense: Defense | None = None,
    release: StepRelease | None = None,
    generator: Generator | None = None,
    device: str | torch.device = "cpu",
) -> TrainResult:
    """Train `model` in place, one optimiser step per batch, and say what happened.

    The model is moved to `device`, left in training mode and without gradients; hooks of a defense are
    gone again, also after an error.

    Args:
        model: what to train.
        x: the client's examples (n, ...).
        y: their labels (n,).
        batches: indices of each step, from `plan_batches`.
        settings: optimiser, learning rate, proximal term.
        loss: MEAN-reduced loss (outputs, labels) -> scalar.
        defense: protects every step; None is plain training.
        release: how a step is protected: the defense's own `release`.
        generator: source of the defense's noise, on `device`.
        device: where to compute.

    Raises:
        ValueError: if a defense comes without a release, or it refuses the model.
    """
    if defense is not None and release is None:
        raise ValueError(f"defense {defense.name!r} needs a release, got None: pass its release(...)")
    defense = defense or _PLAIN
    release = release or StepRelease(None, 0.0, min(1.0, settings.batch_size / len(x)))
    if next(model.parameters()).device != torch.device(device):  # `to` costs more than a step's update
        model.to(device)
    model.train()
    x, y = x.to(device), y.to(device)
    optimizer = _optimizer(model, settings)
    if settings.proximal_mu:
        _add_proximal_term(optimizer, settings.proximal_mu)
    private, stepper = defense.prepare(model, optimizer, release, min(settings.batch_size, len(x)), generator)
    losses: list[Tensor] = []
    sizes: list[int] = []
    try:
        for batch in batches:
            stepper.zero_grad(set_to_none=True)
            if len(batch):
                indices = batch.to(device)
                value = loss(private(x[indices]), y[indices])
                torch.autograd.backward(value)
                losses.append(value.detach())  # read once at the end: reading waits for the device
                sizes.append(len(batch))
            else:
                defense.empty_step(model)
            stepper.step()
    finally:
        stepper.zero_grad(set_to_none=True)
        defense.restore(private)
    seen = sum(sizes)
    total = math.fsum(size * value for size, value in zip(sizes, _numbers(losses), strict=True))
    return TrainResult(total / seen if seen else math.nan, len(batches), seen)


def weights_to_send(
    defense: Defense, before: Mapping[str, Tensor], after: Mapping[str, Tensor], generator: Generator
) -> dict[str, Tensor]:
    """The weights a client returns: those after training, or the broadcast plus the protected update.

    Entries that the defense hands back untouched are sent as trained, to the last bit. Once it touches one,
    integer entries (counters of batches), which no update holds, are sent as they came.

    Args:
        defense: what protects the finished update.
        before: what was broadcast, on the CPU.
        after: the same entries after training, on the CPU.
        generator: source of the defense's randomness, on the CPU.
    """
    delta = {name: after[name] - sent for name, sent in before.items() if sent.is_floating_point()}
    protected = defense.protect(delta, generator)
    if all(protected[name] is change for name, change in delta.items()):
        return dict(after)
    return {
        name: sent
        if name not in delta
        else after[name]
        if protected[name] is delta[name]
        else sent + protected[name]
        for name, sent in before.items()
    }


def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 512) -> tuple[float, float]:
    """Mean cross entropy in nats and accuracy in [0, 1], in evaluation mode.

    The model's mode is put back. `x` (n, ...) and `y` (n,) may live on another device.

    Raises:
        ValueError: if there is no example.
    """
    if len(x) == 0:
        raise ValueError("evaluation needs at least one example, got 0: hold out some data")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    try:
        with torch.no_grad():
            for inputs, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
                outputs, labels = model(inputs.to(device)), labels.to(device)
                total += F.cross_entropy(outputs, labels, reduction="sum")
                correct += (outputs.argmax(dim=1) == labels).sum()
    finally:
        model.train(training)
    return float(total) / len(x), int(correct) / len(x)


def _numbers(scalars: list[Tensor]) -> list[float]:
    return torch.stack(scalars).tolist() if scalars else []


def _optimizer(model: nn.Module, settings: TrainSettings) -> Optimizer:
    """A fused optimizer: as fast as a loop over parameters for SGD, a quarter faster for Adam."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings.optimizer == "adam":
        return Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    return SGD(
        parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
    )


def _add_proximal_term(optimizer: Optimizer, mu: float) -> None:
    """Add mu (w - w_0), the proximal term's gradient, just before every step.

    It depends on released weights only, so it is added after clipping and noise, where it costs no
    privacy; before them it would be clipped with each example's gradient.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    start = [p.detach().clone() for p in parameters]

    def add(*_: object) -> None:
        with torch.no_grad():
            for parameter, origin in zip(parameters, start, strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - origin, alpha=mu)

    optimizer.register_step_pre_hook(add)
