"""Batch-normalisation statistics as an image prior: a batch should look to each layer like the data did."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedaudit.attacks.attacked_model import batch_norms, forget_running_statistics

FIRST = 10.0
"""Weight of the first layer relative to the others."""


def bn_statistics(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The prior x -> sum_l |mean_l(x) - mean_l| + |var_l(x) - var_l|, the first layer ten times.

    mean_l(x) and var_l(x) are the statistics of the batch at the input of batch normalisation l, over
    examples and positions; mean_l and var_l are the running statistics the model was broadcast with. It
    says what an average batch looks like, not what this client's does, and costs one more pass per call.

    Source: Yin et al. 2021, arXiv 2104.07586, equation 6, after Yin et al. 2020, arXiv 1912.08795;
    the first layer's weight as in the implementation of Geiping's `breaching`.

    Args:
        model: with its running statistics, in the mode to attack; not changed.

    Returns:
        The prior; None if no layer keeps running statistics.
    """
    layers = batch_norms(model)
    if not layers:
        return None
    targets = [(_copy(layer.running_mean), _copy(layer.running_var)) for layer in layers]
    model = copy.deepcopy(model)
    layers = batch_norms(model)
    forget_running_statistics(model)
    state = {name: value.detach() for name, value in model.state_dict().items()}

    def prior(x: Tensor) -> Tensor:
        inputs: dict[int, Tensor] = {}

        def hear(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[id(layer)] = arguments[0]

        handles = [layer.register_forward_pre_hook(hear) for layer in layers]
        try:
            functional_call(model, state, (x,))
        finally:
            for handle in handles:
                handle.remove()
        terms: list[Tensor] = []
        for place, (layer, (mean, var)) in enumerate(zip(layers, targets, strict=True)):
            seen = inputs[id(layer)].transpose(0, 1).flatten(1)  # (channels, examples * positions)
            term = _norm(seen.mean(dim=1) - mean) + _norm(seen.var(dim=1, unbiased=False) - var)
            terms.append(term if place else FIRST * term)
        return torch.stack(terms).sum()

    return prior


def _copy(statistics: Tensor | None) -> Tensor:
    if statistics is None:
        raise ValueError("a batch normalisation needs both running statistics, got one: drop the prior")
    return statistics.detach().clone()


def _norm(difference: Tensor) -> Tensor:
    """Norm with a slope of 0 where the difference is 0."""
    return (difference.square().sum() + torch.finfo(difference.dtype).tiny).sqrt()
