"""How the head is cut: no triton, no GPU."""

from __future__ import annotations

import math
from typing import NamedTuple

from resnet_fused.backends.triton.cost import arch_of
from resnet_fused.backends.triton.shapes import power


class HeadConfig(NamedTuple):
    """Tiles of the linear layer: images, classes, channels of a step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3

    def __str__(self) -> str:
        """Return a name, such as m64n32k64w4s3."""
        m, n, k, warps, stages = self
        return f"m{m}n{n}k{k}w{warps}s{stages}"


def head_config(images: int, classes: int, capability: int) -> HeadConfig:
    """Return the largest tiles that leave no processor idle, or the smallest.

    The fewer images a tile has, the more channels a step, so that a few long steps fill the memory
    pipeline where there is little else to wait for.
    """
    block_m = min(64, max(16, power(images)))
    rows = math.ceil(images / block_m)
    enough = arch_of(capability).processors
    sizes = (64, 32, 16)
    filling = (n for n in sizes if rows * math.ceil(classes / n) >= enough)
    return HeadConfig(block_m, next(filling, sizes[-1]), 4096 // block_m)
