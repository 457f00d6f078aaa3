"""Per-example clipping without holding the gradients of every example, in one backward pass.

A linear map's weight has, for example b, the gradient G_b = sum_t s_bt a_bt^T: signals s (gradients of the
output) times inputs a, summed over the T places where the map is applied. Clipping needs two things only:

    ||G_b||^2 = sum_tu (a_bt . a_bu) (s_bt . s_bu)        ghost norms (Li et al. 2022, arXiv 2110.05679)
    sum_b c_b G_b = sum_bt (c_b s_bt) a_bt^T              one product, c the clip factors

Both follow from inputs and signals of one backward pass (book-keeping: Bu et al. 2023, arXiv 2210.00038),
where Opacus' ghost mode runs a second one. Where T is so large that the norms would cost more than the
gradients (4 T^2 >= size of the weight; Bu et al. 2022, arXiv 2205.10683, with twice the cost for float64),
where they are few, and for every layer that is neither linear nor a plain 2-d convolution, that layer's
gradients are held.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedaudit.defenses.per_example import PerExampleModule

SMALL = 2**13  # numbers of a parameter's gradients that are copied rather than handled by themselves
HELD = 2**18  # numbers of a layer's gradients (1 MB) that are held rather than paid for with more operations


class Share(Protocol):
    """What B examples contribute to one parameter's gradient."""

    def norms(self) -> Tensor:
        """Euclidean norms (B,)."""
        ...

    def weighted(self, factors: Tensor) -> Tensor:
        """sum_b factors_b g_b, in the parameter's shape."""
        ...

    def rows(self) -> Tensor:
        """The gradients themselves (B, *shape)."""
        ...


@dataclass(frozen=True, eq=False)
class Rows:
    """Gradients that are held: (B, *shape)."""

    gradients: Tensor

    def norms(self) -> Tensor:
        """Euclidean norms (B,)."""
        found: Tensor = torch.linalg.vector_norm(self.flat(), dim=1)
        return found

    def weighted(self, factors: Tensor) -> Tensor:
        """sum_b factors_b g_b."""
        flat = self.flat()
        total: Tensor = factors.to(flat.dtype) @ flat
        return total.reshape(self.gradients.shape[1:])

    def rows(self) -> Tensor:
        """The gradients."""
        return self.gradients

    @property
    def small(self) -> bool:
        """Whether copying the gradients costs less than an operation of their own."""
        return self.gradients.numel() <= SMALL

    def flat(self) -> Tensor:
        """Rows (B, P), also of an empty batch and of a parameter without dimensions."""
        return self.gradients.reshape(len(self.gradients), math.prod(self.gradients.shape[1:]))


@dataclass(frozen=True, eq=False)
class Products:
    """Gradients of a weight as products: g_b = sum_t signals_bt inputs_bt^T, never held.

    Attributes:
        inputs: (B, T, d).
        signals: (B, T, p).
        shape: of the weight, p d numbers in all.

    >>> share = Products(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[2.0]]]), torch.Size([1, 2]))
    >>> share.norms(), share.weighted(torch.tensor([0.5]))
    (tensor([10.]), tensor([[3., 4.]]))
    """

    inputs: Tensor
    signals: Tensor
    shape: torch.Size

    def norms(self) -> Tensor:
        """Euclidean norms (B,); in float64 where places can cancel, so that none is understated."""
        if self.inputs.shape[1] == 1:
            lengths = [torch.linalg.vector_norm(part, dim=(1, 2)) for part in (self.inputs, self.signals)]
            return torch.mul(*lengths)
        a, s = self.inputs.double(), self.signals.double()
        squared = (a @ a.transpose(1, 2)).mul_(s @ s.transpose(1, 2)).sum((1, 2))
        return squared.clamp_(min=0).sqrt_().to(self.signals.dtype)

    def weighted(self, factors: Tensor) -> Tensor:
        """sum_b factors_b g_b."""
        scaled = self.signals * factors.to(self.signals.dtype)[:, None, None]
        return (scaled.flatten(0, 1).T @ self.inputs.flatten(0, 1)).reshape(self.shape)

    def rows(self) -> Tensor:
        """The gradients, formed."""
        return (self.signals.transpose(1, 2) @ self.inputs).reshape(len(self.inputs), *self.shape)


@dataclass(eq=False)
class Call:
    """One use of a layer in a forward pass: what went in, and the gradient of what came out."""

    layer: nn.Module
    inputs: list[Tensor]
    versions: list[int] = field(init=False)
    signal: Tensor | None = None

    def __post_init__(self) -> None:
        self.versions = [tensor._version for tensor in self.inputs]

    def receive(self, gradient: Tensor) -> None:
        """Keep the gradient, of the mean loss."""
        self.signal = gradient.detach()


def shares_of(call: Call) -> Iterator[tuple[nn.Parameter, Share]]:
    """What a layer's use contributes to each of its trainable parameters, of the same loss as the signal.

    Raises:
        ValueError: if the layer's input was overwritten after the layer read it.
    """
    if call.versions != [tensor._version for tensor in call.inputs]:
        raise ValueError(
            f"an in-place operation overwrote the input of a {type(call.layer).__name__}: "
            "use the operation that makes a new tensor, or grad-sample=hooks"
        )
    layer, signal = call.layer, call.signal
    if signal is None:
        return
    products = _linear_map(layer, call.inputs[0], signal)
    if products is None:
        for parameter, gradients in _sampled(layer, call.inputs, signal).items():
            if parameter.requires_grad:
                yield parameter, Rows(gradients)
        return
    weight, bias = layer.weight, layer.bias
    if isinstance(weight, nn.Parameter) and weight.requires_grad:
        places, size = products.inputs.shape[1], weight.numel()
        ghost = places == 1 or (4 * places**2 < size and len(signal) * size > HELD)
        yield weight, products if ghost else Rows(products.rows())
    if isinstance(bias, nn.Parameter) and bias.requires_grad:
        yield bias, Rows(products.signals.sum(1))


def _linear_map(layer: nn.Module, inputs: Tensor, signal: Tensor) -> Products | None:
    """Inputs (B, T, d) and signals (B, T, p) of a layer that is a linear map applied at T places."""
    if type(layer) is nn.Linear:
        a = inputs.to(signal.dtype).reshape(len(inputs), -1, layer.in_features)
        return Products(a, signal.reshape(len(inputs), -1, layer.out_features), layer.weight.shape)
    if type(layer) is nn.Conv2d and layer.groups == 1 and not isinstance(layer.padding, str):
        patches = F.unfold(
            inputs.to(signal.dtype),
            layer.kernel_size,
            dilation=layer.dilation,
            padding=layer.padding,
            stride=layer.stride,
        )
        return Products(patches.transpose(1, 2), signal.flatten(2).transpose(1, 2), layer.weight.shape)
    return None


def _sampled(layer: nn.Module, inputs: list[Tensor], signal: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-example gradients as Opacus computes them for this kind of layer."""
    from fedaudit.opacus_parts import ft_compute_per_sample_gradient

    sampler: Any = PerExampleModule.GRAD_SAMPLERS.get(type(layer), ft_compute_per_sample_gradient)
    found: dict[nn.Parameter, Tensor] = sampler(layer, inputs, signal)
    return found


class GhostModule(PerExampleModule):
    """Keeps inputs and signals of every trainable layer, and computes no parameter's gradient at all.

    Parameters are frozen during the forward pass, so that the backward pass follows activations alone: what a
    plain step spends on weights is saved. `shares` reads the clipped step's ingredients off afterwards.
    """

    def add_hooks(self, **options: Any) -> None:
        """Record every trainable layer's inputs, and the gradient of its output."""
        super().add_hooks(**options)
        self.calls: list[Call] = []

    def watch(self, layer: nn.Module, inputs: Any, output: Tensor, backprop: Any) -> Tensor | None:
        """Watch one use of a layer; the output of a first layer is copied, for later writes into it."""
        if not (layer.training and self.hooks_enabled and torch.is_grad_enabled()):
            return None
        call = Call(layer, [tensor.detach() for tensor in inputs if isinstance(tensor, Tensor)])
        self.calls.append(call)
        leaf = not output.requires_grad
        output.requires_grad_(True)
        hook: Any = output.register_hook
        hook(call.receive)
        return output.clone() if leaf else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; only activations are differentiated.

        Raises:
            ValueError: if a backward pass was not followed by a step.
        """
        if any(call.signal is not None for call in self.calls):
            raise ValueError("a private step takes one backward pass, got another: call step and zero_grad")
        self.calls.clear()
        trainable = [p for p in self._module.parameters() if p.requires_grad]
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            return self._module(*args, **kwargs)
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def shares(self, parameters: list[nn.Parameter]) -> tuple[list[Share], int]:
        """What the batch contributes to each of these parameters, of the mean loss, and its size B.

        Raises:
            ValueError: if a parameter took no part in the loss, layers saw batches of different sizes, or an
                input was overwritten.
        """
        sizes = {len(call.inputs[0]) for call in self.calls}
        if len(sizes) > 1:
            raise ValueError(
                f"the first dimension of every layer's input is the batch, got sizes {sorted(sizes)}: "
                "reshape inside the model"
            )
        found: dict[nn.Parameter, list[Share]] = {}
        for call in self.calls:
            for parameter, share in shares_of(call):
                found.setdefault(parameter, []).append(share)
        if any(parameter not in found for parameter in parameters):
            raise ValueError(
                "a private step needs every trainable parameter's gradient, got none for some: "
                "run a backward pass before the step, and freeze parameters that the loss does not use"
            )
        shares_by_parameter: list[Share] = [
            shares[0] if len(shares) == 1 else Rows(torch.stack([s.rows() for s in shares]).sum(0))
            for shares in (found[parameter] for parameter in parameters)
        ]
        return shares_by_parameter, sizes.pop()


def takes_ghosts(model: nn.Module) -> bool:
    """Whether every layer can be watched: Opacus' own recurrent and attention layers cannot."""
    return not any(type(module).__module__.startswith("opacus.layers") for module in model.modules())
