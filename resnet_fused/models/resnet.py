"""ResNet, ResNeXt and Wide ResNet for ImageNet, with torchvision's names and weights.

He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), table 1 and figure 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from resnet_fused.models import _checks
from resnet_fused.models.shortcut import make_shortcut

STRIDES_IN = ("3x3", "1x1")

#: Builds one block from (in_channels, planes, stride).
BlockBuilder = Callable[[int, int, int], nn.Module]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a padded 3x3 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, groups=groups, bias=False)


class BasicBlock(nn.Module):
    r"""Two 3x3 convolutions and the shortcut.

    .. math:: y = \mathrm{relu}(\mathrm{BN}_2(W_2 * \mathrm{relu}(\mathrm{BN}_1(W_1 * x))) + s(x))

    (N, C, H, W) to (N, planes, ⌈H/stride⌉, ⌈W/stride⌉). arXiv 1512.03385, figure 5, left.
    """

    expansion = 1

    def __init__(
        self, in_channels: int, planes: int, stride: int = 1, *, shortcut: str = "B"
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = make_shortcut(shortcut, in_channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    r"""1x1, 3x3 and 1x1 convolutions and the shortcut.

    .. math:: y = \mathrm{relu}(\mathrm{BN}_3(W_3 * \mathrm{relu}(\mathrm{BN}_2(W_2 *
              \mathrm{relu}(\mathrm{BN}_1(W_1 * x))))) + s(x))

    (N, C, H, W) to (N, 4 · planes, ⌈H/stride⌉, ⌈W/stride⌉). arXiv 1512.03385, figure 5, right;
    with groups, Xie et al. (arXiv 1611.05431), figure 3c; wider, Zagoruyko and Komodakis
    (arXiv 1605.07146).

    Args:
        in_channels: C.
        planes: a quarter of the output's channels.
        stride: of the block.
        shortcut: "A", "B" or "C"; see :func:`~resnet_fused.models.shortcut.make_shortcut`.
        stride_in: the convolution with the stride: "3x3" as torchvision, "1x1" (the first) as the
            paper.
        groups: of the 3x3 convolution.
        group_width: channels per group for 64 planes; in proportion for more.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        *,
        shortcut: str = "B",
        stride_in: str = "3x3",
        groups: int = 1,
        group_width: int = 64,
    ) -> None:
        super().__init__()
        _checks.one_of("stride_in", stride_in, STRIDES_IN)
        width = planes * group_width // 64 * groups
        out_channels = planes * self.expansion
        first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride=first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, second, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make_shortcut(shortcut, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def stage(
    block: BlockBuilder, in_channels: int, planes: int, depth: int, stride: int, expansion: int = 1
) -> nn.Sequential:
    """Return ``depth`` blocks, the first with the stride."""
    first = block(in_channels, planes, stride)
    rest = [block(planes * expansion, planes, 1) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)


def initialise(model: nn.Module) -> None:
    r"""Draw each convolution from :math:`N(0, 2 / (O \cdot KH \cdot KW))`, in place.

    He et al., "Delving Deep into Rectifiers" (arXiv 1502.01852), equation 14. BatchNorm keeps
    torch's γ = 1 and β = 0, linear layers torch's own draw, as in torchvision.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNet(nn.Module):
    """A 7x7 stem, max pooling, four stages of 64 to 512 planes, average pooling and a classifier.

    (N, 3, H, W) to (N, num_classes). Source: arXiv 1512.03385, table 1. The names of the children
    are torchvision's.

    Args:
        block: builds one block from (in_channels, planes, stride).
        depths: blocks in each of the four stages.
        expansion: output channels of a block over its planes.
        num_classes: outputs.
    """

    def __init__(
        self,
        block: BlockBuilder,
        depths: Sequence[int],
        *,
        expansion: int = 1,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        _checks.positive("num_classes", num_classes)
        d1, d2, d3, d4 = depths
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = stage(block, 64, 64, d1, 1, expansion)
        self.layer2 = stage(block, 64 * expansion, 128, d2, 2, expansion)
        self.layer3 = stage(block, 128 * expansion, 256, d3, 2, expansion)
        self.layer4 = stage(block, 256 * expansion, 512, d4, 2, expansion)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * expansion, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def basic_resnet(
    *, depths: Sequence[int], num_classes: int = 1000, shortcut: str = "B"
) -> nn.Module:
    """Return a ResNet of :class:`BasicBlock`."""
    block = partial(BasicBlock, shortcut=shortcut)
    return ResNet(block, depths, num_classes=num_classes)


def bottleneck_resnet(
    *,
    depths: Sequence[int],
    num_classes: int = 1000,
    shortcut: str = "B",
    stride_in: str = "3x3",
    groups: int = 1,
    group_width: int = 64,
) -> nn.Module:
    """Return a ResNet of :class:`Bottleneck`."""
    block = partial(
        Bottleneck, shortcut=shortcut, stride_in=stride_in, groups=groups, group_width=group_width
    )
    return ResNet(block, depths, expansion=Bottleneck.expansion, num_classes=num_classes)
