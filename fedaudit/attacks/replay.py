"""What an attacker replays at the broadcast weights: gradients of its own guesses, and their rounding."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedaudit.attacks.attacked_model import broadcast_model, set_mode
from fedaudit.attacks.tracing import Trace, trace
from fedaudit.types import ClientUpdate, Loss, RoundContext

Mode = Literal["train", "eval"]


@dataclass(frozen=True, eq=False)
class Intercepted:
    """An update, prepared for an attack in float64.

    Attributes:
        model: the broadcast weights, in the client's mode, dropout off.
        loss: SUM-reduced.
        gradient: mean gradient of plain SGD that the update stands for, by parameter name.
        examples: most examples that can be behind it.
        num_classes: C.
        seen: a watched forward pass of two random inputs in evaluation mode.
    """

    model: nn.Module
    loss: Loss
    gradient: Mapping[str, Tensor]
    examples: int
    num_classes: int
    seen: Trace

    def part(self, name: str, parameter: str) -> Tensor:
        """Gradient of one parameter of a module.

        Raises:
            ValueError: if the update lacks it, or a value is not finite.
        """
        key = f"{name}.{parameter}" if name else parameter
        if key not in self.gradient:
            raise ValueError(f"this attack needs the gradient of {key!r}, got none: is the layer withheld?")
        if not math.isfinite(float(self.gradient[key].abs().sum())):
            raise ValueError(f"the gradient of {key!r} must be finite, got NaN or infinity: skip it")
        return self.gradient[key]

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Gradient of a module's weight and bias; raises as `part` does."""
        return self.part(name, "weight"), self.part(name, "bias")


def intercept(attack: str, update: ClientUpdate, ctx: RoundContext, mode: Mode) -> Intercepted:
    """The update as `attack` sees it, in float64 on `ctx.device`.

    The number of examples is the client's, or batch size times steps if that is smaller.

    Raises:
        ValueError: if the model, the loss, the input shape, the classes or the batch size is unknown, or the
            training settings are.
    """
    if ctx.build_model is None or ctx.loss is None or ctx.input_shape is None or ctx.num_classes is None:
        raise ValueError(f"{attack} needs the model, the loss, the input shape and the classes: state them")
    if not ctx.batch_size:
        raise ValueError(f"{attack} needs a positive batch size, got {ctx.batch_size}: state it")
    gradient = {
        name: value.detach().to(ctx.device, torch.float64) for name, value in update.gradient(ctx).items()
    }
    model = broadcast_model(update, ctx.build_model(), "eval").to(ctx.device, torch.float64)
    generator = torch.Generator().manual_seed(ctx.seed)
    probe = torch.rand(2, *ctx.input_shape, generator=generator, dtype=torch.float64).to(ctx.device)
    seen = trace(model, probe)
    set_mode(model, mode)
    most = ctx.batch_size * (ctx.steps(update) or 1)
    examples = min(most, update.num_examples) if update.num_examples > 0 else most
    return Intercepted(model, ctx.loss, gradient, examples, ctx.num_classes, seen)


def obstacle_of(check: Callable[[], object]) -> str:
    """The sentence with which a structural check refuses; empty if it passes."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return ""


def rounding(update: ClientUpdate, ctx: RoundContext, name: str) -> float:
    """Root mean square error of one parameter's gradient entries due to the update's number format.

    Each step rounds the weight to half a unit in the last place, eps |w| / 2 at most and taken as uniform,
    and the gradient itself carries a relative error of about eps; eps is that of the update's dtype. NOT a
    bound: sums in the client's backward pass may lose more, and noise added on purpose is not in it.

    Raises:
        ValueError: as `ClientUpdate.gradient` does.
    """
    steps, gradient = ctx.steps(update) or 1, update.gradient(ctx)[name].to(torch.float64)
    eps = torch.finfo(update.delta[name].dtype).eps
    after = update.before[name].to(torch.float64) + update.delta[name].to(torch.float64)
    stored = eps * after.square().mean().sqrt() / math.sqrt(12) * math.sqrt(steps) / (ctx.lr or 1.0) / steps
    return math.hypot(float(stored), eps * float(gradient.square().mean().sqrt()))


def layer_slopes(seen: Intercepted, name: str, x: Tensor, y: Tensor) -> Tensor:
    """d loss / d output of one module for each example (B, *output_shape), at the broadcast weights."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = seen.model.get_submodule(name).register_forward_hook(keep)
    try:
        loss = seen.loss(seen.model(x), y)
    finally:
        handle.remove()
    return torch.autograd.grad(loss, kept[-1])[0]


def labels_by_slopes(seen: Intercepted, name: str, x: Tensor, slopes: Tensor) -> Tensor:
    """The labels (B,) whose gradient at a module's output is closest to the slopes an attack found.

    For each example and class the gradient of the loss with respect to the module's output is computed at the
    broadcast weights. Exact for exact `x` and `slopes` of one step, as long as no two classes give the
    same gradient there.

    Args:
        seen: the intercepted update.
        name: the module.
        x: recovered inputs (B, *input_shape).
        slopes: recovered gradient of each example's own loss at the module's output (B, *output_shape).
    """
    distances = []
    for label in range(seen.num_classes):
        y = torch.full((len(x),), label, device=x.device)
        guess = layer_slopes(seen, name, x, y)
        distances.append((guess - slopes.reshape(guess.shape)).flatten(1).norm(dim=1))
    return torch.stack(distances).argmin(dim=0)


def gradient_residual(seen: Intercepted, x: Tensor, y: Tensor) -> float:
    """||g(x, y) - g||^2 / ||g||^2 over the parameters in the update, g(x, y) the mean gradient of a guess.

    0 for a guess that explains the update, 1 for one that explains as much as nothing; comparable between
    attacks. A small value is NOT proof of a good reconstruction. For an update of several steps it is not
    zero at the truth either.

    Raises:
        ValueError: if the update names no parameter of the model or is zero.
    """
    named = [(n, p) for n, p in seen.model.named_parameters() if n in seen.gradient and p.requires_grad]
    norm = math.fsum(float(seen.gradient[n].square().sum()) for n, _ in named)
    if not norm > 0:
        raise ValueError(f"a gradient to explain must not be zero, got squared norm {norm}: skip it")
    loss = seen.loss(seen.model(x), y) / len(x)
    found = torch.autograd.grad(loss, [p for _, p in named], materialize_grads=True)
    pairs = zip(named, found, strict=True)
    return math.fsum(float((g - seen.gradient[n]).square().sum()) for (n, _), g in pairs) / norm
