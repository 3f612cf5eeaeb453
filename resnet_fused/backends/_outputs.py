"""Memory for outputs and scratch, used again once nobody holds the tensor that lived in it.

The C library returns large blocks to the system and takes fresh pages for the next one, and
touching those is slow: a fused ResNet-50 at batch 8 in float32 took 172 ms so, and 139 ms with
blocks kept (two Zen 5 cores).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

#: Smaller blocks come from the C library's own lists, which do not go back to the system.
_LEAST = 2**20
#: What one thread keeps at most; beyond it outputs are allocated as torch allocates them.
_MOST = 512 * 2**20


class _Blocks(threading.local):
    """One thread's blocks, those used longest ago first."""

    def __init__(self) -> None:
        self.by_size: OrderedDict[int, list[torch.UntypedStorage]] = OrderedDict()
        self.total = 0

    def take(self, nbytes: int) -> torch.UntypedStorage | None:
        """Return a block of exactly this size that nobody holds, or None if none may be kept."""
        kept = self.by_size.setdefault(nbytes, [])
        self.by_size.move_to_end(nbytes)
        for block in kept:
            # Whoever held it may have resized it.
            if _is_free(block) and block.nbytes() == nbytes:
                return block
        self._make_room(nbytes)
        if self.total + nbytes > _MOST:
            return None
        block = torch.empty(nbytes, dtype=torch.uint8).untyped_storage()
        kept.append(block)
        self.total += nbytes
        return block

    def _make_room(self, nbytes: int) -> None:
        for size in list(self.by_size):
            if self.total + nbytes <= _MOST:
                return
            held = [block for block in self.by_size[size] if not _is_free(block)]
            self.total -= size * (len(self.by_size[size]) - len(held))
            self.by_size[size] = held


_blocks = _Blocks()


def _is_free(block: torch.UntypedStorage) -> bool:
    # One use is this object; every tensor, view, array or saved activation is another.
    return bool(torch._C._storage_Use_Count(block._cdata) == 1)


CPU = torch.device("cpu")


def empty_channels_last(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU
) -> Tensor:
    """Return an empty channels_last tensor; on a GPU, torch's own allocator keeps the blocks."""
    if device.type != "cpu":
        kind = torch.channels_last
        return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=kind)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    block = _blocks.take(nbytes) if nbytes >= _LEAST else None
    if block is None:
        return torch.empty(tuple(shape), dtype=dtype, memory_format=torch.channels_last)
    n, c, h, w = shape
    strides = (c * h * w, 1, w * c, c)
    return torch.empty(0, dtype=dtype).set_(block, 0, (n, c, h, w), strides)


def channels_last(x: Tensor) -> Tensor:
    """Return ``x`` as channels_last to the letter: sides of length one may have any stride."""
    _, c, h, w = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    return x.as_strided(x.shape, (c * h * w, 1, w * c, c))


_local = threading.local()


def scratch(size: int, device: torch.device = CPU) -> Tensor:
    """Return this thread's scratch memory of at least ``size`` bytes, 64-byte aligned.

    On the CPU it is kept, as touching fresh pages is slow; the next call may return the same one.
    On a GPU it belongs to the current stream, and to a graph being captured there.
    """
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    kept: Tensor | None = getattr(_local, "scratch", None)
    if kept is None or kept.nbytes < size:
        kept = torch.empty(size, dtype=torch.uint8)
        _local.scratch = kept
    return kept
