"""VGG-16 and VGG-19, which the paper compares costs with; torchvision's names and weights.

Simonyan and Zisserman, "Very Deep Convolutional Networks" (arXiv 1409.1556), table 1, D and E.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from resnet_fused.models import _checks

CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five groups of 3x3 convolutions, each ended by max pooling, and three linear layers.

    (N, 3, H, W) to (N, num_classes). Source: arXiv 1409.1556, table 1.

    Args:
        depths: convolutions in each of the five groups.
        num_classes: outputs.
    """

    def __init__(self, depths: Sequence[int], *, num_classes: int = 1000) -> None:
        super().__init__()
        _checks.positive("num_classes", num_classes)
        self.features = nn.Sequential(*_features(depths))
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(CHANNELS[-1] * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, num_classes)."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def _features(depths: Sequence[int]) -> Iterator[nn.Module]:
    in_channels = 3
    for out_channels, depth in zip(CHANNELS, depths, strict=True):
        for _ in range(depth):
            yield nn.Conv2d(in_channels, out_channels, 3, padding=1)
            yield nn.ReLU(inplace=True)
            in_channels = out_channels
        yield nn.MaxPool2d(2)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def vgg(*, depths: Sequence[int], num_classes: int = 1000) -> nn.Module:
    """Return a VGG net with so many convolutions in each group."""
    return VGG(depths, num_classes=num_classes)
