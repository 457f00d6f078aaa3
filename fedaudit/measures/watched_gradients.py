"""What of a model is watched: the layers whose gradients count, as one vector, and an example's features."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedaudit.measures.layers import layers_of

_CHUNK = 256  # examples of one forward pass
_LAST = 3
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def watched_layers(model: nn.Module, choice: str = "auto") -> dict[str, list[str]]:
    """The layers whose gradients enter, with the names of their trainable parameters, in the model's order.

    "auto": the last three convolutions, which are all of them in the paper's LeNet and CNN and the last
    three in its AlexNet; every layer of a model without convolutions, as in its MLP. "conv": every
    convolution. "all": every layer. Otherwise module names joined by "+".

    Raises:
        ValueError: if nothing is chosen that has trainable parameters.

    >>> list(watched_layers(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))))
    ['0']
    """
    layers = layers_of(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, _CONVOLUTIONS)]
    convolutions = [name for name in convolutions if name in layers]
    if choice == "all" or (choice == "auto" and not convolutions):
        chosen = list(layers)
    elif choice in ("auto", "conv"):
        chosen = convolutions[-_LAST:] if choice == "auto" else convolutions
    else:
        chosen = choice.split("+")
    if not chosen or not set(chosen) <= set(layers):
        raise ValueError(
            f"layers must be auto, conv, all or layers of the model joined by '+', got {choice!r}: "
            f"choose from {', '.join(layers)}"
        )
    return {name: layers[name] for name in chosen}


def feature_module(model: nn.Module, choice: str = "auto") -> tuple[str, bool]:
    """The module whose input (True) or output (False) are an example's features.

    "auto" follows the paper's section 4.1: in a network with convolutions what its first linear layer after
    them takes in (LeNet's 768 flattened values, AlexNet's pooled ones); in a network of n linear layers what
    number n/2 + 1 takes in (its MLP: the second layer of four). Otherwise a module's name: its output.
    Differs from [Meng et al.]: their CNN uses the output of its first linear layer; name it to have that.

    Raises:
        ValueError: if there is no such module.
    """
    modules = dict(model.named_modules())
    if choice != "auto":
        if choice not in modules or not choice:
            raise ValueError(
                f"features must be auto or a module of the model, got {choice!r}: "
                f"choose from {', '.join(name for name in modules if name)}"
            )
        return choice, False
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    names = list(modules)
    last = max((names.index(n) for n, m in modules.items() if isinstance(m, _CONVOLUTIONS)), default=None)
    if last is not None:
        linear = [name for name in linear if names.index(name) > last][:1]
    if not linear:
        raise ValueError("features=auto needs a linear layer after the convolutions: name a module instead")
    return linear[len(linear) // 2], True


def example_features(
    model: nn.Module, weights: Mapping[str, Tensor], x: Tensor, module: str, of_input: bool
) -> Tensor:
    """A module's input or output for each example, flattened (n, D), at these weights.

    Raises:
        ValueError: if the module is not called or does not give one tensor per call.
    """
    found: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        value = inputs[0] if of_input else output
        if isinstance(value, Tensor):
            found.append(value.detach().flatten(1))

    handle = model.get_submodule(module).register_forward_hook(keep)
    try:
        with torch.no_grad():
            blocks = []
            for part in torch.split(x, _CHUNK):
                found.clear()
                functional_call(model, dict(weights), (part,))
                if not found or len(found[0]) != len(part):
                    raise ValueError(f"module {module!r} gives no row per example: name another in features")
                blocks.append(found[0])
    finally:
        handle.remove()
    return torch.cat(blocks)


class LayerVectors:
    """The watched layers of a gradient as one vector, each layer in at most `coordinates` entries.

    A layer with more entries is hashed: entry k goes to a random coordinate with a random sign, and entries
    that meet are added (a count sketch; inner products are kept in expectation). That can only lose
    information. Differs from [Meng et al.]: they keep all entries, which `coordinates=0` does too.

    Args:
        layers: parameter names of each watched layer.
        weights: tensors of the parameters' shapes, by name.
        coordinates: largest number of entries per layer; 0 keeps all.
        generator: source of coordinates and signs, on the CPU.
    """

    def __init__(
        self,
        layers: Mapping[str, Sequence[str]],
        weights: Mapping[str, Tensor],
        coordinates: int,
        generator: torch.Generator,
    ) -> None:
        self._layers = list(layers.values())
        self._hashes: list[tuple[Tensor, Tensor] | None] = []
        self.widths: list[int] = []
        self.entries = 0
        for names in self._layers:
            size = sum(weights[name].numel() for name in names)
            device = weights[names[0]].device
            self.entries += size
            if not coordinates or size <= coordinates:
                self._hashes.append(None)
                self.widths.append(size)
                continue
            places = torch.randint(coordinates, (size,), generator=generator).to(device)
            signs = 2.0 * torch.randint(2, (size,), generator=generator).to(device) - 1
            self._hashes.append((places, signs))
            self.widths.append(coordinates)

    def __call__(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """The vector (P,) of a gradient by parameter name."""
        pieces = []
        for names, hashed, width in zip(self._layers, self._hashes, self.widths, strict=True):
            piece = torch.cat([gradient[name].reshape(-1) for name in names])
            if hashed is not None:
                places, signs = hashed
                piece = piece.new_zeros(width).index_add_(0, places, piece * signs)
            pieces.append(piece)
        return torch.cat(pieces)
