"""How strongly each layer's gradient responds to a change of the input.

With g_l(x) the gradient of one example's loss by the parameters of layer l, and J_l = dg_l / dx (P_l x D),

    s_l = |J_l|_F,    relative s_l = |J_l|_F |x| / |g_l|

In the spirit of Mo et al. 2021, "Quantifying Information Leakage from Gradients" (arXiv 2105.13929); their
normalisation may differ. J_l is never formed: for random signs v,
E|J_l v|^2 = |J_l|_F^2, and one product J v holds those of all layers.

For the mean gradient of B examples, d gbar_l / dx_i = J_l(x_i) / B: the response to any one example falls
as 1/B, and the response to all B inputs together, |d gbar_l / dX|_F = sqrt(sum_i s_l(x_i)^2) / B, as
1 / sqrt(B). The relative response falls more slowly or not at all, because averaging shrinks the gradient,
too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from fedaudit.measures.layers import layers_of
from fedaudit.measures.probes import (
    ProbeMean,
    check_differentiable_again,
    check_examples,
    probe_mean,
    random_signs,
    twice_differentiable,
)
from fedaudit.measures.watched_calls import random_state_kept, spans
from fedaudit.types import Loss

FORWARD = "forward over reverse"
REVERSE = "double backward"
_NUMBERS = 2**22  # numbers in the products J v of one chunk: 16 MB in float32, which caches like


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Products J_l v of L layers and B examples with `probes` random signs, and what makes them relative.

    Attributes:
        layers: L module names.
        squares: |J_l v|^2 (probes, L, B), float64.
        gradient_squares: |g_l|^2 (L, B), float64.
        input_norms: |x| (B,), float64.
        method: how the products were formed; both ways are exact.
    """

    layers: tuple[str, ...]
    squares: Tensor
    gradient_squares: Tensor
    input_norms: Tensor
    method: str

    def absolute(self) -> ProbeMean:
        """|J_l|_F (L, B), in the gradient's unit per unit of the input.

        The square is unbiased; its root is low by a share of about v / 8, v the squared standard error of the
        square relative to the square: at most 1 / (4 probes).
        """
        mean, error = probe_mean(self.squares)
        root = mean.sqrt()
        return ProbeMean(root, torch.where(root > 0, error / (2 * root), 0.0))

    def relative(self) -> ProbeMean:
        """|J_l|_F |x| / |g_l| (L, B), without unit: relative change of the gradient by that of the input.

        It does not change when the loss or the inputs are multiplied by one number; it does when inputs are
        shifted. 0 where J_l is 0, infinite where only g_l is.
        """
        absolute, error = self.absolute()
        scale = self.input_norms / self.gradient_squares.sqrt()
        moving = absolute > 0
        return ProbeMean(
            torch.where(moving, absolute * scale, 0.0), torch.where(moving & (error > 0), error * scale, 0.0)
        )

    def whole(self) -> "Sensitivity":
        """The same with all layers taken together as one, named "model"."""
        return Sensitivity(
            ("model",),
            self.squares.sum(1, keepdim=True),
            self.gradient_squares.sum(0, keepdim=True),
            self.input_norms,
            self.method,
        )


def gradient_sensitivity(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    probes: int,
    generator: torch.Generator,
    *,
    chunk: int | None = None,
) -> Sensitivity:
    """Sensitivity to the input of every example's own gradient, for all layers at once.

    A large value says the gradient moves when the input does, which an inversion needs; it does not say
    that different inputs give different gradients, and is no bound on what a reconstruction can recover. A
    layer is a module's own trainable parameters. Every example and probe takes one forward-mode derivative
    of the gradient, vectorised over both; where a model's operations do not allow that, or it is so large
    that it does not pay, examples take turns and the same products come from two backward passes (J v =
    d/dw <dl/dx, v>, as second derivatives commute).

    Args:
        model: any module that treats examples by themselves, in its present mode.
        loss: SUM-reduced loss (outputs, labels) -> scalar.
        x: inputs (B, ...), floating point.
        y: labels (B, ...).
        probes: number of random vectors, at least 2.
        generator: source of the signs, example by example.
        chunk: examples per pass; None lets the products of a pass take about 16 MB, or takes examples one by
            one where a single one's are larger. It does not change the numbers.

    Raises:
        ValueError: if inputs are not continuous, x and y differ in length, there are fewer than two probes,
            no parameter is trainable, or the model couples examples, draws at random or cannot be
            differentiated twice.

    >>> line = nn.Linear(2, 1)
    >>> total = lambda outputs, labels: outputs.sum()  # the gradient of the weight is the input itself
    >>> found = gradient_sensitivity(line, total, torch.ones(1, 2), torch.ones(1), 2, torch.Generator())
    >>> found.absolute().mean.tolist(), found.relative().mean.tolist()
    ([[1.41]], [[1.15]])
    """
    check_examples(model, x, y, probes)
    moving = _trainable(model)
    size = sum(p.numel() for p in moving.values())
    fits = _NUMBERS // (probes * size)
    step = chunk or max(1, min(len(x), fits))
    found, method = [], FORWARD if chunk or fits else REVERSE
    with twice_differentiable(model), random_state_kept(x):
        for start, stop in spans(len(x), step):
            a, b = x[start:stop].detach(), y[start:stop]
            signs = random_signs(a, probes, generator)
            if method == FORWARD:
                try:
                    found.append(_forward_over_reverse(model, loss, moving, a, b, signs))
                    continue
                except RuntimeError:  # an operation without forward mode or without a rule for vmap
                    method = REVERSE
            for i in range(len(a)):
                one = slice(i, i + 1)
                found.append(_double_backward(model, loss, moving, a[one], b[one], signs[one]))
    layers = tuple(layers_of(moving))
    squares = torch.cat([part for part, _ in found], 2).double()
    gradient_squares = torch.cat([part for _, part in found], 1).double()
    return Sensitivity(layers, squares, gradient_squares, x.detach().flatten(1).double().norm(dim=1), method)


def batch_sensitivity(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, probes: int, generator: torch.Generator
) -> Sensitivity:
    """Sensitivity of the MEAN gradient of B examples to all of them together: |d gbar_l / dX|_F.

    It is measured on the batch's own gradient, not put together from examples, and holds no per-example
    gradients: two backward passes, the second once per probe. The result has one column, the batch, whose
    input norm is that of all B inputs. Divided by sqrt(B) it is the root mean square over examples of
    |d gbar_l / dx_i|_F, the response to one example.

    Args, raises: as `gradient_sensitivity`.

    >>> line = nn.Linear(2, 1)
    >>> total = lambda outputs, labels: outputs.sum()
    >>> found = batch_sensitivity(line, total, torch.ones(8, 2), torch.ones(8), 2, torch.Generator())
    >>> found.absolute().mean.tolist()  # sqrt(2 / 8)
    [[0.5]]
    """
    check_examples(model, x, y, probes)
    moving = _trainable(model)
    B = len(x)

    def mean_loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return loss(outputs, labels) / B

    with twice_differentiable(model), random_state_kept(x):
        signs = random_signs(x, probes, generator)
        squares, gradient_squares = _double_backward(model, mean_loss, moving, x.detach(), y, signs)
    norm = x.detach().double().norm().reshape(1)
    return Sensitivity(tuple(layers_of(moving)), squares.double(), gradient_squares.double(), norm, REVERSE)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    moving = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not moving:
        raise ValueError("a gradient needs a trainable parameter, got none: leave at least one unfrozen")
    return moving


def _state(model: nn.Module, moving: dict[str, Tensor]) -> dict[str, Tensor]:
    fixed = {name: p.detach() for name, p in model.named_parameters() if name not in moving}
    return {**fixed, **moving, **{name: buffer.clone() for name, buffer in model.named_buffers()}}


def _layer_squares(gradients: dict[str, Tensor]) -> Tensor:
    """Squared norm of each layer's part (L,)."""
    return torch.stack(
        [
            torch.stack([gradients[name].square().sum() for name in names]).sum()
            for names in layers_of(gradients).values()
        ]
    )


def _forward_over_reverse(
    model: nn.Module, loss: Loss, moving: dict[str, Tensor], x: Tensor, y: Tensor, signs: Tensor
) -> tuple[Tensor, Tensor]:
    """|J_l v|^2 (probes, L, b) and |g_l|^2 (L, b) for signs (b, probes, ...)."""

    def value(moving: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, _state(model, moving), (x[None],)), y[None])

    def product(x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        at_x = jvp(lambda x: grad(value)(moving, x, y), (x,), (v,))
        return _layer_squares(at_x[1]), _layer_squares(at_x[0])

    over_probes = vmap(product, in_dims=(None, None, 0), randomness="same")
    squares, gradient_squares = vmap(over_probes, randomness="same")(x, y, signs)
    return squares.permute(1, 2, 0).detach(), gradient_squares[:, 0].T.detach()


def _double_backward(
    model: nn.Module, loss: Loss, moving: dict[str, Tensor], x: Tensor, y: Tensor, signs: Tensor
) -> tuple[Tensor, Tensor]:
    """|J_l v|^2 (probes, L, 1) and |g_l|^2 (L, 1) of the loss of all of x, for signs (b, probes, ...)."""
    leaves = {name: p.clone().requires_grad_() for name, p in moving.items()}
    x = x.clone().requires_grad_()
    value = loss(functional_call(model, _state(model, leaves), (x,)), y)
    if not value.requires_grad:
        raise ValueError("a sensitivity needs a loss that depends on the parameters, got one that does not")
    first = _gradients(value, {**leaves, "": x}, None, create_graph=True)
    by_input = first.pop("")
    check_differentiable_again(by_input)
    changes = [
        _layer_squares(
            _gradients(by_input, leaves, v)
            if by_input.requires_grad
            else {name: torch.zeros_like(p) for name, p in leaves.items()}
        )
        for v in signs.unbind(1)
    ]
    return torch.stack(changes)[:, :, None], _layer_squares(first)[:, None].detach()


def _gradients(
    value: Tensor, leaves: dict[str, Tensor], weights: Tensor | None, create_graph: bool = False
) -> dict[str, Tensor]:
    found: Sequence[Tensor] = torch.autograd.grad(
        value,
        list(leaves.values()),
        weights,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, found, strict=True))
