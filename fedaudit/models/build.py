"""A registered model with initial weights that follow from a seed."""

import threading

import torch
from torch import nn

from fedaudit.registry import MODELS
from fedaudit.spec import parse_spec

_SEEDING = threading.Lock()


def build_model(spec_text: str, input_shape: tuple[int, ...], num_classes: int, seed: int) -> nn.Module:
    """A freshly initialised model that depends on the arguments alone.

    Initialisers of `torch.nn` draw from torch's global CPU generator. It is seeded for the construction
    and put back afterwards, under a lock: calls from several threads do not mix, and no caller's random
    numbers change. (Another thread that draws from the global generator at that very moment is the one
    thing this cannot shield; nothing in fedaudit draws from it.)

    Args:
        spec_text: a registered model and its options, e.g. ``"lenet"``.
        input_shape: shape of one example, e.g. (channels, height, width).
        num_classes: C, the number of outputs.
        seed: seed of the initial weights.

    Raises:
        ConfigError: if the model or an option is unknown, or the model cannot take such inputs.

    >>> model = build_model("mlp(hidden=16)", (1, 8, 8), num_classes=10, seed=0)
    >>> model(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """
    spec = parse_spec(spec_text)
    with _SEEDING:
        before = torch.default_generator.get_state()
        try:
            torch.default_generator.manual_seed(seed)  # unlike torch.manual_seed, leaves CUDA's alone
            model: nn.Module = MODELS.build(spec, input_shape=tuple(input_shape), num_classes=num_classes)
        finally:
            torch.default_generator.set_state(before)
    return model
