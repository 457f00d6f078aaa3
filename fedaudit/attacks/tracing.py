"""Which layer of a model sees what: the calls of its modules, and the functions their outputs go into."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_RELU = {"relu", "relu_"}
_READS = {"size", "dim", "ndimension", "numel", "is_floating_point", "__get__", "stride", "is_complex"}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a leaf module.

    Attributes:
        name: the module's name in the model.
        module: the module.
        inputs: the tensor it received (B, ...).
        output: the tensor it returned (B, ...).
    """

    name: str
    module: nn.Module
    inputs: Tensor
    output: Tensor

    def __str__(self) -> str:
        return f"{self.name!r} ({type(self.module).__name__})"


@dataclass(frozen=True, eq=False)
class Trace:
    """What one forward pass did.

    Attributes:
        x: the input (B, *input_shape).
        output: the model's output.
        calls: calls of leaf modules (those without children), in order.
        uses: name of each torch function that ran, the tensors it received and the one it changed in place.
    """

    x: Tensor
    output: Tensor
    calls: tuple[Call, ...]
    uses: tuple[tuple[str, tuple[Tensor, ...], Tensor | None], ...]

    def feeds_relu_only(self, call: Call) -> bool:
        """Whether the call's output goes into ReLU and into nothing else, be it a module or a function."""
        names: list[str] = []
        for name, tensors, changed in self.uses:
            if any(tensor is call.output for tensor in tensors):
                names.append(name)
                if changed is call.output:  # what follows uses the activated values
                    break
        return bool(names) and set(names) <= _RELU

    def first_trainable(self) -> Call:
        """The first call of a module with trainable parameters of its own.

        Raises:
            ValueError: if there is none.
        """
        for call in self.calls:
            if any(p.requires_grad for p in call.module.parameters(recurse=False)):
                return call
        raise ValueError("an attack on the first layer needs a trainable layer, got none: check the model")

    def first_linear(self, attack: str) -> Call:
        """The first trainable call, if it is a Linear layer with bias on the flattened input, called once.

        Args:
            attack: name of the attack that asks, for the error.

        Raises:
            ValueError: if it is anything else; says what was found.
        """
        found = self.first_trainable()
        rule = f"{attack} needs a Linear layer with bias on the flattened input as the first trainable layer"
        if not isinstance(found.module, nn.Linear):
            raise ValueError(f"{rule}, got {found}: choose another attack, such as dlg")
        if found.module.bias is None:
            raise ValueError(f"{rule}, got {found} without a bias: choose another attack, such as dlg")
        flat = self.x.reshape(len(self.x), -1)
        if found.inputs.shape != flat.shape or not torch.equal(found.inputs, flat):
            raise ValueError(
                f"{rule}, got {found} on something else of shape {tuple(found.inputs.shape)}: "
                f"choose another attack, such as dlg"
            )
        if sum(call.module is found.module for call in self.calls) > 1:
            raise ValueError(f"{rule}, called once, got {found} called several times: choose another attack")
        return found


def trace(model: nn.Module, x: Tensor) -> Trace:
    """One forward pass of `model` on `x` (B, *input_shape), watched.

    Module calls are seen by hooks; functions (torch.nn.functional and methods of tensors) by torch's override
    protocol. Compiled or scripted parts are not seen inside. The model's state is left as it was if it is in
    evaluation mode; normalisation layers in training mode would update their running statistics.

    >>> found = trace(nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU()), torch.rand(1, 2, 2))
    >>> found.feeds_relu_only(found.first_linear("an attack"))
    True
    """
    calls: list[Call] = []
    uses: list[tuple[str, tuple[Tensor, ...], Tensor | None]] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Iterable[type],
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            name = getattr(func, "__name__", str(func))
            result = func(*args, **(kwargs or {}))
            if name not in _READS:
                given = [*args, *(kwargs or {}).values()]
                pieces = [p for g in given for p in (g if isinstance(g, (list, tuple)) else [g])]
                tensors = tuple(p for p in pieces if isinstance(p, Tensor))
                changed = result if any(result is tensor for tensor in tensors) else None
                uses.append((name, tensors, changed))
            return result

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def seen(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                calls.append(Call(name, module, inputs[0], output))

        return seen

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    try:
        with torch.no_grad(), Watch():
            output = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(x, output, tuple(calls), tuple(uses))
