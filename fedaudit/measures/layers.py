"""Which parameters make up a layer: a module's own weights and biases, by the module's name."""

from collections.abc import Iterable


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Module name to the names of its own parameters, in order; a parameter of the root belongs to "model".

    >>> layers_of(["conv1.weight", "conv1.bias", "block.1.weight", "scale"])
    {'conv1': ['conv1.weight', 'conv1.bias'], 'block.1': ['block.1.weight'], 'model': ['scale']}
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0] or "model", []).append(name)
    return layers
