"""A model of a convolution's time on a GPU, from the public figures of the devices.

It says which few configs are worth measuring; which of them is fastest, only measuring.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from resnet_fused.backends.triton.shapes import ITEMSIZE, Config, Problem, count


class Arch(NamedTuple):
    """A GPU as the model sees it; rates per clock and multiprocessor, from NVIDIA's data sheets."""

    processors: int
    #: Floating point operations: 16-bit tensor cores, and float32 without them.
    tensor_flops: int
    fp32_flops: int
    l2_bytes: int
    dram_bytes: int
    #: Shared memory of one block, and of a multiprocessor.
    block_shared: int
    shared: int


#: By compute capability; one that is not listed is taken for the next lower.
ARCHS = {
    80: Arch(108, 2048, 128, 47, 13, 166912, 167936),
    86: Arch(84, 1024, 256, 40, 6, 101376, 102400),
    90: Arch(132, 4096, 256, 39, 14, 232448, 233472),
    100: Arch(148, 8192, 256, 60, 29, 232448, 233472),
    120: Arch(170, 1024, 256, 40, 5, 101376, 102400),
}


def arch_of(capability: int) -> Arch:
    """Return the figures for a compute capability of 80 or more, such as 90."""
    return ARCHS[max(known for known in ARCHS if known <= capability)]


def asynchronous(precision: str, capability: int) -> bool:
    """Return whether products are wgmma or tcgen05, which read shared memory on their own."""
    return 90 <= capability < 120 and precision != "fp32"


def shared_bytes(problem: Problem, precision: str, config: Config, capability: int) -> int:
    """Return the shared memory that Triton gives a kernel of this config, or a little more."""
    size = ITEMSIZE[precision]
    block = config.block_m * config.block_n
    loads = (config.block_m + config.block_n) * config.block_k * size
    if config.tma:  # beside the stages: the output's tile, the residual's, barriers
        ends = 2 if problem.residual and not config.im2col else 1
        return config.num_stages * loads + ends * block * size + 4096
    # mma reads registers, filled a stage ahead.
    if problem.training:  # the input's scale and shift
        loads += 2 * 4 * config.block_k
    stages = config.num_stages - (0 if asynchronous(precision, capability) else 1)
    staged = stages * loads
    if problem.training and not asynchronous(precision, capability):  # once more, normalised
        staged += config.block_m * config.block_k * size
    return max(staged, 4 * block) + 1024  # sums are transposed in float32


def occupancy(problem: Problem, precision: str, config: Config, capability: int) -> int:
    """Return how many blocks a multiprocessor holds, by shared memory and registers."""
    shared = shared_bytes(problem, precision, config, capability) + 1024
    threads = 32 * config.num_warps
    # Beside the sums: addresses, masks and fragments.
    registers = min(255, config.block_m * config.block_n // threads + 80)
    return max(1, min(arch_of(capability).shared // shared, 65536 // (registers * threads)))


#: Clocks from a block's start to its first products, from a load to its data, of a second kernel.
FILL, LATENCY, LAUNCH = 1000, 700, 3000


def cost(problem: Problem, precision: str, config: Config, capability: int) -> float:
    """Return the model's clocks: tensor cores, L2 or latency in the loop, memory behind it.

    Blocks beside each other on a multiprocessor share its rates and hide each other's ends; one
    that stays for many tiles hides its own.
    """
    arch, size = arch_of(capability), ITEMSIZE[precision]
    m, n, k = config.block_m, config.block_n, config.block_k
    blocks = count(problem, config) * config.split_k
    together = min(
        occupancy(problem, precision, config, capability), math.ceil(blocks / arch.processors)
    )
    products = 2 * m * n * k / flops_per_clock(precision, config, capability)
    gathers = m * k / 16 if problem.flat else 0  # a load instruction for each
    step = together * max(products, gathers, (m + n) * k * size / arch.l2_bytes)
    if asynchronous(precision, capability) and not config.tma:
        step *= 1.2  # threads compute addresses
    step = max(step, LATENCY / (config.num_stages - 1))
    loop = math.ceil(problem.steps(k) / config.split_k) * step
    end_size = 4 if config.split_k > 1 else size * (2 if problem.residual else 1)
    end = together * m * n * end_size / arch.dram_bytes
    round_ = max(loop, end) + (min(loop, end) + FILL) / (together + config.tma)
    clocks = math.ceil(blocks / (arch.processors * together)) * round_
    if config.split_k > 1:
        moved = problem.m * problem.o * problem.groups * (4 * config.split_k + size)
        clocks += LAUNCH + moved / (arch.dram_bytes * arch.processors)
    return clocks


def flops_per_clock(precision: str, config: Config, capability: int) -> float:
    """Return floating point operations per clock and multiprocessor."""
    arch = arch_of(capability)
    flops = float(arch.fp32_flops if precision == "fp32" else arch.tensor_flops)
    if precision == "tf32":
        flops /= 2
    if asynchronous(precision, capability):
        return flops / (2 if config.block_n < 64 else 1)  # mma instead
    # Products from registers: the smaller a warp's part, the more often it reads shared memory.
    side = math.sqrt(config.block_m * config.block_n / config.num_warps)
    return flops * min(1.0, side / (45 if precision == "fp32" else 32))
