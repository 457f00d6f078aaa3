"""torchvision's ResNet-18 made fit for per-example gradients: GroupNorm, nothing in place, a small stem.

Apart from `fedaudit.models.networks` because it must import torchvision, which takes about a second that the
other models do not need.
"""

from torch import Tensor, nn

from fedaudit.vision import torchvision

GROUPS = 32
SMALL = 64


class ResidualBlock(torchvision.models.resnet.BasicBlock):  # type: ignore[misc, name-defined]
    """torchvision's basic block, with a sum that is not formed in place.

    Opacus hooks every module's output, and autograd forbids changing such an output in place.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Features after the block."""
        shortcut = x if self.downsample is None else self.downsample(x)
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(inner + shortcut)  # type: ignore[no-any-return]


def group_norm_resnet18(channels: int, size: int, num_classes: int) -> nn.Module:
    """An untrained ResNet-18 for images with `channels` channels and a longer side of `size` pixels.

    Up to `SMALL` pixels the stem is a 3x3 convolution with stride one and no pooling follows it.
    """
    model: nn.Module = torchvision.models.ResNet(
        ResidualBlock, [2, 2, 2, 2], num_classes=num_classes, norm_layer=_group_norm
    )
    small = size <= SMALL
    if small or channels != 3:
        kernel, stride = (3, 1) if small else (7, 2)
        stem = nn.Conv2d(channels, 64, kernel, stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = stem
    if small:
        model.maxpool = nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(GROUPS, channels)
