"""Inputs read off the gradient of a linear layer: exact for one example, in part for a batch."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedaudit.attacks.replay import (
    Mode,
    gradient_residual,
    intercept,
    labels_by_slopes,
    obstacle_of,
    rounding,
)
from fedaudit.needs import Needs
from fedaudit.types import ClientUpdate, Reconstruction, RoundContext

_SIGMAS = 6.0
_COARSEST = 0.05  # rows whose ratio is less precise than this share of the value range are not read


def invert_linear(weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    """The input (N,) of a layer z = W x + c from its gradient for ONE example.

    dL/dW = d x^T and dL/dc = d, so x is the ratio of any row of dL/dW to its entry of dL/dc. All rows are
    used, weighted by their size: x = dL/dW^T d / |d|^2, the least-squares solution. Exact up to rounding
    for one example, whatever lies behind the layer. For a batch it is some affine mixture of the inputs,
    NOT an input.

    Source: Phong et al. 2018 (IEEE TIFS 13:1333); Geiping et al. 2020, arXiv 2003.14053, proposition 3.1.

    Args:
        weight_gradient: dL/dW (M, N).
        bias_gradient: dL/dc (M,).

    Raises:
        ValueError: if the shapes do not fit or the bias gradient is zero or not finite.

    >>> d, x = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25, 0.0])
    >>> invert_linear(torch.outer(d, x), d).tolist()
    [0.5, 0.25, 0.0]
    """
    _check(weight_gradient, bias_gradient)
    square = float(bias_gradient.square().sum())
    if not square > 0:
        raise ValueError(
            "the bias gradient must not be zero, got zero: the example does not reach this layer"
        )
    return weight_gradient.T @ bias_gradient / square


@dataclass(frozen=True, eq=False)
class RowRatios:
    """What each row of a linear layer's gradient says.

    Attributes:
        ratios: mixtures (K, N), one per group of rows that say the same; more rows first.
        rows: number of rows in each group (K,).
        members: group of each row of the gradient (M,); -1 where the row was too small to be read.
    """

    ratios: Tensor
    rows: Tensor
    members: Tensor


def row_ratios(
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    *,
    weight_noise: float = 0.0,
    bias_noise: float = 0.0,
    coarsest: float = math.inf,
) -> RowRatios:
    """The affine mixtures of a batch's inputs that the rows of a linear layer's gradient give.

    Row i of dL/dW over its entry of dL/dc is sum_n d_ni x_n / sum_n d_ni, d_ni = dL/dz_i of example n. If a
    single example reaches unit i the ratio is that example, so rows that share their only example agree.
    Rows are grouped by agreement within six standard deviations of their noise, the largest rows first, and
    the ratio of a group is that of all its rows together.

    A group of several rows is most likely a single example: mixtures agree by accident only. But agreement
    is NOT proof: with two classes and one hidden layer the d_ni of different examples are proportional,
    and all rows that the same examples reach agree. Conversely a group of one row may well be an example
    that reaches no other unit alone, and nothing here can tell it from a mixture, except that a value
    outside the inputs' range proves a mixture.

    Args:
        weight_gradient: dL/dW (M, N).
        bias_gradient: dL/dc (M,).
        weight_noise: standard deviation of the error per entry of dL/dW.
        bias_noise: the same for dL/dc.
        coarsest: rows whose ratio has a larger error than this are not read.

    Raises:
        ValueError: if the shapes do not fit, a value is not finite, or no row can be read.
    """
    _check(weight_gradient, bias_gradient)
    size = bias_gradient.abs()
    eps = torch.finfo(weight_gradient.dtype).eps
    largest = weight_gradient.abs().amax(dim=1)
    noise = torch.hypot(largest * eps * 4 + weight_noise, largest / size * (bias_noise + 4 * eps * size))
    errors = torch.where(size > _SIGMAS * bias_noise, noise / size, torch.inf).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )
    readable = (errors < math.inf) & (_SIGMAS * errors <= coarsest)
    if not bool(readable.any()):
        raise ValueError("no row of the layer's gradient stands above its noise: nothing can be read off it")
    members = torch.full((len(size),), -1, device=size.device)
    open_rows = readable.clone()
    ratios = weight_gradient / torch.where(readable, bias_gradient, 1.0)[:, None]
    groups = 0
    for leader in size.argsort(descending=True).tolist():
        if not bool(open_rows[leader]):
            continue
        rest = open_rows.nonzero()[:, 0]
        apart = (ratios[rest] - ratios[leader]).abs().amax(dim=1)
        same = rest[apart <= _SIGMAS * (errors[rest] + errors[leader])]
        members[same], open_rows[same] = groups, False
        groups += 1
    rows = torch.bincount(members[members >= 0], minlength=groups)
    order = rows.argsort(descending=True, stable=True)
    members = torch.where(members >= 0, order.argsort()[members], members)
    found = [
        invert_linear(weight_gradient[members == group], bias_gradient[members == group])
        for group in range(groups)
    ]
    return RowRatios(torch.stack(found), rows[order], members)


def explain(weight_gradient: Tensor, bias_gradient: Tensor, x: Tensor) -> tuple[Tensor, float]:
    """The slopes (B, M) with which inputs (B, N) best explain a linear layer's gradient, and what they leave.

    Least squares for [dL/dW, dL/dc] = D^T [x, 1].

    Returns:
        D, and the squared share of the gradient that is not explained.
    """
    both = torch.cat([weight_gradient, bias_gradient[:, None]], dim=1)
    inputs = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    slopes = (
        torch.linalg.lstsq(inputs.T, both.T, driver="gelsd").solution
        if x.device.type == "cpu"
        else (torch.linalg.pinv(inputs.T) @ both.T)
    )
    rest = both - slopes.T @ inputs
    return slopes, float(rest.square().sum() / both.square().sum())


def outside(x: Tensor, value_range: tuple[float, float]) -> Tensor:
    """How far each example (B, N) leaves the value range at most, in units of its width (B,)."""
    low, high = value_range
    beyond = torch.maximum(low - x, x - high).amax(dim=1).clamp_min(0)
    return beyond / (high - low)


@dataclass(frozen=True)
class LinearLayer:
    """Inputs read off the first layer's gradient, where that layer is Linear with bias on the flat input.

    Exact for one example. For a batch the attack returns at most B candidates, best first: those that
    several rows agree on and that lie in the value range, then others in the range, then the rest; see
    `row_ratios` for what agreement can and cannot know. Needs units that only some examples reach (ReLU):
    with smooth activations every row is a mixture of the whole batch. The objective is the squared share of
    the layer's gradient that the candidates leave unexplained; "relative-objective" is that of the whole
    gradient for candidates and labels. Several local steps mix more examples; the rule stays the same.

    Source: as `invert_linear`; mixtures of rows: Boenisch et al. 2021, arXiv 2112.02918.

    Attributes:
        mode: "train" or "eval": how normalisation layers ran in the client; dropout is always off.
    """

    mode: Mode = "train"

    survives_steps = True
    name = "linear-layer"
    needs = Needs.MODEL | Needs.TRAINING | Needs.SHAPE

    def obstacle(self, update: ClientUpdate, ctx: RoundContext) -> str:
        """Why this model has no such layer; empty if it has."""
        return obstacle_of(lambda: intercept(self.name, update, ctx, self.mode).seen.first_linear(self.name))

    def reconstruct(self, update: ClientUpdate, ctx: RoundContext) -> Reconstruction:
        """At most B candidates (K, *input_shape), best first.

        Raises:
            ValueError: if the first layer is none this attack applies to, or no row stands above rounding.
        """
        seen = intercept(self.name, update, ctx, self.mode)
        layer = seen.seen.first_linear(self.name)
        weight, bias = seen.of(layer.name)
        low, high = ctx.value_range
        if seen.examples == 1:
            x, rows = invert_linear(weight, bias)[None], torch.tensor([len(bias)])
            found, confirmed = 1, 1
        else:
            prefix = f"{layer.name}." if layer.name else ""
            groups = row_ratios(
                weight,
                bias,
                weight_noise=rounding(update, ctx, f"{prefix}weight"),
                bias_noise=rounding(update, ctx, f"{prefix}bias"),
                coarsest=_COARSEST * (high - low),
            )
            valid = outside(groups.ratios, ctx.value_range) <= _COARSEST
            rank = valid.to(torch.int64) * (1 + (groups.rows > 1).to(torch.int64))
            order = rank.argsort(descending=True, stable=True)[: seen.examples]
            x, rows, found = groups.ratios[order], groups.rows[order], len(groups.rows)
            confirmed = int(((rows > 1) & valid[order]).sum())
        slopes, objective = explain(weight, bias, x)
        inputs = x.reshape(len(x), *seen.seen.x.shape[1:])
        y = labels_by_slopes(seen, layer.name, inputs, slopes * seen.examples)
        steps = ctx.steps(update) or 1
        conditions: dict[str, float | int | str | bool] = {
            "labels": "estimated",
            "batch-size": seen.examples,
            "local-steps": steps,
            "batchnorm-mode": self.mode,
            "layer": layer.name,
            "candidates": found,
            "confirmed": confirmed,
            "relative-objective": gradient_residual(seen, inputs, y),
        }
        if steps > 1:
            conditions["warning"] = "weights moved between local steps: labels and objective are approximate"
        return Reconstruction(inputs.cpu().to(torch.float32), y.cpu(), objective, 0, conditions)


def _check(weight_gradient: Tensor, bias_gradient: Tensor) -> None:
    if weight_gradient.dim() != 2 or bias_gradient.shape != weight_gradient.shape[:1]:
        raise ValueError(
            f"a linear layer's gradient is (M, N) with a bias of (M,), got {tuple(weight_gradient.shape)} "
            f"and {tuple(bias_gradient.shape)}: pass both of one layer"
        )
    if not math.isfinite(float(weight_gradient.abs().sum() + bias_gradient.abs().sum())):
        raise ValueError("a linear layer's gradient must be finite, got NaN or infinity: drop this update")
