"""How a convolution's gradients are cut: phases of the input's, parts of the weight's; no triton.

The gradient of the input at stride S falls into S phases along each axis: the pixels of one phase
meet the same taps, so that each phase is a convolution of stride 1 and no product is with a zero
that the stride put there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from resnet_fused.backends.triton.cost import arch_of
from resnet_fused.backends.triton.shapes import ITEMSIZE, Config, Problem, power


class Phase(NamedTuple):
    """The pixels first, first + S, ... along one axis of a convolution's input."""

    first: int
    #: How many pixels.
    size: int
    #: How many taps meet them: tap, tap + every, ...
    taps: int
    tap: int
    every: int
    #: The output's pixel that the first pixel meets through the first tap; each further pixel meets
    #: the next one, each further tap the one ``dilation`` before.
    shift: int
    dilation: int

    def leaves(self, extent: int) -> bool:
        """Return whether it meets pixels outside of an output of this extent."""
        earliest = self.shift - (self.taps - 1) * self.dilation
        return earliest < 0 or self.shift + self.size > extent


def phases(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[Phase]:
    """Return the phases of one axis of an input of ``size`` pixels."""
    every = stride // math.gcd(stride, dilation)
    found = []
    for first in range(min(stride, size)):
        taps = [t for t in range(kernel) if (first + padding - t * dilation) % stride == 0]
        tap = taps[0] if taps else 0
        shift = (first + padding - tap * dilation) // stride
        count = math.ceil((size - first) / stride)
        found.append(Phase(first, count, len(taps), tap, every, shift, every * dilation // stride))
    return found


def as_convolution(problem: Problem, vertical: Phase, horizontal: Phase) -> Problem:
    """Return the convolution whose tiles suit a pair of phases: of as many pixels, or nearly."""
    kernel = max(vertical.taps, 1), max(horizontal.taps, 1)
    return dataclasses.replace(
        problem, h=vertical.size, w=horizontal.size, c=max(problem.o, 16), o=problem.c,
        kernel=kernel, stride=(1, 1), padding=(kernel[0] // 2, kernel[1] // 2), dilation=(1, 1),
        residual=False, training=True, gathered=True,
    )  # fmt: skip


#: Blocks of the weight's gradient: a processor gets so many, and a part of the pixels so many steps
#: at least.
_BLOCKS, _STEPS = 4, 8
_MOST_PARTS = 256


def flat(problem: Problem) -> bool:
    """Return whether the weight's gradient has taps and channels as one axis of columns."""
    return problem.taps > 1 and (problem.flat or problem.depthwise)


def columns(problem: Problem) -> int:
    """Return the columns that one tap has, or all of them in a flat kernel."""
    return problem.taps * problem.c if flat(problem) else problem.c


def column_tiles(problem: Problem, block_n: int) -> int:
    """Return how many tiles of columns there are, over all taps."""
    return math.ceil(columns(problem) / block_n) * (1 if flat(problem) else problem.taps)


def weight_config(problem: Problem, precision: str, capability: int) -> Config:
    """Return how to cut the weight's gradient, a product over pixels.

    In the config, m is the output channels, n the input channels of one tap (or the taps' and
    channels' one axis, where channels are few), k the pixels; K is split into parts that
    ``merge_sums_kernel`` adds in order.
    """
    exact = precision == "fp32"
    widest = 64 if exact else 128
    block_m = min(widest, max(16, power(problem.o)))
    block_n = min(widest, max(16, power(columns(problem))))
    block_k = 16 if exact else 128 // ITEMSIZE[precision]
    if flat(problem):  # elements loaded one by one
        block_n, block_k = min(block_n, 64), min(block_k, 32)
    tiles = math.ceil(problem.o / block_m) * column_tiles(problem, block_n) * problem.groups
    steps = math.ceil(problem.m / block_k)
    wanted = min(_BLOCKS * arch_of(capability).processors // tiles, steps // _STEPS, _MOST_PARTS)
    parts = 1 << max(0, wanted.bit_length() - 1)
    warps = 8 if block_m * block_n > 64 * 128 else 4
    return Config(block_m, block_n, block_k, warps, 3, parts)
