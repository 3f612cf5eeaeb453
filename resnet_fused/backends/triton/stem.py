"""The stem as its kernel sees it: how it is read and cut, and a model of what it costs.

No triton, no GPU.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from resnet_fused.backends._sizes import output_size
from resnet_fused.backends.triton.cost import Arch, arch_of, asynchronous
from resnet_fused.backends.triton.shapes import ITEMSIZE, Problem, power

MOST_CANDIDATES = 8
#: Steps of K whose loads are under way or waited for.
STAGES = 2


class Run(NamedTuple):
    """How the kernel reads a row of taps, in elements."""

    #: Each row of taps is read from a multiple of this on, in loads of as many.
    align: int
    #: Elements read, whole blocks of K; the taps lie within.
    length: int


@dataclass(frozen=True)
class Stem:
    """A convolution of one group and the max pool behind it."""

    conv: Problem
    pool_size: tuple[int, int]
    pool_stride: tuple[int, int]
    pool_padding: tuple[int, int]

    @staticmethod
    def of(
        x: Sequence[int],
        weight: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        *pool: Sequence[int],
    ) -> Stem:
        """Return the stem of a map (N, C, H, W), (O, C, KH, KW) and a pool's size, stride, padding.

        Raises:
            ValueError: ``pool`` is not these three pairs.
        """
        size, step, pad = ((int(a), int(b)) for a, b in pool)
        conv = Problem.of(x, weight, stride, padding, dilation, 1, residual=False)
        return Stem(conv, size, step, pad)

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the pooled output."""
        pool = (self.pool_size, self.pool_stride, self.pool_padding)
        return output_size(self.conv.out_size, *pool)

    @property
    def pairs(self) -> int:
        """Pairs of neighbouring columns of one row of the output, over all images."""
        return self.conv.n * math.ceil(self.out_size[1] / 2)

    @property
    def span(self) -> int:
        """Elements of x from the first to the last tap of a kernel row."""
        conv = self.conv
        return ((conv.kernel[1] - 1) * conv.dilation[1] + 1) * conv.c

    def map_rows(self, band: int) -> int:
        """Return the rows of the map that are computed for ``band`` rows of the output."""
        size, step = self.pool_size[0], self.pool_stride[0]
        handed_on = size - step if step < size <= 2 * step else 0
        return size + (band - 1) * (size - handed_on)

    def run(self, precision: str, block_k: int) -> Run:
        """Return how rows of taps are read: the fewest elements, of those in the widest loads.

        What divides the distance of two pairs of columns, and of two rows, may be the alignment.
        """
        conv, widest = self.conv, 16 // ITEMSIZE[precision]
        pixel = conv.stride[1] * conv.c
        before = self.pool_padding[1] * pixel + conv.padding[1] * conv.c
        width = self.pool_stride[1] + self.pool_size[1]
        runs = []
        for align in (1, 2, 4, 8):
            distances = math.gcd(2 * self.pool_stride[1] * pixel, conv.w * conv.c, widest)
            if distances % align == 0:
                lead = max((j * pixel - before) % align for j in range(width))
                runs.append(Run(align, math.ceil((lead + self.span) / block_k) * block_k))
        return min(runs, key=lambda run: (run.length, -run.align))


_PATTERN = re.compile(r"m(\d+)n(\d+)k(\d+)w(\d+)b(\d+)")


@dataclass(frozen=True)
class StemConfig:
    """How a stem is cut; ``str()`` is a stable name that :meth:`parse` reads back."""

    #: Pairs of output columns, channels, and K of one tile and step.
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    #: Rows of the output that a block walks down.
    band: int

    def __str__(self) -> str:
        """Return the name, such as m32n64k32w4b8."""
        m, n, k = self.block_m, self.block_n, self.block_k
        return f"m{m}n{n}k{k}w{self.num_warps}b{self.band}"

    @staticmethod
    def parse(name: str) -> StemConfig:
        """Return the config of this name.

        Raises:
            ValueError: the name is not one.
        """
        match = _PATTERN.fullmatch(name)
        if match is None:
            raise ValueError(
                f"StemConfig.parse: {name!r} is not the name of a config; accepted: such as "
                "m32n64k32w4b8"
            )
        return StemConfig(*map(int, match.groups()))


def heuristic(stem: Stem, precision: str, capability: int) -> StemConfig:
    """Return the config to use where none was measured: the first of :func:`candidates`."""
    return candidates(stem, precision, capability)[0]


@functools.lru_cache(maxsize=1024)
def candidates(stem: Stem, precision: str, capability: int) -> tuple[StemConfig, ...]:
    """Return the configs worth measuring, those that the model takes for fastest first.

    Args:
        stem: not empty.
        precision: "fp16", "bf16", "tf32" or "fp32".
        capability: of the device, such as 90.
    """
    legal = list(_legal(stem, precision, capability))
    kept: list[StemConfig] = []
    for config in sorted(legal, key=lambda c: cost(stem, precision, c, capability)):
        # Two bands of one tile are enough, to leave room for other tiles.
        alike = [k for k in kept if (k.block_m, k.block_n) == (config.block_m, config.block_n)]
        if len(alike) < 2 and len(kept) < MOST_CANDIDATES:
            kept.append(config)
    return tuple(kept)


def _legal(stem: Stem, precision: str, capability: int) -> Iterator[StemConfig]:
    """Yield every config that fits the device and the problem."""
    block_k, height = _block_k(stem, precision), stem.out_size[0]
    most_m, most_n = max(16, power(stem.pairs)), max(16, power(stem.conv.o))
    # wgmma and tcgen05 take 64 rows at least.
    least_n = min(64, most_n) if asynchronous(precision, capability) else 16
    # Of 16 pairs in TF32 on sm_100 ptxas keeps 16 bytes on the stack (Triton 3.7.1).
    least_m = min(32, most_m) if precision == "tf32" and capability >= 100 else 16
    # A tile of 16 x 16 gives no thread 16 bytes to load.
    least = min(512, most_m * most_n)
    bands = [band for band in (1, 2, 4, 7, 8, 14, 16, 28) if band <= height]
    for block_m, block_n, band in itertools.product((16, 32, 64), (16, 32, 64), bands):
        num_warps = _warps(precision, block_m * block_n)
        if not num_warps or block_m * block_n < least:
            continue
        if least_m <= block_m <= most_m and least_n <= block_n <= most_n:
            yield StemConfig(block_m, block_n, block_k, num_warps, band)


def _warps(precision: str, sums: int) -> int:
    """Return the warps that hold five tiles of so many sums without spilling, 0 if none do.

    From compiling all candidates for ResNet's stem at batch 1, 8 and 256 (Triton 3.7.1): some with
    fewer sums a thread, or with a third stage, keep 8 or 16 bytes on the stack.
    """
    if precision == "fp32":  # operands of products without tensor cores
        return 4 if sums <= 1024 else 0
    return 4 if sums <= 2048 else 8


def _block_k(stem: Stem, precision: str) -> int:
    """Return the larger one that reads no more elements than the smaller."""
    if precision == "fp32":  # Operands of multiply-adds without tensor cores sit in registers.
        return 16
    return min((32, 16), key=lambda block_k: stem.run(precision, block_k).length)


def shared_bytes(precision: str, config: StemConfig) -> int:
    """Return the shared memory that Triton gives the kernel, or a little more."""
    size, sums = ITEMSIZE[precision], 4 * config.block_m * config.block_n
    loads = (config.block_m + config.block_n) * config.block_k * size
    return max((STAGES + 1) * loads, sums) + 1024


def products(stem: Stem, band: int) -> int:
    """Return the multiply-adds that bands of this many rows compute, without filled-up tiles.

    More than the convolution's, as bands and pairs of windows share pixels with their neighbours.
    """
    width = stem.pool_stride[1] + stem.pool_size[1]
    height = stem.out_size[0]
    rows = height // band * stem.map_rows(band)
    if height % band:
        rows += stem.map_rows(height % band)
    return stem.pairs * width * rows * stem.conv.o * stem.conv.taps * stem.conv.c


#: Clocks from a load to its data, and to begin and end a block.
_LATENCY, _FILL = 600, 1000


def cost(stem: Stem, precision: str, config: StemConfig, capability: int) -> float:
    """Return the model's clocks: products, or the instructions around them, or latency."""
    arch, tile = arch_of(capability), config.block_m * config.block_n
    tiles = (
        math.ceil(stem.pairs / config.block_m)
        * math.ceil(stem.out_size[0] / config.band)
        * math.ceil(stem.conv.o / config.block_n)
    )
    together = min(_occupancy(precision, config, arch), math.ceil(tiles / arch.processors))
    run = stem.run(precision, config.block_k)
    steps = stem.conv.kernel[0] * run.length / config.block_k
    flops = arch.fp32_flops if precision == "fp32" else arch.tensor_flops
    multiplied = 2 * tile * config.block_k / flops * (2 if precision == "tf32" else 1)
    # Of 128 lanes: about 4 instructions for a load, 1.5 for an element on its way to the products,
    # 6 for a sum: scale, shift, and two maxima of what is inside.
    gathered = config.block_m * config.block_k * (4 / run.align + 1.5) / 128
    busy = together * (steps * max(multiplied, gathered) + 6 * tile / 128)
    # The next step's loads are under way, but not the next pixel's.
    pixel = max(busy, _LATENCY + busy / together)
    pixels = stem.map_rows(config.band) * (stem.pool_stride[1] + stem.pool_size[1])
    return math.ceil(tiles / (arch.processors * together)) * (pixels * pixel + _FILL)


def _occupancy(precision: str, config: StemConfig, arch: Arch) -> int:
    threads = 32 * config.num_warps
    registers = min(255, 5 * config.block_m * config.block_n // threads + 100)
    shared = shared_bytes(precision, config) + 1024
    return max(1, min(arch.shared // shared, 65536 // (registers * threads)))
