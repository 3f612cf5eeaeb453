"""Tile sizes as a function of (shape, precision, architecture): no triton, no GPU."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

from resnet_fused.backends.triton.cost import Arch, arch_of, asynchronous, cost, shared_bytes
from resnet_fused.backends.triton.shapes import ITEMSIZE, Config, Problem, count, power

#: Half a second is what one takes to compile: with as many ResNet-50 at one batch size is tuned in
#: less than two minutes (`benchmarks/NOTES.md`).
MOST_CANDIDATES = 8


def heuristic(problem: Problem, precision: str, capability: int) -> Config:
    """Return the config to use where none was measured: the first of :func:`candidates`."""
    return candidates(problem, precision, capability)[0]


@functools.lru_cache(maxsize=4096)
def candidates(problem: Problem, precision: str, capability: int) -> tuple[Config, ...]:
    """Return the configs worth measuring, those that the model takes for fastest first.

    Args:
        problem: the convolution; not empty.
        precision: "fp16", "bf16", "tf32" or "fp32".
        capability: of the device, such as 90.
    """
    if problem.depthwise:
        return tuple(_depthwise(problem))
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
    return tuple(kept)


def _tile(config: Config) -> tuple[int, int, int, bool]:
    return config.block_m, config.block_n, config.num_warps, config.tma


def _depthwise(problem: Problem) -> Iterator[Config]:
    widest = min(64, max(16, power(problem.o * problem.groups)))
    for block_n in dict.fromkeys((widest, max(16, widest // 2))):
        for pixels in (64, 32, 128):
            yield Config(pixels, block_n, 1, 4, 1)


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
                yield from _splits(problem, config, arch)


def _loads_wide(problem: Problem, precision: str, config: Config) -> bool:
    """Return whether a thread has 16 bytes of either operand to load, if the problem has so many.

    In a flat problem every pixel is loaded by itself.
    """
    side = min(config.block_m, config.block_n)
    enough = side * config.block_k * ITEMSIZE[precision] >= 16 * 32 * config.num_warps
    return enough or problem.flat or side == max(16, power(min(problem.m, problem.o)))


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
    if problem.flat and config.block_m * config.block_k > 16 * threads:
        return False  # elements loaded one by one
    if config.num_warps == 8 and sums < 8:
        return False
    if problem.training and sums > 64:
        return False  # addresses, masks and what the statistics take
    beside = problem.residual and not config.tma
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
    if not asynchronous(precision, capability):
        # Operands of mma and a row's addresses and masks leave room for few pixels a thread.
        rounds = precision == "tf32"  # in registers of its own
        most = 128 if config.block_n == 256 and not beside and not rounds else 64
        rows = threads // 2 if problem.training else threads
        return sums <= most and config.block_m <= rows
    # Operands in TF32 pass through registers, to be rounded, unless descriptors round them.
    return sums <= (64 if precision == "tf32" and not config.tma else 128)


def register_limit(problem: Problem, precision: str, config: Config, capability: int) -> int | None:
    """Return the registers that a thread may have at most; None leaves it to ptxas.

    It may aim at 48, 80, 96 or 128, to fit one more block on a multiprocessor, and put 8 or 16
    bytes on the stack for that. A limit keeps it from aiming: some take up to 16 more registers
    then, which may cost a block, unmeasured on a GPU. Which kernels it does so with is from
    compiling them with Triton 3.7.1: in float32 on sm_90, 55 of 964 configs of ResNet-34's and
    -50's convolutions, all with K in parts or 16 sums a thread; of depthwise ones in bfloat16 on
    sm_100, 30 of 165. With the limit none of all these spills.
    """
    sums = config.block_m * config.block_n // (32 * config.num_warps)
    if problem.depthwise:
        aims = precision == "bf16" and 100 <= capability < 120
        return {16: 128, 32: 168}.get(sums) if aims else None
    if precision != "fp32" or not 90 <= capability < 100:
        return None
    if problem.training or problem.flat:  # a stem's addresses take up to 156, and none spills
        return None
    # Tiles of 32 pixels take 128 at most, and spilled where they are not full of channels.
    return 128 if config.split_k > 1 or sums <= 16 or config.block_m == 32 else None


def _splits(problem: Problem, config: Config, arch: Arch) -> Iterator[Config]:
    yield config
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
    if problem.training:
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
