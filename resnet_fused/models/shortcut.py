"""The shortcuts of a residual block: options A, B and C of He et al., section 4.1."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.models import _checks

SHORTCUTS = ("A", "B", "C")


class PaddedShortcut(nn.Module):
    r"""Every ``stride``-th pixel, with zeros for the channels that are new: no parameters.

    .. math:: y_{n,c,i,j} = x_{n,c,si,sj} \text{ for } c < C, \quad 0 \text{ for } C \le c < O

    (N, C, H, W) to (N, O, ⌈H/s⌉, ⌈W/s⌉). Option A of arXiv 1512.03385, sections 3.3 and 4.1.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the subsampled, zero-padded ``x``."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))

    def extra_repr(self) -> str:
        """Return the two settings."""
        return f"stride={self.stride}, new_channels={self.new_channels}"


def make_shortcut(
    option: str, in_channels: int, out_channels: int, stride: int
) -> nn.Module | None:
    """Return what stands on the shortcut of a block, None for the plain identity.

    Where a block changes the shape, option A pads with zeros and options B and C project with a
    strided 1x1 convolution and BatchNorm (equation 2); elsewhere only option C projects.
    Source: arXiv 1512.03385, section 4.1.

    Args:
        option: "A", "B" or "C".
        in_channels: of the block's input.
        out_channels: of the block's output.
        stride: of the block.

    Raises:
        ValueError: the option is another.
    """
    _checks.one_of("shortcut", option, SHORTCUTS)
    changes_shape = stride != 1 or in_channels != out_channels
    if not changes_shape and option != "C":
        return None
    if option == "A":
        return PaddedShortcut(in_channels, out_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )
