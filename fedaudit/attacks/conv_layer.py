"""R-GAP: the input of a small network, recovered layer by layer from its gradient by least squares."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor, nn

from fedaudit.attacks.labels import idlg_label
from fedaudit.attacks.replay import (
    Intercepted,
    Mode,
    gradient_residual,
    intercept,
    obstacle_of,
    rounding,
)
from fedaudit.attacks.tracing import Call, Trace
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Reconstruction, RoundContext

_THROUGH = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_ACTIVATIONS = (nn.LeakyReLU, nn.Sigmoid, nn.Tanh)
_AT_ONCE = 256  # basis vectors pushed through a layer together
_LOUDEST = 1e12  # how much more equations may say than the prior
_SCALES = 400  # points of the grid on which the scale of a head without bias is bracketed


@dataclass(frozen=True, eq=False)
class Stage:
    """One layer of a chain and the activation behind it.

    Attributes:
        call: the layer's call: a Conv2d or Linear module.
        activation: LeakyReLU, Sigmoid or Tanh; None for the last layer.
    """

    call: Call
    activation: nn.Module | None


def chain(seen: Trace) -> list[Stage]:
    """The model as layers with activations, if it is a plain chain that can be inverted step by step.

    Raises:
        ValueError: if a part is none of Conv2d, Linear, LeakyReLU, Sigmoid, Tanh, Flatten and Dropout, or a
            part's input is not the output of the one before.
    """
    rule = "r-gap needs a plain chain of Conv2d or Linear layers with LeakyReLU, Sigmoid or Tanh in between"
    stages: list[Stage] = []
    before = seen.x
    for call in seen.calls:
        if call.inputs is not before:
            raise ValueError(
                f"{rule}, got other operations before {call}: choose another attack, such as dlg"
            )
        before = call.output
        if isinstance(call.module, (nn.Conv2d, nn.Linear)):
            if stages and stages[-1].activation is None:
                raise ValueError(f"{rule}, got no activation between {stages[-1].call} and {call}")
            _check_layer(call)
            stages.append(Stage(call, None))
        elif isinstance(call.module, _ACTIVATIONS) and stages and stages[-1].activation is None:
            if isinstance(call.module, nn.LeakyReLU) and not call.module.negative_slope > 0:
                raise ValueError(f"{rule}, got {call} with a slope of {call.module.negative_slope}")
            stages[-1] = Stage(stages[-1].call, call.module)
        elif not isinstance(call.module, _THROUGH):
            raise ValueError(f"{rule}, got {call}: choose another attack, such as dlg")
    if before is not seen.output or not stages or stages[-1].activation is not None:
        raise ValueError(f"{rule}, and a Linear layer last, got other operations at the end")
    if not isinstance(stages[-1].call.module, nn.Linear):
        raise ValueError(f"{rule}, and a Linear layer last, got {stages[-1].call}")
    return stages


def _check_layer(call: Call) -> None:
    module = call.module
    if isinstance(module, nn.Conv2d) and (
        module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        raise ValueError(
            f"r-gap needs convolutions of one group with a number of zeros as padding, got {module} "
            f"as {call.name!r}: choose another attack, such as dlg"
        )


def layer_matrices(module: nn.Module, shape: tuple[int, ...], slopes: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer's flat input x (N,) meets: A x = output without bias, and K x = weight gradient.

    Args:
        module: Conv2d or Linear.
        shape: of one input.
        slopes: dL/d output, in the output's shape.

    Returns:
        A (outputs, N) and K (weights, N). For a Linear layer K x is reduced to N rows that say the same,
        slopes^T (slopes x^T) / |slopes|.
    """
    size = int(torch.Size(shape).numel())
    if isinstance(module, nn.Linear):
        return module.weight.detach(), slopes.norm() * torch.eye(size).to(slopes)
    assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
    stride, padding, dilation = module.stride, module.padding, module.dilation
    forward, gradient = [], []
    for start in range(0, size, _AT_ONCE):
        basis = torch.eye(size, dtype=slopes.dtype)[start : start + _AT_ONCE].to(slopes)
        images = basis.reshape(-1, *shape)
        forward.append(F.conv2d(images, module.weight.detach(), None, stride, padding, dilation).flatten(1))
        windows = F.unfold(
            images, module.kernel_size, dilation, padding, stride
        )  # (basis, inputs * kernel, positions)
        gradient.append(torch.einsum("nkl,ol->nok", windows, slopes.flatten(1)).flatten(1))
    return torch.cat(forward).T, torch.cat(gradient).T


@dataclass(frozen=True, eq=False)
class Solved:
    """A layer's input and what is known of it.

    Attributes:
        x: flat input (N,).
        error: standard deviation of its error to be expected (N,).
        rank: directions that the equations determine better than the prior does.
        misfit: root mean square of what the equations disagree by, in standard deviations; at least 1.
    """

    x: Tensor
    error: Tensor
    rank: int
    misfit: float


def solve(matrix: Tensor, right: Tensor, middle: float, width: float) -> Solved:
    """The posterior mean of equations with unit Gaussian errors and the prior N(middle, width^2) per entry.

    Where there are more equations than unknowns and they disagree by more than their errors, the errors are
    taken as that much larger. With a posterior covariance C the rank is N - trace(C) / width^2, rounded.

    Args:
        matrix: (R, N), each row divided by the standard deviation of its error.
        right: (R,), divided alike.
        middle: mean of the prior.
        width: its standard deviation.
    """
    rows, N = matrix.shape
    # Rounding must not pass for knowledge: errors are at least 1e-12 of the largest value.
    tame = min(1.0, _LOUDEST / (width * float(matrix.norm(dim=0).max()) + 1e-300))
    matrix, right = matrix * tame, right * tame
    side = (right - matrix.sum(dim=1) * middle)[:, None]
    # The triangle of [matrix, side] is all that least squares needs; Q is never formed.
    packed = torch.linalg.qr(torch.cat([matrix * width, side], dim=1), mode="r").R
    misfit = 1.0
    if rows > N:
        misfit = max(1.0, float(packed[N, N].abs()) / math.sqrt(rows - N))
    prior = torch.eye(N, N + 1).to(packed)
    packed = torch.linalg.qr(torch.cat([packed[:N] / misfit, prior]), mode="r").R
    eye = torch.eye(N).to(packed)
    inverse = torch.linalg.solve_triangular(packed[:N, :N], eye, upper=True)
    spread = inverse.square().sum(dim=1)
    x = middle + width * (inverse @ packed[:N, N])
    return Solved(x, width * spread.sqrt(), N - round(float(spread.sum())), misfit)


def _invert(activation: nn.Module, h: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Pre-activation, slope there, relative error of that slope, and the share of values out of range."""
    if isinstance(activation, nn.LeakyReLU):
        slope = torch.where(h >= 0, torch.ones_like(h), torch.full_like(h, activation.negative_slope))
        return h / slope, slope, (h.abs() < 2 * error).to(h), 0.0  # the sign may be wrong there
    low = 0.0 if isinstance(activation, nn.Sigmoid) else -1.0
    margin = (error / 2).clamp(1e-15, 0.1)
    inside = torch.minimum(torch.maximum(h, low + margin), 1.0 - margin)
    out = float((inside != h).double().mean())
    if low == 0.0:
        slope = inside * (1 - inside)
        return torch.logit(inside), slope, error * (1 - 2 * inside).abs() / slope, out
    slope = 1 - inside.square()
    return torch.atanh(inside), slope, error * 2 * inside.abs() / slope, out


def _prior(
    activation: nn.Module | None, value_range: tuple[float, float], scale: float
) -> tuple[float, float]:
    """Middle and half-width of what a layer's input can be, given the activation before it."""
    if activation is None:
        return (value_range[0] + value_range[1]) / 2, (value_range[1] - value_range[0]) / 2
    if isinstance(activation, nn.Sigmoid):
        return 0.5, 0.5
    return 0.0, 1.0 if isinstance(activation, nn.Tanh) else 10 * scale


@dataclass(frozen=True)
class RGAP:
    """The input of one example, recovered from the last layer to the first by linear equations.

    The head's gradient gives its input and the slopes at the output. Then, for each layer from the end: the
    layer's output is the inverse activation of the next layer's input, the slopes at it follow by
    backpropagation, and the layer's input x solves A x = output - bias and K x = weight gradient.
    Each equation is divided by its expected error, and directions that no equation determines take the
    middle of what is possible. "ranks" says for each layer how many directions of how many were determined;
    where one is short the input is NOT unique and the result is an estimate. No iteration, no restarts.

    Works for batch 1, one local step, and chains of Conv2d or Linear layers with LeakyReLU, Sigmoid or Tanh,
    with or without biases. Time and memory grow with the cube and the square of the largest input.

    Source: Zhu, Blaschko 2021, arXiv 2010.07733.
    Differs from Zhu and Blaschko: weighted equations with a prior where they solve unweighted ones; any
    number of classes where they treat two; the scale of a head without bias is bracketed, and a head with
    bias needs none.

    Attributes:
        mode: reported only: a chain has no layer that would care; dropout is always off.
    """

    mode: Mode = "train"

    name = "r-gap"
    needs = Needs.MODEL | Needs.TRAINING | Needs.SHAPE

    def obstacle(self, update: ClientUpdate, ctx: RoundContext) -> str:
        """Why this model or batch is out of its reach; empty if it is not."""
        return obstacle_of(lambda: self._stages(intercept(self.name, update, ctx, self.mode)))

    def _stages(self, seen: Intercepted) -> list[Stage]:
        if seen.examples != 1:
            raise ValueError(f"r-gap inverts a single example, got {seen.examples}: choose spear or dlg")
        return chain(seen.seen)

    def reconstruct(self, update: ClientUpdate, ctx: RoundContext) -> Reconstruction:
        """The example (1, *input_shape).

        Raises:
            ValueError: for a batch, a model that is no such chain, or an update without signal.
        """
        seen = intercept(self.name, update, ctx, self.mode)
        stages = self._stages(seen)
        x, slopes, error, y, solutions = _head(seen, update, ctx, stages[-1])
        slope_error, worst_out, misfit = 0.0, 0.0, 1.0
        ranks: list[str] = []
        unique = True
        for index in range(len(stages) - 2, -1, -1):
            stage, before = stages[index], stages[index - 1].activation if index else None
            activation, name, module = stage.activation, stage.call.name, stage.call.module
            assert activation is not None and isinstance(module, (nn.Conv2d, nn.Linear))
            shape = tuple(stage.call.inputs.shape[1:])
            output, slope, relative, out = _invert(activation, x, error)
            slopes = slopes * slope  # now at the layer's output
            slope_error += float(((slopes * relative).square().sum() / slopes.square().sum()).sqrt())
            worst_out = max(worst_out, out)
            if module.bias is not None:
                output = output - module.bias.detach().repeat_interleave(len(output) // len(module.bias))
            A, K = layer_matrices(module, shape, slopes.reshape(stage.call.output.shape[1:]))
            target = seen.part(name, "weight")
            noise = math.hypot(rounding(update, ctx, f"{name}.weight"), slope_error * _rms(target))
            if isinstance(module, nn.Linear):
                target = slopes @ target / slopes.norm()
            noise = max(noise, 1e-15 * _rms(target), 1e-300)
            sure = (slope / error.clamp_min(1e-15 * _rms(x) + 1e-300))[:, None]
            middle, width = _prior(before, ctx.value_range, _rms(x))
            solved = solve(
                torch.cat([A * sure, K / noise]),
                torch.cat([output * sure[:, 0], target.flatten() / noise]),
                middle,
                width,
            )
            slopes = A.T @ slopes
            x, error = solved.x, solved.error
            misfit = max(misfit, solved.misfit)
            unique = unique and solved.rank == len(x)
            ranks.append(f"{name}: {solved.rank} of {len(x)}")
        inputs = x.reshape(seen.seen.x.shape[1:])[None]
        objective = gradient_residual(seen, inputs, torch.tensor([y], device=x.device))
        conditions: dict[str, float | int | str | bool] = {
            "labels": "estimated",
            "batch-size": 1,
            "local-steps": ctx.steps(update) or 1,
            "batchnorm-mode": self.mode,
            "ranks": "; ".join(reversed(ranks)),
            "uniquely-invertible": unique,
            "scale-solutions": solutions,
            "expected-error": _rms(error),
            "out-of-range": worst_out,
            "misfit": misfit,
        }
        if not unique:
            conditions["warning"] = "not uniquely invertible: some directions take the middle of their range"
        return Reconstruction(inputs.cpu().to(torch.float32), torch.tensor([y]), objective, 0, conditions)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _head(
    seen: Intercepted, update: ClientUpdate, ctx: RoundContext, stage: Stage
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Input of the head, slopes at that input, error of the input, label, and solutions for the scale."""
    head = stage.call.module
    assert isinstance(head, nn.Linear)
    name = f"{stage.call.name}." if stage.call.name else ""
    weight = seen.part(stage.call.name, "weight")
    if not float(weight.square().sum()) > 0:
        raise ValueError(f"r-gap needs a gradient of {stage.call} that is not zero: skip this update")
    noise = rounding(update, ctx, f"{name}weight")
    bias = seen.gradient.get(f"{name}bias")
    solutions = 1
    if bias is not None:
        x = weight.T @ bias / bias.square().sum()
        noise = max(noise, _rms(weight - torch.outer(bias, x)))
        label, slopes = idlg_label(bias), bias
    else:
        label = idlg_label(weight_gradient=weight)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        sign = -1.0 if left[label, 0] > 0 else 1.0
        noise = max(noise, math.sqrt(float(values[1:].square().sum()) / weight.numel()))
        u, v, size = left[:, 0] * sign, right[0] * sign, float(values[0])
        scale, solutions = _scale(seen, head, u, v, size, label)
        x, slopes = scale * v, u * (size / scale)
    error = torch.full_like(x, noise / float(slopes.norm()))
    return x, head.weight.detach().T @ slopes, error, label, solutions


def _scale(
    seen: Intercepted, head: nn.Linear, u: Tensor, v: Tensor, size: float, label: int
) -> tuple[float, int]:
    """The k > 0 for which input k v gives slopes (size / k) u, and how many roots the equation had."""
    y = torch.tensor([label], device=v.device)

    def slopes(k: float) -> Tensor:
        outputs = (k * (head.weight.detach() @ v))[None].requires_grad_()
        return torch.autograd.grad(seen.loss(outputs, y), outputs)[0][0]

    def excess(k: float) -> float:
        return float(k * (slopes(k) @ u)) / size - 1

    grid = torch.logspace(-6, 6, _SCALES, dtype=torch.float64).tolist()
    values = [excess(k) for k in grid]
    roots = [
        float(brentq(excess, a, b, xtol=1e-300, rtol=1e-14))
        for a, b, fa, fb in zip(grid, grid[1:], values, values[1:], strict=False)
        if fa * fb < 0
    ]
    if not roots:
        raise ValueError("r-gap found no scale that explains the head's gradient: noise, or another loss")
    return min(roots, key=lambda k: float((slopes(k) - u * (size / k)).norm() * k)), len(roots)
