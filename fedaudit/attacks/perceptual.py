"""LPIPS, a learnt perceptual distance, where the weights it needs are on this machine already."""

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

Network = Literal["alex", "vgg", "squeeze"]
_WEIGHTS: dict[Network, str] = {
    "alex": "AlexNet_Weights",
    "vgg": "VGG16_Weights",
    "squeeze": "SqueezeNet1_1_Weights",
}
SMALLEST = 32
"""Pixels; AlexNet's layers leave nothing of an image with a shorter side."""


def weight_file(network: Network) -> Path:
    """Where torchvision keeps the ImageNet weights of a network once they were loaded."""
    from fedaudit.vision import import_torchvision

    models = import_torchvision().models
    url: str = getattr(models, _WEIGHTS[network]).DEFAULT.url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def present() -> Network | None:
    """The first network whose weights are there; AlexNet is the one that published results use."""
    return next((network for network in get_args(Network) if weight_file(network).is_file()), None)


def lpips(reconstruction: Tensor, truth: Tensor, value_range: tuple[float, float] = (0.0, 1.0)) -> float:
    """Mean LPIPS distance of pairs, without unit: 0 for equal images, about 0.7 for unrelated ones.

    Distances between activations of a network trained on ImageNet, weighted to agree with people's
    judgement. Nothing is ever downloaded. Grey images are given three equal channels. On images of a few
    pixels it is far from what it was fitted to.

    Source: Zhang, Isola, Efros, Shechtman, Wang 2018, arXiv 1801.03924, as torchmetrics computes it.

    Args:
        reconstruction: (M, C, H, W), C 1 or 3, in the value range.
        truth: the image that belongs to each (M, C, H, W).
        value_range: smallest and largest value of an input.

    Raises:
        ValueError: if the weights are not on this machine, or these are no images of at least 32x32.
    """
    obstacle = hindrance(tuple(truth.shape[1:]))
    network = present()
    if obstacle or network is None:
        raise ValueError(obstacle)
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    low, high = value_range
    ours, theirs = (
        ((side.detach().cpu().float() - low) / (high - low)).clamp(0, 1).expand(-1, 3, -1, -1)
        for side in (reconstruction, truth)
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # layers are initialised before they are loaded
        return float(
            learned_perceptual_image_patch_similarity(ours, theirs, net_type=network, normalize=True)
        )


def hindrance(input_shape: tuple[int, ...]) -> str:
    """Why LPIPS cannot be computed here for such inputs; empty if it can."""
    if len(input_shape) != 3 or input_shape[0] not in (1, 3) or min(input_shape[1:]) < SMALLEST:
        return (
            f"LPIPS needs grey or RGB images of at least {SMALLEST}x{SMALLEST}, got inputs of shape "
            f"{tuple(input_shape)}"
        )
    if present() is None:
        files = ", ".join(weight_file(network).name for network in get_args(Network))
        return (
            "LPIPS needs the ImageNet weights of a network, which are never downloaded: put one of "
            f"{files} into torch.hub's folder of checkpoints"
        )
    return ""
