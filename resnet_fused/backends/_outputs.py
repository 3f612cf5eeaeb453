"""Memory for outputs and scratch, used again once nobody holds the tensor that lived in it.

The C library returns large blocks to the system and takes fresh pages for the next one, and
touching those is slow: a fused ResNet-50 at batch 8 in float32 took 172 ms so, and 139 ms with
memory kept (two Zen 5 cores).
"""

from __future__ import annotations

import bisect
import math
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

#: Smaller blocks come from the C library's own lists. Of 2^20 bytes they do not: its heap shrank
#: and grew in every step of ResNet-50 in training, by 4,000 pages.
_LEAST = 2**18
#: What one thread keeps at most; beyond it outputs are allocated as torch allocates them. A step of
#: ResNet-152 in float32 at batch 8 holds 1.4 GiB; with 1 GiB it took 4 % longer.
_MOST = 2**32
#: What is taken at once, at least; pages that were never touched take no memory.
_CHUNK = 2**28
#: Blocks begin so many bytes apart, or a multiple.
_PAGE = 4096


#: By an element's bytes, the type that NumPy makes an array of; torch reads them as another.
_NUMPY = {1: np.uint8, 2: np.float16, 4: np.float32, 8: np.float64}


class _Lent(np.ndarray):
    """A block in use. torch drops it with the last tensor that reads it, in whatever thread."""

    gap: tuple[int, int]
    #: Where its place goes then; appending is all that another thread ever does.
    returned: list[tuple[int, int]]

    def __del__(self) -> None:
        self.returned.append(self.gap)


class _Chunk:
    """Memory that is cut into blocks of any size, each where the first gap has room."""

    def __init__(self, nbytes: int) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8).numpy()  # aligned by torch
        #: From where to where, in order, no two of them next to each other.
        self._gaps = [(0, nbytes)]
        self.returned: list[tuple[int, int]] = []

    @property
    def unused(self) -> bool:
        """Whether nobody holds any of it, as far as `take` has looked."""
        return self._gaps == [(0, self.memory.nbytes)]

    def take(self, nbytes: int) -> tuple[int, int] | None:
        """Return a block that nobody holds, from where to where, or None if there is no room."""
        while self.returned:
            self._close(*self.returned.pop())
        for i, (start, end) in enumerate(self._gaps):
            cut = start + nbytes
            if cut <= end:
                self._gaps[i : i + 1] = [(cut, end)] if cut < end else []
                return start, cut
        return None

    def _close(self, start: int, end: int) -> None:
        """Make a gap of a block, one with those on either side."""
        gaps, i = self._gaps, bisect.bisect(self._gaps, (start, end))
        if i < len(gaps) and gaps[i][0] == end:
            end = gaps.pop(i)[1]
        if i and gaps[i - 1][1] == start:
            i -= 1
            start = gaps.pop(i)[0]
        gaps.insert(i, (start, end))


class _Chunks(threading.local):
    """One thread's memory."""

    def __init__(self) -> None:
        self.all: list[_Chunk] = []

    @property
    def total(self) -> int:
        """Bytes of all chunks."""
        return sum(chunk.memory.nbytes for chunk in self.all)

    def take(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> Tensor | None:
        """Return a tensor in bytes that nobody holds, None for a small one or past the limit."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < _LEAST:
            return None
        size = -(-nbytes // _PAGE) * _PAGE
        for chunk in self.all:
            gap = chunk.take(size)
            if gap is not None:
                return _lend(chunk, gap, shape, strides, dtype)
        if self.total + size > _MOST:
            # Each was just asked and had no room, so that what is unused is too small.
            self.all = [chunk for chunk in self.all if not chunk.unused]
        room = min(max(_CHUNK, size), _MOST - self.total)
        if room < size:
            return None
        chunk = _Chunk(room)
        self.all.append(chunk)
        gap = chunk.take(size)
        assert gap is not None
        return _lend(chunk, gap, shape, strides, dtype)


def _lend(
    chunk: _Chunk,
    gap: tuple[int, int],
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    size = dtype.itemsize
    # In its final shape, as each call of torch costs more than this one of NumPy.
    apart = [size * stride for stride in strides]
    lent = _Lent(tuple(shape), _NUMPY[size], chunk.memory, gap[0], apart)
    lent.gap, lent.returned = gap, chunk.returned
    made = torch.from_numpy(lent)
    # Not a view: autograd adds to a gradient in place only where nothing else holds its memory.
    return made if made.dtype == dtype else made.view(dtype).data


_chunks = _Chunks()


CPU = torch.device("cpu")


def empty_channels_last(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU
) -> Tensor:
    """Return an empty channels_last tensor; on a GPU, torch's own allocator keeps the blocks."""
    if device.type != "cpu":
        kind = torch.channels_last
        return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=kind)
    made = _chunks.take(shape, _strides(shape), dtype)
    if made is None:
        return torch.empty(tuple(shape), dtype=dtype, memory_format=torch.channels_last)
    return made


def empty_contiguous(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an empty contiguous tensor (N, C, H, W) on the CPU."""
    _, c, h, w = shape
    made = _chunks.take(shape, (c * h * w, h * w, w, 1), dtype)
    return torch.empty(tuple(shape), dtype=dtype) if made is None else made


def empty_weight(size: Sequence[int], dtype: torch.dtype, *, channels_last: bool) -> Tensor:
    """Return an empty weight on the CPU, channels_last or contiguous."""
    return (empty_channels_last if channels_last else empty_contiguous)(size, dtype)


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
