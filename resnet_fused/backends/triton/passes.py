"""How a pass over a map, a matrix (pixels, channels), is cut: no triton, no GPU.

By the shape alone, not by the device, as the order of a sum's terms follows from it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from resnet_fused.backends.triton.shapes import power

#: Channels of a block at most: 128 bytes of a row in 16 bits.
_WIDEST = 64
#: Values of a block that passes by, and of one whose statistics are taken.
_PASSING, _STAYING = 2048, 8192
#: A program takes several blocks as long as so many programs are left, several a processor.
_PROGRAMS = 1024
#: Parts that one program merges at most, and values it holds.
MERGED, _MERGED_VALUES = 512, 4096


class Cut(NamedTuple):
    """The blocks of one program."""

    block_m: int
    block_c: int
    #: Blocks one after another.
    steps: int

    def grid(self, pixels: int, channels: int) -> tuple[int, int, int]:
        """Return how many programs cover the map."""
        return (
            math.ceil(pixels / (self.block_m * self.steps)), math.ceil(channels / self.block_c), 1,
        )  # fmt: skip


def passing(pixels: int, channels: int) -> Cut:
    """Return the cut of a pass that computes each value on its own, or sums alone."""
    block_c = min(_WIDEST, power(channels))
    for steps in (8, 4, 2, 1):
        cut = Cut(_PASSING // block_c, block_c, steps)
        if math.prod(cut.grid(pixels, channels)) >= _PROGRAMS:
            break
    return cut


def staying(channels: int) -> Cut:
    """Return the cut of a pass that keeps a block in registers."""
    block_c = min(_WIDEST, power(channels))
    return Cut(_STAYING // block_c, block_c, 1)


def merging(parts: int) -> Cut:
    """Return the cut of one level of a merge, of parts for pixels: up to MERGED become one."""
    block_m = min(MERGED, max(2, power(parts)))
    return Cut(block_m, _MERGED_VALUES // block_m, 1)
