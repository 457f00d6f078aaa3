"""The model an attack differentiates: the broadcast weights in the client's mode, and which are matched."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedaudit.types import ClientUpdate

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def broadcast_model(update: ClientUpdate, model: nn.Module, mode: str) -> nn.Module:
    """The model with the weights that were broadcast, in the client's mode, dropout off."""
    model.load_state_dict({name: value.detach().clone() for name, value in update.before.items()})
    set_mode(model, mode)
    return model


def returned_model(model: nn.Module, update: ClientUpdate) -> nn.Module:
    """The model at the weights the client returned."""
    after = copy.deepcopy(model)
    state = after.state_dict()
    with torch.no_grad():
        for name, delta in update.delta.items():
            if name in state:
                state[name].add_(delta.to(state[name]))
    return after


def set_mode(model: nn.Module, mode: str) -> None:
    """Put the model into the client's mode, "train" or "eval", with dropout off: its masks are not known."""
    model.train(mode == "train")
    for module in model.modules():
        if isinstance(module, DROPOUTS):
            module.eval()


def paired(model: nn.Module, gradient: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters to match and their gradients; parameters that are not matched are frozen.

    Raises:
        ValueError: if a shape differs, or the gradient names no trainable parameter.
    """
    parameters: list[Tensor] = []
    target: list[Tensor] = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in gradient)
        if parameter.requires_grad:
            if gradient[name].shape != parameter.shape:
                raise ValueError(
                    f"the gradient of {name!r} needs shape {tuple(parameter.shape)}, got "
                    f"{tuple(gradient[name].shape)}: pass the gradient of this model"
                )
            parameters.append(parameter)
            target.append(gradient[name].detach().to(parameter))
    if not parameters:
        raise ValueError(f"the gradient names no parameter of the model, got {list(gradient)}: check both")
    return parameters, target


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch normalisation layers that keep running statistics, in the order of `model.modules()`."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def forget_running_statistics(model: nn.Module) -> None:
    """Make batch normalisation in training mode keep no running statistics, in place.

    Its output does not use them there, and updating them is a side effect that cannot be vectorised.
    """
    for module in batch_norms(model):
        if module.training:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


def flat(tensors: list[Tensor]) -> Tensor:
    """Tensors as one vector (P,)."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
