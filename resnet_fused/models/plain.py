"""The paper's plain networks: the same layers under the same names, without shortcuts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from resnet_fused.models.resnet import ResNet, conv3x3


class PlainBlock(nn.Module):
    r"""Two 3x3 convolutions and no shortcut.

    .. math:: y = \mathrm{relu}(\mathrm{BN}_2(W_2 * \mathrm{relu}(\mathrm{BN}_1(W_1 * x))))

    (N, C, H, W) to (N, planes, ⌈H/stride⌉, ⌈W/stride⌉). arXiv 1512.03385, section 3.3.
    """

    def __init__(self, in_channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


def plain_net(*, depths: Sequence[int], num_classes: int = 1000) -> nn.Module:
    """Return an ImageNet net of :class:`PlainBlock`; arXiv 1512.03385, figure 3, middle."""
    return ResNet(PlainBlock, depths, num_classes=num_classes)
