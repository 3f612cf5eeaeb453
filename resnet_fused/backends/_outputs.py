"""Memory for outputs and scratch, used again once nobody holds the tensor that lived in it.

The C library returns large blocks to the system and takes fresh pages for the next one, and
touching those is slow: a fused ResNet-50 at batch 8 in float32 took 172 ms so, and 139 ms with
memory kept (two Zen 5 cores).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from resnet_fused.backends import native

#: Smaller blocks come from the C library's own lists. Of 2^20 bytes they do not: its heap shrank
#: and grew in every step of ResNet-50 in training, by 4,000 pages.
_LEAST = 2**18
#: What one thread keeps at most; beyond it outputs are allocated as torch allocates them. A step of
#: ResNet-152 in float32 at batch 8 holds 1.4 GiB; with 1 GiB it took 4 % longer.
_MOST = 2**32
#: What is taken at once, at least; pages that were never touched take no memory.
_CHUNK = 2**28

#: By a dtype, the code of its kind and its bits in DLPack, by which torch takes the memory.
_DLPACK = {
    torch.float32: (2, 32), torch.bfloat16: (4, 16), torch.float16: (2, 16),
    torch.float64: (2, 64), torch.uint8: (1, 8),
}  # fmt: skip


class _Memory(threading.local):
    """One thread's memory, of the extension; without it, outputs are allocated as torch does."""

    def __init__(self) -> None:
        extension = native.extension()
        self.own = None if extension is None else extension.Memory(_CHUNK, _MOST)


_memory = _Memory()


CPU = torch.device("cpu")


def empty_channels_last(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU
) -> Tensor:
    """Return an empty channels_last tensor; on a GPU, torch's own allocator keeps the blocks."""
    made = _lent(shape, dtype, channels_last=True) if device.type == "cpu" else None
    if made is None:
        kind = torch.channels_last
        return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=kind)
    return made


def empty_contiguous(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an empty contiguous tensor (N, C, H, W) on the CPU."""
    made = _lent(shape, dtype, channels_last=False)
    return torch.empty(tuple(shape), dtype=dtype, device=CPU) if made is None else made


def _lent(shape: Sequence[int], dtype: torch.dtype, *, channels_last: bool) -> Tensor | None:
    """Return a tensor in bytes that nobody holds, None for a small one or past the limit.

    It is not a view: autograd adds to a gradient in place only where nothing else holds its memory.
    """
    n, c, h, w = shape
    if n * c * h * w * dtype.itemsize < _LEAST or _memory.own is None:
        return None
    capsule = _memory.own.lend(n, c, h, w, channels_last, *_DLPACK[dtype])
    return None if capsule is None else from_dlpack(capsule)


def empty_weight(size: Sequence[int], dtype: torch.dtype, *, channels_last: bool) -> Tensor:
    """Return an empty weight on the CPU, channels_last or contiguous."""
    return (empty_channels_last if channels_last else empty_contiguous)(size, dtype)


def channels_last(x: Tensor) -> Tensor:
    """Return ``x`` as channels_last to the letter: sides of length one may have any stride."""
    _, c, h, w = x.shape
    strides = c * h * w, 1, w * c, c
    if x.stride() == strides:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    return x.as_strided(x.shape, strides).data  # no view, as above


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
