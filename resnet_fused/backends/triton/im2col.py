"""Convolution by TMA's im2col mode: what it can say, and which tiles are worth measuring.

Gluon has the descriptors from Triton 3.8 on. They say where windows may begin, how far apart, and
how many pixels and channels are read at once; a load names the first window and one tap of it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from resnet_fused.backends.triton import tiles
from resnet_fused.backends.triton.cost import arch_of, cost, shared_bytes
from resnet_fused.backends.triton.shapes import ITEMSIZE, Config, Problem, power

CAPABILITY = 90
#: Each is compiled and timed beside those of :mod:`tiles`.
MOST_CANDIDATES = 2
# What cuTensorMapEncodeIm2col takes of a map of two dimensions (cuda.h), and its loads (PTX ISA):
# signed corners and unsigned taps of 8 bits, steps up to 8, pixels of whole 16 bytes.
_CORNERS = range(-128, 128)
_MOST_TAP = 255
_MOST_STRIDE = 8
_PIXEL_BYTES = 16
#: Bytes of a pixel in one load: the widest swizzle.
_WIDEST = 128
_PRECISIONS = ("bf16", "fp16")


class Windows(NamedTuple):
    """What a descriptor says of where the first taps of windows lie, each (rows, columns)."""

    #: Of the first window, from the map's first pixel.
    lower: tuple[int, int]
    #: Past which none begins, from the map's last pixel.
    upper: tuple[int, int]
    #: From one to the next.
    stride: tuple[int, int]

    @staticmethod
    def of(problem: Problem) -> Windows:
        """Return the windows of a convolution's output pixels."""
        (pad_h, pad_w), (reach_h, reach_w) = problem.padding, _reach(problem)
        return Windows((-pad_h, -pad_w), (pad_h - reach_h, pad_w - reach_w), problem.stride)


def _reach(problem: Problem) -> tuple[int, int]:
    """Return how far a window's last tap is from its first."""
    (kh, kw), (dil_h, dil_w) = problem.kernel, problem.dilation
    return (kh - 1) * dil_h, (kw - 1) * dil_w


@functools.cache
def missing() -> str | None:
    """Return why no Gluon kernel with im2col descriptors can be made here, or None."""
    from resnet_fused.backends.triton import interpreted

    if interpreted():
        return "TRITON_INTERPRET=1 is set, and Gluon has no interpreter"
    try:
        from triton.experimental.gluon.nvidia import hopper
    except ImportError as error:
        return f"the installed triton has no Gluon for Hopper: {error}"
    if hasattr(hopper, "TensorDescriptorIm2Col"):
        return None
    return "the installed triton has no im2col descriptors: 3.8 or later has"


def declines(problem: Problem, precision: str, capability: int) -> str | None:
    """Return why the kernel does not take a convolution, or None.

    Args:
        problem: the convolution.
        precision: "fp16", "bf16", "tf32" or "fp32".
        capability: of the device, such as 90.
    """
    if capability != CAPABILITY:
        return f"runs on sm_{CAPABILITY}, got sm_{capability}"
    if precision not in _PRECISIONS:
        return f"takes bfloat16 and float16, got {precision}"
    if problem.groups > 1:
        return f"takes groups of 1, got {problem.groups}"
    if problem.training:
        return "takes no statistics and normalises no input"
    if problem.pointwise:
        return "leaves a matrix product to tiles that TMA reads as they are"
    for name, channels in (("input", problem.c), ("output", problem.o)):
        if channels * ITEMSIZE[precision] % _PIXEL_BYTES:
            return f"takes {name} pixels of whole 16 bytes, got {channels} channels"
    if problem.m + max(_SIDES) >= 2**31:
        return f"counts output pixels in 32 bits, got {problem.m}"
    return _declines_windows(problem)


def _declines_windows(problem: Problem) -> str | None:
    if max(problem.stride) > _MOST_STRIDE:
        return f"takes a stride of {_MOST_STRIDE} at most, got {problem.stride}"
    windows = Windows.of(problem)
    for corner in (*windows.lower, *windows.upper):
        if corner not in _CORNERS:
            return f"takes first and last windows within 128 pixels of a map's ends, got {corner}"
    if (reach := max(_reach(problem))) > _MOST_TAP:
        return f"takes taps {_MOST_TAP} pixels from the first at most, got {reach}"
    return None


@functools.lru_cache(maxsize=4096)
def candidates(problem: Problem, precision: str, capability: int) -> tuple[Config, ...]:
    """Return the configs worth measuring, those that the model takes for fastest first.

    Of every cut the deepest pipeline that fits. Nothing is used unmeasured: no GPU has run it.

    Args:
        problem: the convolution; not empty.
        precision: "fp16", "bf16", "tf32" or "fp32".
        capability: of the device, such as 90.
    """
    if declines(problem, precision, capability):
        return ()
    legal = _legal(problem, precision)
    order = sorted(legal, key=lambda c: (round(cost(problem, precision, c, capability)), str(c)))
    return tuple(order[:MOST_CANDIDATES])


def candidates_here(problem: Problem, precision: str, capability: int) -> tuple[Config, ...]:
    """Return :func:`candidates`, none where the installed Triton cannot make their kernel."""
    return () if missing() else candidates(problem, precision, capability)


def beside_tiles(problem: Problem, precision: str, capability: int) -> tuple[Config, ...]:
    """Return what `tune` times and `inspect --all` shows: the tiles', then those of this mode."""
    key = problem, precision, capability
    return (*tiles.candidates(*key), *candidates_here(*key))


_SIDES = (32, 64, 128, 256)


def _legal(problem: Problem, precision: str) -> Iterator[Config]:
    k, most = block_k(problem, precision), arch_of(CAPABILITY).block_shared
    for block_m, block_n, warps in itertools.product(_SIDES, _SIDES[1:], (4, 8)):
        sums = block_m * block_n // (32 * warps)
        if block_m > max(32, power(problem.m)) or block_n > max(64, power(problem.o)):
            continue
        if not 16 <= sums <= 128:  # a thread's registers hold no more; fewer starve a warp
            continue
        for stages in (6, 5, 4, 3):
            config = Config(block_m, block_n, k, warps, stages, tma=True, im2col=True)
            if stages > max(3, problem.steps(k)):
                continue
            if shared_bytes(problem, precision, config, CAPABILITY) <= most:
                yield config
                break


def block_k(problem: Problem, precision: str) -> int:
    """Return a step's channels: the widest swizzle, or the power of two that covers fewer."""
    return min(_WIDEST // ITEMSIZE[precision], max(16, power(problem.c)))
