"""What local training on a few examples gives away of them: the update, as an average gradient."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedaudit.measures.gradient_coordinates import clipped_gradients
from fedaudit.types import Loss, StepRelease

_BLOCK = 2**25  # entries of one block of per-example gradients


@dataclass(frozen=True)
class LocalTraining:
    """How a pair's gradient comes about, starting from the broadcast weights.

    Attributes:
        steps: optimiser steps S.
        batch_size: examples per step; what a protected sum is divided by.
        lr: learning rate of plain SGD; without effect for one step, where the gradient is standardised.
        release: how each step is clipped and noised.
    """

    steps: int
    batch_size: int
    lr: float
    release: StepRelease


def mean_gradient(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    loss: Loss,
    x: Tensor,
    y: Tensor,
    training: LocalTraining,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """(w_0 - w_S) / (lr S) of local training on these examples, by trainable parameter.

    Plain SGD in shuffled epochs, the last batch of an epoch may be smaller, in evaluation mode (no dropout,
    no batch statistics). Unprotected steps use the batch's mean gradient; protected ones clip every example's
    gradient over all parameters, add N(0, s^2) to every coordinate of the sum and divide by the batch size.

    Args:
        model: the architecture, in evaluation mode.
        weights: parameters and buffers by name.
        loss: SUM-reduced loss (outputs, labels).
        x: examples (m, *input_shape).
        y: labels (m,).
        training: steps, batch size, learning rate and release.
        generator: source of the order and the noise, on the CPU.
    """
    free = {n: weights[n].detach() for n, p in model.named_parameters() if p.requires_grad}
    fixed = {name: value.detach() for name, value in weights.items() if name not in free}
    total = {name: torch.zeros_like(value) for name, value in free.items()}
    now = free
    for batch in _batches(len(x), training, generator):
        step = _step(model, {**fixed, **now}, list(free), loss, x[batch], y[batch], training, generator)
        for name, value in step.items():
            total[name] += value / training.steps
        if training.steps > 1:
            now = {name: value - training.lr * step[name] for name, value in now.items()}
    return total


def _batches(m: int, training: LocalTraining, generator: torch.Generator) -> Iterator[Tensor]:
    left = training.steps
    while left:
        epoch = torch.split(torch.randperm(m, generator=generator), training.batch_size)[:left]
        yield from epoch
        left -= len(epoch)


def _step(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    free: Sequence[str],
    loss: Loss,
    x: Tensor,
    y: Tensor,
    training: LocalTraining,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The gradient one step goes along."""
    release = training.release
    shapes = {name: weights[name].shape for name in free}
    if release.clip_norm is None:
        fixed = {name: value for name, value in weights.items() if name not in shapes}

        def batch_loss(parameters: dict[str, Tensor]) -> Tensor:
            return loss(functional_call(model, {**fixed, **parameters}, (x,)), y)

        found: dict[str, Tensor] = grad(batch_loss)({name: weights[name] for name in free})
        divisor = len(x)
    else:
        rows = max(1, _BLOCK // sum(shape.numel() for shape in shapes.values()))
        blocks = zip(torch.split(x, rows), torch.split(y, rows), strict=True)
        sums = [
            clipped_gradients(model, weights, loss, a, b, release.clip_norm, release.per_layer).sum(0)
            for a, b in blocks
        ]
        pieces = torch.split(torch.stack(sums).sum(0), [shape.numel() for shape in shapes.values()])
        found = {n: piece.view(shape) for (n, shape), piece in zip(shapes.items(), pieces, strict=True)}
        divisor = training.batch_size
    if release.noise_std:
        for name, value in found.items():
            noise = torch.randn(value.shape, generator=generator).to(value)
            found[name] = value + release.noise_std * noise
    return {name: value / divisor for name, value in found.items()}
