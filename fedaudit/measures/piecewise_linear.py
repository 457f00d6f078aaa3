"""Which models are known to be piecewise linear in their input.

Then the second derivative of every output by the input is zero wherever it exists. Known are modules by their
exact class: a subclass may compute something else. Not among them: GroupNorm, LayerNorm and batch
normalisation by batch statistics (they divide by a function of the input), attention, and smooth activations.
"""

from torch import nn

_ALWAYS: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Sequential,
        nn.Identity,
        nn.Flatten,
        nn.Unflatten,
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.PReLU,
        nn.Hardtanh,
        nn.MaxPool1d,
        nn.MaxPool2d,
        nn.MaxPool3d,
        nn.AdaptiveMaxPool1d,
        nn.AdaptiveMaxPool2d,
        nn.AdaptiveMaxPool3d,
        nn.AvgPool1d,
        nn.AvgPool2d,
        nn.AvgPool3d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveAvgPool3d,
        nn.ZeroPad2d,
        nn.ReflectionPad2d,
        nn.ReplicationPad2d,
        nn.PixelShuffle,
    }
)
_WHERE_NOT_TRAINING: frozenset[type[nn.Module]] = frozenset(
    {
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.AlphaDropout,
        nn.FeatureAlphaDropout,
        nn.RReLU,
    }
)


def curved_module(model: nn.Module) -> str | None:
    """Name and class of the first module that is not known to be piecewise linear in its input, or None.

    Modules are known by class and mode, see above; one of a user's own class is not, whatever it computes.

    >>> curved_module(nn.Sequential(nn.Linear(2, 3), nn.ReLU())) is None
    True
    >>> curved_module(nn.Sequential(nn.Linear(2, 3), nn.Tanh()))
    "'1' (Tanh)"
    """
    for name, module in model.named_modules():
        kind = type(module)
        if kind in _ALWAYS:
            continue
        if kind in _WHERE_NOT_TRAINING and not module.training:
            if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is not None:
                continue
            return f"{name!r} ({kind.__name__} without running statistics)"
        mode = " in training mode" if kind in _WHERE_NOT_TRAINING else ""
        return f"{name!r} ({kind.__name__}{mode})" if name else f"the model itself ({kind.__name__}{mode})"
    return None
