"""Memory for outputs and scratch, used again once nobody holds the tensor that lived in it.

The C library returns large blocks to the system and takes fresh pages for the next one, and
touching those is slow: a fused ResNet-50 at batch 8 in float32 took 172 ms so, and 139 ms with
blocks kept (two Zen 5 cores).
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

#: Smaller blocks come from the C library's own lists, which do not go back to the system.
_LEAST = 2**20
#: What one thread keeps at most; beyond it outputs are allocated as torch allocates them.
_MOST = 2**30


#: By an element's bytes, the type that NumPy makes an array of; torch reads them as another.
_NUMPY = {1: np.uint8, 2: np.float16, 4: np.float32, 8: np.float64}


class _Lent(np.ndarray):
    """A block in use. torch drops it with the last tensor that reads it, in whatever thread."""

    block: np.ndarray
    #: Where the block goes then; appending is all that another thread ever does.
    kept: list[np.ndarray]

    def __del__(self) -> None:
        self.kept.append(self.block)


class _Blocks(threading.local):
    """One thread's blocks, the sizes used longest ago first."""

    def __init__(self) -> None:
        self.by_size: OrderedDict[int, list[np.ndarray]] = OrderedDict()
        #: Bytes of all blocks, lent ones too.
        self.total = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype, nbytes: int) -> Tensor | None:
        """Return a channels_last map in bytes that nobody holds, or None if none may be kept."""
        kept = self.by_size.setdefault(nbytes, [])
        self.by_size.move_to_end(nbytes)
        if not kept:
            self._make_room(nbytes)
            if self.total + nbytes > _MOST:
                return None
            kept.append(torch.empty(nbytes, dtype=torch.uint8).numpy())  # aligned by torch
            self.total += nbytes
        block = kept.pop()
        strides = [dtype.itemsize * stride for stride in _strides(shape)]
        # In its final shape, as each call of torch costs more than this one of NumPy.
        lent = _Lent(tuple(shape), _NUMPY[dtype.itemsize], block, 0, strides)
        lent.block, lent.kept = block, kept
        made = torch.from_numpy(lent)
        # Not a view: autograd adds to a gradient in place only where nothing else holds its memory.
        return made if made.dtype == dtype else made.view(dtype).data

    def _make_room(self, nbytes: int) -> None:
        for size, kept in self.by_size.items():
            while kept and self.total + nbytes > _MOST:
                kept.pop()
                self.total -= size


_blocks = _Blocks()


CPU = torch.device("cpu")


def empty_channels_last(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU
) -> Tensor:
    """Return an empty channels_last tensor; on a GPU, torch's own allocator keeps the blocks."""
    if device.type != "cpu":
        kind = torch.channels_last
        return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=kind)
    nbytes = math.prod(shape) * dtype.itemsize
    made = _blocks.take(shape, dtype, nbytes) if nbytes >= _LEAST else None
    if made is None:
        return torch.empty(tuple(shape), dtype=dtype, memory_format=torch.channels_last)
    return made


def channels_last(x: Tensor) -> Tensor:
    """Return ``x`` as channels_last to the letter: sides of length one may have any stride."""
    strides = _strides(x.shape)
    if x.stride() == strides:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    return x.as_strided(x.shape, strides).data  # no view, as above


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    _, c, h, w = shape
    return c * h * w, 1, w * c, c


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
