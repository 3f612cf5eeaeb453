"""Tile sizes for a convolution and the 1x1 behind it in one kernel: no triton, no GPU.

As :mod:`tiles`; of a config, ``block_n`` is the 1x1's, and the first convolution's channels are all
in one tile.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from resnet_fused.backends.triton.cost import (
    FILL,
    LATENCY,
    arch_of,
    asynchronous,
    flops_per_clock,
)
from resnet_fused.backends.triton.shapes import ITEMSIZE, Config, Problem, power
from resnet_fused.backends.triton.tiles import block_k

MOST_CANDIDATES = 5
#: Channels between the two that a tile holds for 128 pixels beside the 1x1's sums.
MOST_BETWEEN = 128


@dataclass(frozen=True)
class Pair:
    """Two convolutions, the second pointwise; the residual is added behind it."""

    first: Problem
    o: int
    residual: bool

    @staticmethod
    def of(
        x: Sequence[int],
        weight: Sequence[int],
        weight2: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        residual: bool,
    ) -> Pair:
        """Return the pair of a map of shape (N, C, H, W) with two weights, (O, C, KH, KW)."""
        first = Problem.of(x, weight, stride, padding, dilation, 1, residual=False)
        return Pair(first, weight2[0], residual)

    @property
    def block_between(self) -> int:
        """Rows of the first convolution's tile: its channels, to a power of two."""
        return max(16, power(self.first.o))


def declines(pair: Pair) -> str | None:
    """Return why the kernel does not take this pair, or None."""
    if pair.first.flat:
        return f"takes both convolutions in one kernel from 16 channels on, x has {pair.first.c}"
    if pair.first.o > MOST_BETWEEN:
        return (
            f"keeps at most {MOST_BETWEEN} channels between two convolutions on the chip, "
            f"weight has {pair.first.o}"
        )
    return None


def heuristic(pair: Pair, precision: str, capability: int) -> Config:
    """Return the config to use where none was measured: the first of :func:`candidates`."""
    return candidates(pair, precision, capability)[0]


@functools.lru_cache(maxsize=1024)
def candidates(pair: Pair, precision: str, capability: int) -> tuple[Config, ...]:
    """Return the configs worth measuring, those that the model takes for fastest first.

    Args:
        pair: the convolutions; not empty, and not one that :func:`declines`.
        precision: "fp16" or "bf16".
        capability: of the device, such as 90.
    """
    order = {
        # Where the model sees no difference, more stages hide more.
        c: (round(cost(pair, precision, c, capability)), -c.num_stages)
        for c in _legal(pair, precision, capability)
    }
    kept: dict[tuple[int, ...], Config] = {}
    for config in sorted(order, key=order.__getitem__):
        kept.setdefault((config.block_m, config.block_n, config.num_warps), config)
    return tuple(kept.values())[:MOST_CANDIDATES]


def _legal(pair: Pair, precision: str, capability: int) -> Iterator[Config]:
    """Yield every config that fits the device and the pair."""
    arch, k = arch_of(capability), block_k(pair.first, precision)
    most_m, most_n = max(16, power(pair.first.m)), max(16, power(pair.o))
    pixels = [m for m in (32, 64, 128, 256) if m <= most_m] or [most_m]
    channels = [n for n in (64, 128) if n <= most_n] or [most_n]
    for block_m, block_n, num_warps in itertools.product(pixels, channels, (4, 8)):
        # A thread's sums of the larger product: with 64, and all there is beside them, no config
        # for the ResNets spills (Triton 3.7.1, sm_80, sm_90, sm_100); with 128 most do.
        sums = block_m * max(block_n, pair.block_between) // (32 * num_warps)
        if sums > 64 or (num_warps == 8 and sums < 8):
            continue
        for num_stages in (2, 3, 4, 5):
            config = Config(block_m, block_n, k, num_warps, num_stages)
            if num_stages > max(2, pair.first.steps(k) + 1):
                continue
            if shared_bytes(pair, precision, config, capability) <= arch.block_shared:
                yield config


def shared_bytes(pair: Pair, precision: str, config: Config, capability: int) -> int:
    """Return the shared memory that Triton gives a kernel of this config, or a little more."""
    size, between = ITEMSIZE[precision], pair.block_between
    # mma reads registers, filled a stage ahead.
    stages = config.num_stages - (0 if asynchronous(precision, capability) else 1)
    loads = stages * (config.block_m + between) * config.block_k * size
    # The first tile, two blocks of the second weight, sums on their way to rows of pixels, and the
    # residual where it is fetched ahead.
    tiles = (config.block_m + 2 * config.block_n) * between * size
    block = config.block_m * config.block_n
    ahead = block * size if pair.residual and capability >= 100 else 0
    return max(loads, tiles + 4 * block + ahead) + 2048


def occupancy(pair: Pair, precision: str, config: Config, capability: int) -> int:
    """Return how many blocks a multiprocessor holds, by shared memory and registers."""
    shared = shared_bytes(pair, precision, config, capability) + 1024
    threads = 32 * config.num_warps
    sums = config.block_m * max(config.block_n, pair.block_between) // threads
    # The rounded first tile waits in shared memory; beside the sums, addresses and the residual.
    registers = min(255, 2 * sums + 48)
    return max(1, min(arch_of(capability).shared // shared, 65536 // (registers * threads)))


def cost(pair: Pair, precision: str, config: Config, capability: int) -> float:
    """Return the model's clocks: the first convolution's loop, then the 1x1 as it is written.

    As :func:`cost.cost`: blocks beside each other on a multiprocessor share its rates, and one's
    loop hides another's end.
    """
    arch, size, problem = arch_of(capability), ITEMSIZE[precision], pair.first
    m, k, between = config.block_m, config.block_k, pair.block_between
    flops = flops_per_clock(precision, config, capability)
    blocks = math.ceil(problem.m / m)
    together = min(
        occupancy(pair, precision, config, capability), math.ceil(blocks / arch.processors)
    )
    step = together * max(2 * m * between * k / flops, (m + between) * k * size / arch.l2_bytes)
    if asynchronous(precision, capability):
        step *= 1.2  # threads compute addresses
    loop = problem.steps(k) * max(step, LATENCY / (config.num_stages - 1))
    channels = math.ceil(pair.o / config.block_n) * config.block_n
    products = 2 * m * between * channels / flops
    weights = channels * between * size / arch.l2_bytes
    maps = m * pair.o * size * (2 if pair.residual else 1) / arch.dram_bytes
    end = max(together * max(products, weights, maps), channels // config.block_n * LATENCY)
    round_ = max(loop, end) + (min(loop, end) + FILL) / together
    return math.ceil(blocks / (arch.processors * together)) * round_
