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


def head_config(images: int, classes: int, exact: bool, capability: int) -> HeadConfig:
    """Return the largest tiles that leave no processor idle, or the smallest.

    The fewer images a tile has, the more channels a step, so that a few long steps fill the memory
    pipeline where there is little else to wait for.

    Args:
        images: rows of the product.
        classes: its columns.
        exact: whether products are float32's own, without tensor cores.
        capability: of the device, such as 90.
    """
    block_m = min(64, max(16, power(images)))
    rows = math.ceil(images / block_m)
    enough = arch_of(capability).processors
    sizes = (64, 32, 16)
    filling = (n for n in sizes if rows * math.ceil(classes / n) >= enough)
    block_n = next(filling, sizes[-1])
    return HeadConfig(block_m, block_n, _block_k(block_m, block_n, exact, capability))


def _block_k(block_m: int, block_n: int, exact: bool, capability: int) -> int:
    """Return a step's channels: 16 KiB of float32 on the longer side.

    Exact products on sm_80 take fewer, as Triton 3.9 (3.7.1 does not) reads a step's operands into
    registers before it multiplies: 72 bytes spilled by m64n32k64, 656 by m64n64k64, 8 by
    m32n16k128; none by 16x16, nor by what is returned here, on either version.
    """
    if exact and capability < 90 and block_m * block_n > 256:
        return 2048 // max(block_m, 2 * block_n)
    return 4096 // max(block_m, block_n)


def register_limit(config: HeadConfig, exact: bool) -> int | None:
    """Return the registers that a thread may have at most; None leaves it to ptxas.

    With Triton 3.9 it aims at 80 for m64n16k64 in TF32 on sm_90 and sm_100 and, for 100 classes,
    puts 8 bytes on the stack. These tiles do not fill the device: one block more gains nothing.
    """
    return 128 if config[:2] == (64, 16) and not exact else None
