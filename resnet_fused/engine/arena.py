"""Placing buffers in one block of memory, so that those never alive together share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 64


@dataclass(eq=False)
class Buffer:
    """A span of bytes that must hold from step ``first`` to step ``last``, both included."""

    nbytes: int
    first: int
    last: int
    offset: int = -1

    def meets(self, other: Buffer) -> bool:
        """Return whether both are alive at some step."""
        return self.first <= other.last and other.first <= self.last


def place(buffers: list[Buffer]) -> int:
    """Give every buffer an offset, the largest first, each at the lowest free place.

    Returns:
        The bytes the block needs.
    """
    placed: list[Buffer] = []
    total = 0
    for buffer in sorted(buffers, key=lambda b: -b.nbytes):
        size = _aligned(buffer.nbytes)
        offset = 0
        for other in sorted((p for p in placed if p.meets(buffer)), key=lambda p: p.offset):
            if offset + size <= other.offset:
                break
            offset = max(offset, other.offset + _aligned(other.nbytes))
        buffer.offset = offset
        placed.append(buffer)
        total = max(total, offset + size)
    return total


def view(block: Tensor, buffer: Buffer, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a buffer's bytes as a tensor of ``shape``, channels_last if it has four dimensions."""
    flat = block[buffer.offset : buffer.offset + buffer.nbytes].view(dtype)
    if len(shape) != 4:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
