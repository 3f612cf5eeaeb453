"""What is computed and how it is cut: a convolution, and the sizes of its tiles."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from resnet_fused.backends._sizes import output_size

#: Bytes of an element in each precision; "tf32" is float32 multiplied on tensor cores.
ITEMSIZE = {"fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4}
#: With fewer input channels per group, K runs over (tap, channel) as one axis.
FLAT_BELOW = 16


@dataclass(frozen=True)
class Problem:
    """A convolution as the kernels see it; ``c`` and ``o`` count the channels of one group."""

    n: int
    h: int
    w: int
    c: int
    o: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    residual: bool = False
    #: Whether statistics are taken of a tile, or its input is normalised: by blocks that sum all of
    #: K.
    training: bool = False
    #: Whether its input has to pass through registers, gathered by pointer: normalised on its way,
    #: or the pixels of a gradient's phase.
    gathered: bool = False

    @staticmethod
    def of(
        x: Sequence[int],
        weight: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        residual: bool,
    ) -> Problem:
        """Return the convolution of a map of shape (N, C, H, W) with (O, C/groups, KH, KW)."""
        kernel, stride, padding, dilation = (
            (int(a), int(b)) for a, b in (weight[2:], stride, padding, dilation)
        )
        n, _, h, w = x
        out, c = weight[0] // groups, weight[1]
        return Problem(n, h, w, c, out, kernel, stride, padding, dilation, groups, residual)

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        return output_size((self.h, self.w), self.kernel, self.stride, self.padding, self.dilation)

    @property
    def m(self) -> int:
        """Output pixels."""
        return self.n * math.prod(self.out_size)

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return math.prod(self.kernel)

    @property
    def pointwise(self) -> bool:
        """Whether it is a plain matrix product."""
        return self.taps == 1 and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def depthwise(self) -> bool:
        """Whether every group has one input channel."""
        return self.c == 1 and self.groups > 1

    @property
    def flat(self) -> bool:
        """Whether K runs over (tap, channel) as one axis."""
        return self.c < FLAT_BELOW and not self.depthwise

    def steps(self, block_k: int) -> int:
        """Return how many blocks of K there are."""
        if self.depthwise:
            return self.taps
        if self.flat:
            return math.ceil(self.taps * self.c / block_k)
        return self.taps * math.ceil(self.c / block_k)


_PATTERN = re.compile(r"m(\d+)n(\d+)k(\d+)w(\d+)s(\d+)x(\d+)g(\d+)(-tma|-im2col)?")


@dataclass(frozen=True)
class Config:
    """How a convolution is cut; ``str()`` is a stable name that :meth:`parse` reads back."""

    #: Output pixels, output channels and K of one tile and step.
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    #: Parts of K whose sums are added by a second kernel.
    split_k: int = 1
    #: Rows of tiles that are walked together, for L2.
    group_m: int = 8
    #: Tiles fetched by the tensor memory accelerator, by blocks that stay.
    tma: bool = False
    #: Whether it gathers windows in its im2col mode, which is TMA too, and not boxes of the map.
    im2col: bool = False

    def __str__(self) -> str:
        """Return the name, such as m128n64k64w4s3x1g8-tma."""
        fetched = "-im2col" if self.im2col else "-tma" if self.tma else ""
        return (
            f"m{self.block_m}n{self.block_n}k{self.block_k}w{self.num_warps}s{self.num_stages}"
            f"x{self.split_k}g{self.group_m}{fetched}"
        )

    @staticmethod
    def parse(name: str) -> Config:
        """Return the config of this name.

        Raises:
            ValueError: the name is not one.
        """
        match = _PATTERN.fullmatch(name)
        if match is None:
            raise ValueError(
                f"Config.parse: {name!r} is not the name of a config; accepted: such as "
                "m128n64k64w4s3x1g8, with -tma or -im2col behind it or not"
            )
        m, n, k, warps, stages, split, group = map(int, match.groups()[:-1])
        tma, im2col = match[8] is not None, match[8] == "-im2col"
        return Config(m, n, k, warps, stages, split, group, tma, im2col)


@functools.lru_cache(maxsize=4096)
def box(problem: Problem, block_m: int) -> tuple[int, int, int]:
    """Return (images, rows, columns), powers of two with product ``block_m``, of a TMA tile.

    The one that covers the output with the fewest tiles; of those, the most compact.
    """
    if problem.pointwise:
        return 1, 1, block_m
    sizes = [2**i for i in range(block_m.bit_length())]
    boxes = [(block_m // (h * w), h, w) for h in sizes for w in sizes if h * w <= block_m]
    extent = (problem.n, *problem.out_size)

    def order(box: tuple[int, int, int]) -> tuple[int, int, int]:
        tiles = math.prod(math.ceil(e / b) for e, b in zip(extent, box, strict=True))
        return tiles, -box[1] * box[2], abs(box[1] - box[2])

    return min(boxes, key=order)


def row_tiles(problem: Problem, config: Config) -> int:
    """Return how many tiles cover the output's pixels."""
    if config.tma and not config.im2col and not problem.pointwise:
        shape = zip((problem.n, *problem.out_size), box(problem, config.block_m), strict=True)
        return math.prod(math.ceil(extent / size) for extent, size in shape)
    return math.ceil(problem.m / config.block_m)


def count(problem: Problem, config: Config) -> int:
    """Return how many tiles cover the output."""
    columns = math.ceil(problem.o / config.block_n)
    return row_tiles(problem, config) * columns * problem.groups


def power(n: int) -> int:
    """Return the least power of two that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()
