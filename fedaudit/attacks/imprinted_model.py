"""ACTIVE: a model that a dishonest server imprinted, as a model to choose by name; off unless asked for."""

import torch
from torch import nn

from fedaudit.attacks.imprint import imprint
from fedaudit.registry import ACTIVE_MODELS, MODELS
from fedaudit.spec import parse_spec


def imprinted(
    input_shape: tuple[int, ...],
    num_classes: int,
    base: str = "cnn",
    bins: int = 64,
    mean: float = 0.5,
    std: float = 0.15,
    strength: float = 1.0,
    gain: float = 1.0,
) -> nn.Module:
    """ACTIVE: a registered model behind the imprint block of "Robbing the Fed", for the attack `imprint`.

    The server broadcasts it in place of the agreed model, and clients train it unaware. This breaks the
    protocol: results are about a dishonest server, say nothing about one that is honest but curious, and are
    labelled ACTIVE wherever they are shown. The bins are set for inputs whose mean value is Gaussian, since
    the server is not given data; state `mean` and `std` for the inputs at hand.

    Source: Fowl, Geiping, Czaja, Goldblum, Goldstein 2021, arXiv 2110.13057; see
    `fedaudit.attacks.imprint.ImprintBlock` for what differs.

    Args:
        input_shape: shape of one example.
        num_classes: C.
        base: name of the registered model behind the block, with its default options.
        bins: K, how many examples can be told apart at most.
        mean: mean over examples of an input's mean value.
        std: its standard deviation over examples.
        strength: size of the pattern; the larger, the further the gradient above rounding and noise, and
            the further the model from its base.
        gain: see `ImprintBlock`. A step moves the units gain^2 times as far: with 100, best for one round,
            they lie elsewhere in the next one, the attack finds little there, and the model hardly trains.

    Raises:
        ConfigError: if the base is no registered model, or cannot take such inputs.
        ValueError: if the base is itself imprinted, or a number is out of range.
    """
    if base in ACTIVE_MODELS:
        raise ValueError(f"a model is imprinted once, got base={base!r}: choose another base")
    model = MODELS.build(parse_spec(base), input_shape=tuple(input_shape), num_classes=num_classes)
    # torch's global generator is the one that `build_model` seeds for initial weights
    generator = torch.default_generator
    return imprint(
        model, tuple(input_shape), bins, generator, mean=mean, std=std, strength=strength, gain=gain
    )
