"""The paper's CIFAR-10 networks: 6n + 2 layers of 16, 32 and 64 filters, section 4.2."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from resnet_fused.models import _checks
from resnet_fused.models.plain import PlainBlock
from resnet_fused.models.resnet import BasicBlock, BlockBuilder, conv3x3, initialise, stage


class CifarResNet(nn.Module):
    """A 3x3 stem, three stages of n blocks with 16, 32, 64 filters, pooling and a classifier.

    (N, 3, H, W), H = W = 32 in the paper, to (N, num_classes). arXiv 1512.03385, section 4.2.

    Args:
        block: builds one block from (in_channels, planes, stride).
        depth: n, the blocks of each stage; the net has 6n + 2 layers.
        num_classes: outputs.
    """

    def __init__(self, block: BlockBuilder, depth: int, *, num_classes: int = 10) -> None:
        super().__init__()
        _checks.positive("num_classes", num_classes)
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(block, 16, 16, depth, 1)
        self.layer2 = stage(block, 16, 32, depth, 2)
        self.layer3 = stage(block, 32, 64, depth, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def cifar_resnet(*, depth: int, num_classes: int = 10, shortcut: str = "A") -> nn.Module:
    """Return the residual net of 6 · depth + 2 layers; identity shortcuts, as in the paper."""
    return CifarResNet(partial(BasicBlock, shortcut=shortcut), depth, num_classes=num_classes)


def cifar_plain(*, depth: int, num_classes: int = 10) -> nn.Module:
    """Return the plain net of 6 · depth + 2 layers."""
    return CifarResNet(PlainBlock, depth, num_classes=num_classes)
