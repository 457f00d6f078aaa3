"""Models to train and to attack; every one can be trained by Opacus and takes inputs (B, *input_shape).

A factory takes ``(input_shape, num_classes, **options)``; its options are what a user writes in a spec,
e.g. ``"mlp(hidden=64-32, activation=tanh)"``. No model uses batch statistics, dropout or an in-place
operation: one example's output then depends on that example alone, which per-example gradients,
DP-SGD and gradient inversion all assume.

Layers are named by kind and number in the order of the forward pass: conv1, norm1, act1, pool1, fc1. These
names stand in records and reports, and in options such as ``withhold(layers=fc1)``. ResNet-18 has
torchvision's names.
"""

from collections import Counter, OrderedDict
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

Shape = tuple[int, ...]
Activation = Literal["relu", "sigmoid", "tanh"]

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.Linear: "fc",
    nn.GroupNorm: "norm",
    nn.AvgPool2d: "pool",
    nn.AdaptiveAvgPool2d: "pool",
    nn.MaxPool2d: "pool",
    nn.AdaptiveMaxPool2d: "pool",
    nn.Flatten: "flatten",
    **dict.fromkeys(_ACTIVATIONS.values(), "act"),
}


def logistic(input_shape: Shape, num_classes: int) -> nn.Module:
    """Multinomial logistic regression: one linear layer on the flattened input, D*C + C parameters."""
    return _named(nn.Flatten(), nn.Linear(_size(input_shape), num_classes))


def mlp(
    input_shape: Shape, num_classes: int, hidden: int | str = 64, activation: Activation = "relu"
) -> nn.Module:
    """A fully connected network on the flattened input.

    Args:
        input_shape: shape of one example.
        num_classes: C.
        hidden: width of the hidden layer, or several widths joined by hyphens: ``"64-32"``.
        activation: after each hidden layer.

    Raises:
        ValueError: if a width is not a positive whole number.
    """
    pieces = str(hidden).split("-")
    if not all(piece.isdecimal() and int(piece) > 0 for piece in pieces):
        raise ValueError(
            f"hidden is one width or several joined by hyphens, got {hidden!r}: write e.g. 64-32"
        )
    widths = [_size(input_shape), *map(int, pieces)]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), _ACTIVATIONS[activation]()]
    return _named(*layers, nn.Linear(widths[-1], num_classes))


def lenet(input_shape: Shape, num_classes: int) -> nn.Module:
    """The LeNet that Deep Leakage from Gradients attacks (Zhu, Liu, Han 2019, arXiv:1906.08935).

    Three 5x5 convolutions with 12 channels and strides 2, 2, 1, each followed by a sigmoid (the attack
    differentiates twice), and one linear layer; every weight and bias is uniform on [-0.5, 0.5], far
    wider than usual, which makes the attack easy. A trained or otherwise initialised LeNet leaks less.

    Differs from [DLG]: any number of channels and any image of 8x8 or more, not 3x32x32 only.

    Raises:
        ValueError: if the input is not an image of at least 8x8.
    """
    channels, height, width = _image("lenet", input_shape, smallest=8)
    features = 12 * _halved(height, 2) * _halved(width, 2)
    model = _named(
        nn.Conv2d(channels, 12, kernel_size=5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, kernel_size=5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, kernel_size=5, stride=1, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(features, num_classes),
    )
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def cnn(input_shape: Shape, num_classes: int, width: int = 16, activation: Activation = "relu") -> nn.Module:
    """A small convolutional network with GroupNorm: 33 770 parameters for 1x28x28 and ten classes.

    Three 3x3 convolutions of `width`, 2 `width` and 4 `width` channels, GroupNorm in four groups after
    each, average pooling by two in between, and a linear layer on 4x4 pooled features.

    Raises:
        ValueError: if the input is not an image of at least 8x8, or `width` no multiple of four.
    """
    channels, _, _ = _image("cnn", input_shape, smallest=8)
    if width < 4 or width % 4:
        raise ValueError(f"width must be a multiple of 4 (GroupNorm has 4 groups), got {width}: use e.g. 16")
    layers: list[nn.Module] = []
    for index, outputs in enumerate((width, 2 * width, 4 * width)):
        if index:
            layers.append(nn.AvgPool2d(2))
        layers += [
            nn.Conv2d(channels, outputs, kernel_size=3, padding=1),
            nn.GroupNorm(4, outputs),
            _ACTIVATIONS[activation](),
        ]
        channels = outputs
    return _named(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(channels * 16, num_classes))


def convnet(
    input_shape: Shape,
    num_classes: int,
    width: int = 64,
    norm: Literal["none", "group"] = "none",
    activation: Activation = "relu",
) -> nn.Module:
    """The width-64 ConvNet that gradient inversion papers attack: 2.9 million parameters for 3x32x32.

    Eight 3x3 convolutions of 1, 2, 2, 4, 4, 4, 4 and 4 times `width` channels, max-pooling by three after
    the sixth and the last, and one linear layer. Introduced with the code of Geiping et al. 2020,
    arXiv:2003.14053.

    Differs from [Geiping et al.]: no batch normalisation, whose statistics tie the examples of a batch
    together (3200 parameters fewer), or GroupNorm in groups of `width` / 4 channels in its place. Results
    on the original are not comparable to the digit. Untrained and without normalisation it has small
    gradients in its first layers.

    Raises:
        ValueError: if the input is not an image of at least 9x9, or `width` no multiple of four.
    """
    channels, height, width_in = _image("convnet", input_shape, smallest=9)
    if width < 4 or width % 4:
        raise ValueError(f"width must be a multiple of 4, got {width}: use e.g. 64")
    layers: list[nn.Module] = []
    for index, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4)):
        outputs = factor * width
        layers.append(nn.Conv2d(channels, outputs, kernel_size=3, padding=1))
        if norm == "group":
            layers.append(nn.GroupNorm(4 * factor, outputs))
        layers.append(_ACTIVATIONS[activation]())
        if index in (5, 7):
            layers.append(nn.MaxPool2d(3))
        channels = outputs
    features = channels * (height // 9) * (width_in // 9)
    return _named(*layers, nn.Flatten(), nn.Linear(features, num_classes))


def alexnet(input_shape: Shape, num_classes: int, hidden: int = 1024) -> nn.Module:
    """An AlexNet-like network for 32x32 images: five convolutions and two linear layers.

    Channels and order follow AlexNet (Krizhevsky, Sutskever, Hinton 2012).
    Differs from [AlexNet]: 3x3 kernels and one stride of two instead of an 11x11 kernel with stride
    four, one hidden linear layer of `hidden` units instead of two of 4096, no dropout (it would draw
    from the global random generator).

    Raises:
        ValueError: if the input is not an image of at least 16x16, or `hidden` is not positive.
    """
    channels, _, _ = _image("alexnet", input_shape, smallest=16)
    if hidden < 1:
        raise ValueError(f"hidden must be a positive width, got {hidden}: use e.g. 1024")
    return _named(
        nn.Conv2d(channels, 64, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 192, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256 * 4, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )


def resnet18(input_shape: Shape, num_classes: int) -> nn.Module:
    """torchvision's ResNet-18 (He et al. 2015, arXiv:1512.03385) with GroupNorm, never pretrained.

    Differs from [ResNet]: GroupNorm with 32 groups (Wu, He 2018, arXiv:1803.08494) instead of batch
    normalisation, and for images of at most 64x64 a 3x3 stem with stride one and no max-pooling, so
    that small images are not reduced to a single position.

    Raises:
        ValueError: if the input is not an image of at least 8x8.
    """
    from fedaudit.models.resnet import group_norm_resnet18  # a second of import that the others do not need

    channels, height, width = _image("resnet18", input_shape, smallest=8)
    return group_norm_resnet18(channels, max(height, width), num_classes)


def _named(*layers: nn.Module) -> nn.Sequential:
    """The layers one after the other, each named by its kind and its number among those of its kind."""
    numbers: Counter[str] = Counter()
    names = []
    for layer in layers:
        kind = _KINDS[type(layer)]
        numbers[kind] += 1
        names.append(f"{kind}{numbers[kind]}")
    return nn.Sequential(OrderedDict(zip(names, layers, strict=True)))


def _size(shape: Shape) -> int:
    return int(torch.Size(shape).numel())


def _halved(length: int, times: int) -> int:
    """Length after convolutions of stride two that pad to the same size: rounded up each time."""
    for _ in range(times):
        length = (length + 1) // 2
    return length


def _image(name: str, shape: Shape, smallest: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise ValueError(
            f"{name} takes images (channels, height, width) of at least {smallest}x{smallest}, "
            f"got shape {tuple(shape)}: choose another model"
        )
    return shape[0], shape[1], shape[2]
