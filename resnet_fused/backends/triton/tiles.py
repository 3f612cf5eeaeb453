"""Tile sizes as a function of (shape, precision, architecture): no triton, no GPU."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from resnet_fused.backends.triton.cost import Arch, arch_of, asynchronous, cost, shared_bytes
from resnet_fused.backends.triton.shapes import ITEMSIZE, Config, Problem, box, count, power

#: Half a second is what one takes to compile: with as many ResNet-50 at one batch size is tuned in
#: less than two minutes (`benchmarks/NOTES.md`).
MOST_CANDIDATES = 8


def heuristic(problem: Problem, precision: str, capability: int) -> Config:
    """Return the config to use where none was measured: the first of :func:`candidates`."""
    return candidates(problem, precision, capability)[0]


def gathering(problem: Problem, precision: str, capability: int) -> Config:
    """Return that config for tiles gathered by pointer, as convolutions of training take them."""
    return heuristic(dataclasses.replace(problem, gathered=True), precision, capability)


@functools.lru_cache(maxsize=4096)
def candidates(problem: Problem, precision: str, capability: int) -> tuple[Config, ...]:
    """Return the configs worth measuring, those that the model takes for fastest first.

    Args:
        problem: the convolution; not empty.
        precision: "fp16", "bf16", "tf32" or "fp32".
        capability: of the device, such as 90.
    """
    if problem.depthwise:
        return tuple(_depthwise(problem, precision))
    order = {
        # Where the model sees no difference, more stages hide more.
        c: (round(cost(problem, precision, c, capability)), -c.num_stages)
        for c in _legal(problem, precision, capability)
    }
    kept: list[Config] = []
    for config in sorted(order, key=order.__getitem__):
        # Stages and splits of one tile: two are enough of each, to leave room for other tiles.
        alike = [k for k in kept if _tile(k) == _tile(config)]
        if len(alike) < 2 and len(kept) < MOST_CANDIDATES:
            kept.append(config)
    kept = _with_split(kept, order, count(problem, kept[0]) < arch_of(capability).processors)
    return tuple(kept)


def _with_split(
    kept: list[Config], order: dict[Config, tuple[int, int]], idle: bool
) -> list[Config]:
    """Return ``kept``, with K in parts in one of them if its first leaves processors idle.

    The model takes parts for faster where there are few tiles: ResNet's 3x3 of 512 channels on 7x7
    maps in bfloat16 at batch 1 on sm_80 (8 tiles for 108 processors), to 16 on sm_90 and 32 on
    sm_100. Beyond, 98 to 112 tiles leave up to a third of them idle, at batch 128 on sm_90 still
    (98 of 132), and parts, of tiles without TMA, take 1.04 to 1.6 times its clocks: that is for
    measuring to say. At batch 256 tiles fill each of these, 196 for 108 and 392 for 132 or 148.
    """
    if not idle or any(config.split_k > 1 for config in kept):
        return kept
    split = min((c for c in order if c.split_k > 1), key=order.__getitem__, default=None)
    if split is None:
        return kept
    return sorted([*kept[: MOST_CANDIDATES - 1], split], key=order.__getitem__)


def _tile(config: Config) -> tuple[int, int, int, bool]:
    return config.block_m, config.block_n, config.num_warps, config.tma


def _depthwise(problem: Problem, precision: str) -> Iterator[Config]:
    widest = min(64, max(16, power(problem.o * problem.groups)))
    for block_n in dict.fromkeys((widest, max(16, widest // 2))):
        for pixels in (64, 32, 128):
            config = Config(pixels, block_n, 1, 4, 1)
            # With several outputs of a channel ptxas aimed at 40 registers for fewer sums a thread,
            # and spilled 8 bytes: float16 on sm_100.
            few = problem.o > 1 and pixels * block_n < 2048
            if _loads_fit(problem, precision, config) and not few:
                yield config


def _legal(problem: Problem, precision: str, capability: int) -> Iterator[Config]:
    """Yield every config that fits the device and the problem."""
    arch, k = arch_of(capability), block_k(problem, precision)
    for block_m, block_n in itertools.product(_SIDES, _SIDES):
        if not _fits(problem, precision, capability, block_m, block_n):
            continue
        for num_warps, num_stages, tma in itertools.product((4, 8), (2, 3, 4, 5), (False, True)):
            config = Config(block_m, block_n, k, num_warps, num_stages, tma=tma)
            if num_stages > max(2, problem.steps(k) + 1):
                continue
            if not _fits_registers(problem, precision, config, capability):
                continue
            if not _loads_wide(problem, precision, config):
                continue
            if tma and not takes_tma(problem, precision, config, capability):
                continue
            if shared_bytes(problem, precision, config, capability) <= arch.block_shared:
                yield config
                if not _parts_spill(precision, config, capability):
                    yield from _splits(problem, config, arch)


def at_once(problem: Problem, precision: str) -> int:
    """Return how many channels one load can fetch: 16 bytes, or less where pixels are unaligned."""
    channels = problem.o * problem.groups if problem.depthwise else problem.c
    return min(16 // ITEMSIZE[precision], channels & -channels)


def _loads_fit(problem: Problem, precision: str, config: Config) -> bool:
    """Return whether a thread's loads of a step are few; they are where they are of 16 bytes.

    Each takes registers for an address and a mask. Without this, of 700 configs for channels such
    as 17, 37, 63 and 130 that Triton 3.7.1 compiled, 59 put up to 2,600 bytes on the stack.
    """
    width, threads = at_once(problem, precision), 32 * config.num_warps
    size = width * ITEMSIZE[precision]
    if problem.flat:  # elements loaded one by one
        return config.block_m * config.block_k <= (8 if precision == "fp32" else 16) * threads
    if size == 16 or (tile := config.block_m * config.block_n) <= 1024:  # none is smaller
        return True
    if problem.depthwise:
        return tile <= 16 * threads * width
    most = 5 if precision == "fp32" else 8 if size < 8 else 16
    return (config.block_m + config.block_n) * config.block_k <= most * threads * width


def _loads_wide(problem: Problem, precision: str, config: Config) -> bool:
    """Return whether a thread has 16 bytes of either operand to load, if the problem has so many.

    In a flat problem every pixel is loaded by itself, and where 16 bytes do not divide a pixel its
    parts are.
    With 4 channels a group, as in ResNeXt-50 32x4d's first stage, a load of the input is of 8 bytes
    in 16 bits: all that the group has of a pixel. Its weights, 16 rows of which 4 are filled, are
    256 elements a step for 128 threads, so 4 bytes for each, in one load of three to five: 288 of
    4,900 bytes that a tile of 64 pixels fetches. Several groups in one tile, the weights zero
    beside the diagonal, would be read 16 bytes at a time, but carry NaN and infinity (times zero)
    from one group into the next, where torch has none.
    """
    side = min(config.block_m, config.block_n)
    enough = side * config.block_k * ITEMSIZE[precision] >= 16 * 32 * config.num_warps
    narrow = problem.flat or at_once(problem, precision) * ITEMSIZE[precision] < 16
    return enough or narrow or side == max(16, power(min(problem.m, problem.o)))


_SIDES = (16, 32, 64, 128, 256)


def _fits(problem: Problem, precision: str, capability: int, block_m: int, block_n: int) -> bool:
    """Return whether a tile is no larger than the problem and of a shape the device is good at."""
    most_m, most_n = max(16, power(problem.m)), max(16, power(problem.o))
    if block_m > most_m or block_n > most_n or block_m * block_n < min(1024, most_m * most_n):
        return False
    if precision == "fp32":
        return max(block_m, block_n) <= 4 * min(block_m, block_n)
    # wgmma and tcgen05 take 64 rows at least.
    return block_n >= min(64, most_n) or not asynchronous(precision, capability)


def block_k(problem: Problem, precision: str) -> int:
    """Return 128 bytes of channels, the widest swizzle, or fewer where there are fewer."""
    if precision == "fp32":  # Operands of multiply-adds without tensor cores sit in registers.
        return 16
    widest = 128 // ITEMSIZE[precision]
    if not problem.flat and at_once(problem, precision) * ITEMSIZE[precision] < 8:
        return 16  # as few loads a step as can be
    if problem.flat:  # the one that leaves less of the last block unused
        return min((32, 16), key=lambda k: problem.steps(k) * k)
    if problem.c % widest == 0 or problem.taps == 1:
        return min(widest, max(16, power(problem.c)))
    divides = [k for k in (32, 16) if k < widest and problem.c % k == 0]
    return divides[0] if divides else min(widest, power(problem.c))


def _fits_registers(problem: Problem, precision: str, config: Config, capability: int) -> bool:
    """Return whether a thread's sums and what it loads leave nothing to spill.

    The limits are from compiling every candidate for ResNet-50's convolutions: Triton 3.7.1,
    `resnet-fused inspect -m resnet50 --all`.
    """
    threads = 32 * config.num_warps
    sums = config.block_m * config.block_n / threads
    if not _loads_fit(problem, precision, config):
        return False
    narrow = asynchronous(precision, capability) and config.block_n < 64
    if config.num_warps == 8 and sums < (16 if narrow else 8):
        return False
    if problem.training and sums > _most_sums_in_training(config):
        return False  # addresses, masks and what the statistics take
    if problem.training and problem.taps > 1 and max(problem.c, problem.o) <= 64:
        tile = (config.block_m, config.block_n, config.num_warps)
        if capability < 90 and tile in ((128, 64, 8), (64, 64, 4)):
            return False  # 8 bytes on the stack in 16 bits, under any limit of registers
    beside = problem.residual and not config.tma
    if beside and problem.o * ITEMSIZE[precision] % 16 and sums > 64:
        return False  # a residual loaded one or two elements at a time
    if config.block_m > threads and not config.tma:
        return False  # addresses and masks of more than one row a thread
    cut = (config.block_m, config.block_n, config.num_warps, config.num_stages)
    if beside and problem.taps == 1 and cut == (64, 64, 4, 2):
        return False  # ptxas puts 8 bytes on the stack, to fit one more block beside it
    if (
        precision == "tf32"
        and 100 <= capability < 120
        and cut == (64, 128, 4, 5)
        and not config.tma
    ):
        return False  # likewise with K in parts: ResNet-50's 3x3 at batch 1
    if precision == "fp32":
        return sums <= 32  # operands of products without tensor cores
    if not asynchronous(precision, capability) or (narrow and not config.tma):
        # By mma, as are products of fewer than 64 channels everywhere: its operands and the
        # addresses of taps leave room for few sums a thread.
        rounds = precision == "tf32"  # in registers of its own
        wide = config.block_n == 256 and (config.num_warps == 8 or problem.taps == 1)
        most = 128 if wide and not beside and not rounds else 64
        return sums <= most and (not problem.training or config.block_m <= threads // 2)
    # Operands in TF32 pass through registers, to be rounded, unless descriptors round them.
    return sums <= (64 if precision == "tf32" and not config.tma else 128)


def _most_sums_in_training(config: Config) -> int:
    """Return how many sums of a thread leave room for statistics, or for what is gathered."""
    return 128 if config.tma and config.block_m <= 128 else 64


def _parts_spill(precision: str, config: Config, capability: int) -> bool:
    """Return whether K in parts spills under any limit of registers, as float32 did on sm_90."""
    cut = (config.block_m, config.block_n, config.num_warps)
    return precision == "fp32" and 90 <= capability < 100 and cut == (128, 32, 4)


def register_limit(problem: Problem, precision: str, config: Config, capability: int) -> int | None:
    """Return the registers that a thread may have at most; None leaves it to ptxas.

    It may aim at 40, 80, 96, 128 or 168, to fit one more block on a multiprocessor, and put 8 to 24
    bytes on the stack for that. A limit keeps it from aiming. With K in parts that costs nothing:
    there are two blocks for a processor at most, and room for both. Others take up to 16 more
    registers then, which may cost a block, unmeasured on a GPU. Which kernels it does so with is
    from compiling them with Triton 3.7.1: in float32 on tiles of 32 pixels, with narrow loads and,
    from sm_90, with up to 16 sums a thread; of depthwise ones in bfloat16 on sm_100, 30 of 165.
    """
    sums = config.block_m * config.block_n // (32 * config.num_warps)
    if problem.depthwise:
        aims = precision == "bf16" and 100 <= capability < 120
        return {16: 128, 32: 168}.get(sums) if aims else None
    if problem.training:
        return None
    if precision != "fp32":
        return 255 if config.split_k > 1 else None
    most = 168 if capability < 90 and config.block_m > 32 and sums > 16 else 128
    if problem.flat:  # a stem's three channels take what they do without aiming, up to 224
        return most if at_once(problem, precision) > 1 else None
    if at_once(problem, precision) < 4:
        return 255
    if config.split_k > 1 or config.block_m == 32:
        return most
    return 128 if 90 <= capability < 120 and sums <= 16 else None


def _splits(problem: Problem, config: Config, arch: Arch) -> Iterator[Config]:
    if config.tma or problem.training:
        return
    tiles, steps = count(problem, config), problem.steps(config.block_k)
    for split_k in (2, 4, 8, 16):
        # As long as processors are idle and a part is long enough to fill its pipeline.
        if tiles * split_k <= 2 * arch.processors and steps >= 4 * split_k:
            yield Config(
                config.block_m, config.block_n, config.block_k, config.num_warps,
                config.num_stages, split_k,
            )  # fmt: skip


def takes_tma(problem: Problem, precision: str, config: Config, capability: int) -> bool:
    """Return whether descriptors can say this problem: rows of 16 bytes, one stride, no groups."""
    size, stride = ITEMSIZE[precision], problem.stride[0]
    if capability < 90 or problem.groups > 1 or problem.flat or precision == "fp32":
        return False
    if problem.gathered or (problem.training and not _covered(problem, config, capability)):
        return False
    if problem.c * size % 16 or problem.o * size % 16 or config.split_k > 1:
        return False
    if problem.stride[1] != stride or problem.h % stride or problem.w % stride:
        return False
    if problem.m + config.block_m >= 2**31:
        return False  # coordinates have 32 bits
    # A block of channels that runs over the end meets zeros only where nothing lies behind it.
    whole = problem.c % config.block_k == 0
    return whole or (problem.taps == 1 and stride == 1)


def _covered(problem: Problem, config: Config, capability: int) -> bool:
    """Return whether no box reaches beyond the output, so that no statistics need a mask.

    A mask took 59 registers: 222 in place of 163 for 128x64 on 4 warps (Triton 3.7.1, sm_90). For
    sm_100 that Triton does not compile some of these kernels, and spills others' registers.
    """
    if not 90 <= capability < 100:
        return False
    if problem.pointwise:
        return problem.m % config.block_m == 0
    sides = zip((problem.n, *problem.out_size), box(problem, config.block_m), strict=True)
    return all(extent % size == 0 for extent, size in sides)
