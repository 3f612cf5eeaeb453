"""What a plan must know before memory is laid out: lifetimes, views, and the split of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from resnet_fused.backends import _device
from resnet_fused.engine import arena
from resnet_fused.engine.capture import Call, Captured, Ref, fill, refs
from resnet_fused.engine.kernels import Native, adopt

#: What is taken for the last cache where the system does not say how large it is, the least that
#: was tried, and the most of one that others share.
CACHE_BYTES, LEAST_CACHE_BYTES, MOST_CACHE_BYTES = 32 * 2**20, 16 * 2**20, 256 * 2**20

#: Stands among the roots for the memory of the model's constants.
CONSTANT = -1


def chunk_bytes() -> int:
    """Return the bytes of input, output and residual that a chunk of images is held to.

    They are a quarter of the last cache, where the next call then finds them. Measured on two Zen 5
    cores with 32 MiB of it, batch 8: ResNet-50 float32 8 % faster than unsplit, bfloat16 3 %; half
    or twice as many bytes differ by less than 3 %. On two of an Emerald Rapids, which names 300
    MiB, chunks of 8 MiB took bfloat16 12 % longer than one of 16 or more.
    """
    found = _device.last_cache_bytes() or CACHE_BYTES
    return min(max(found, LEAST_CACHE_BYTES), MOST_CACHE_BYTES) // 4


@dataclass(frozen=True)
class Segment:
    """Native calls in a row that are run on a chunk of images, then on the next chunk."""

    calls: tuple[Call, ...]
    images: int


class Layout:
    """Facts about the values of a captured pass, found by running it once on an example.

    ``plans_input`` says whether the input has planned memory too, or is new for every call.
    """

    def __init__(self, captured: Captured, x: Tensor, *, plans_input: bool) -> None:
        self.batch = x.shape[0]
        self._plans_input = plans_input
        self._chunk_bytes = chunk_bytes()
        #: The call that reads each value last; outputs are read after all calls.
        self.last_read = _last_reads(captured)
        #: The values in whose memory each value lives: its own, or those that it is a view of.
        self.roots: dict[int, frozenset[int]] = {0: frozenset({0})}
        #: The calls that native kernels run, by the index of their value.
        self.native: dict[int, Native] = {}
        self._shapes: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}
        self._explore(captured, x)
        self._end = _ends(self.roots, self.last_read)
        self.segments = self._split(captured)
        #: Images that a planned value holds: the batch, or a chunk if only its segment reads it.
        self.images = self._count_images()
        #: Planned memory: the native calls' values and, where it is planned, the input's.
        self.buffers = self._plan()

    def _explore(self, captured: Captured, x: Tensor) -> None:
        values: list[Any] = [x, *[None] * (captured.size - 1)]
        self._shapes[0] = (tuple(x.shape), x.dtype)
        for call in captured.calls:
            args = fill(call.args, values)
            value = call.target(*args, **fill(call.kwargs, values))
            inputs = [ref.index for ref in refs(call)]
            memory = _memory(value)
            views = [self.roots[i] for i in inputs if memory & _memory(values[i])]
            if memory & _memory((call.args, call.kwargs)):
                views.append(frozenset({CONSTANT}))
            self.roots[call.out] = frozenset().union(*views) or frozenset({call.out})
            if isinstance(value, Tensor):
                self._shapes[call.out] = (tuple(value.shape), value.dtype)
                native = adopt(call, args)
                # A chunk of the batch must be a chunk of every value.
                if native is not None and value.shape[0] == len(args[0]) == self.batch:
                    self.native[call.out] = native
            values[call.out] = value
            for index in inputs:
                if self.last_read[index] == call.out:
                    values[index] = None

    def _split(self, captured: Captured) -> list[Segment]:
        """Cut the native calls into segments, each with its number of images."""
        wanted = [self._chunk(call) for call in captured.calls]
        # A later call that needs small chunks holds back those before it: maps shrink with depth,
        # so this leaves one segment per stage instead of one per call.
        for i in range(len(wanted) - 2, -1, -1):
            if wanted[i] and wanted[i + 1]:
                wanted[i] = min(wanted[i], wanted[i + 1])
        segments: list[Segment] = []
        previous = 0
        for call, images in zip(captured.calls, wanted, strict=True):
            if images and images == previous:
                segments[-1] = Segment((*segments[-1].calls, call), images)
            else:
                segments.append(Segment((call,), images))
            previous = images
        return segments

    def _chunk(self, call: Call) -> int:
        """Return the images per chunk for a native call, 0 for any other."""
        if call.out not in self.native:
            return 0
        indices = {call.out, *(ref.index for ref in refs(call))}
        per_image = sum(self._nbytes(i) for i in indices) // max(self.batch, 1)
        fitting = max(1, self._chunk_bytes // max(per_image, 1))
        return max((d for d in range(1, self.batch + 1) if self.batch % d == 0 and d <= fitting),
                   default=1)  # fmt: skip

    def _count_images(self) -> dict[int, int]:
        images = {0: self.batch}
        for segment in self.segments:
            inside = {call.out for call in segment.calls}
            for call in segment.calls:
                if call.out in self.native:
                    # Views of it, outputs and generic calls read it past the segment's end.
                    local = self._end[call.out] in inside
                    images[call.out] = segment.images if local else self.batch
        return images

    def _plan(self) -> dict[int, arena.Buffer]:
        buffers = {0: self._buffer(0, 0)} if self._plans_input else {}
        for segment in self.segments:
            for call in segment.calls:
                if call.out in self.native:
                    self._plan_call(call, segment, buffers)
        return buffers

    def _plan_call(self, call: Call, segment: Segment, buffers: dict[int, arena.Buffer]) -> None:
        host = self._host(call, buffers)
        if host is not None:
            # The sum overwrites the shortcut, which nobody reads any more.
            buffers[call.out] = buffers[host]
            buffers[host].last = max(buffers[host].last, self._end[call.out])
        elif self.images[call.out] == segment.images:
            buffers[call.out] = self._buffer(call.out, call.out)
        else:
            # Every chunk writes its part of it, the first one before this call's turn comes.
            buffers[call.out] = self._buffer(call.out, segment.calls[0].out)
        read = {root for ref in refs(call) for root in self.roots[ref.index]}
        for root in read & buffers.keys():
            if self.images[root] != segment.images:
                # The next chunk reads its part of it after this call.
                buffers[root].last = max(buffers[root].last, segment.calls[-1].out)

    def _host(self, call: Call, buffers: dict[int, arena.Buffer]) -> int | None:
        """Return the residual's value if the call may write its result there."""
        native = self.native[call.out]
        if not isinstance(native.residual, Ref):
            return None
        host, *others = self.roots[native.residual.index]
        shapes = [self._shapes.get(i) for i in (call.out, host, native.residual.index)]
        same = shapes[0] == shapes[1] == shapes[2]
        if others or host not in buffers or not same:
            return None
        if self._end[host] != call.out or host in self.roots[native.x.index]:
            return None
        return host if self.images[host] == self.images[call.out] else None

    def _buffer(self, index: int, first: int) -> arena.Buffer:
        nbytes = self._nbytes(index) // max(self.batch, 1) * self.images[index]
        return arena.Buffer(nbytes, first, self._end[index])

    def _nbytes(self, index: int) -> int:
        shape, dtype = self._shapes.get(index, ((0,), torch.uint8))
        return torch.Size(shape).numel() * dtype.itemsize

    def view(self, block: Tensor, index: int) -> Tensor:
        """Return the planned memory of a value."""
        shape, dtype = self._shapes[index]
        return arena.view(block, self.buffers[index], (self.images[index], *shape[1:]), dtype)

    def frees(self, call: Call) -> tuple[int, ...]:
        """Return the unplanned values that nobody reads after ``call``."""
        done = (ref.index for ref in refs(call) if self.last_read[ref.index] == call.out)
        return tuple(i for i in done if i not in self.buffers)


def _last_reads(captured: Captured) -> dict[int, int]:
    last = {i: i for i in range(captured.size)}
    last.update((ref.index, call.out) for call in captured.calls for ref in refs(call))
    last.update((out.index, captured.size) for out in captured.outputs if isinstance(out, Ref))
    return last


def _ends(roots: dict[int, frozenset[int]], last_read: dict[int, int]) -> dict[int, int]:
    """Return for each root the last read of it or of any view of it."""
    ends: dict[int, int] = {}
    for index, owners in roots.items():
        for owner in owners:
            ends[owner] = max(ends.get(owner, owner), last_read[index])
    return ends


def _memory(value: Any) -> set[int]:
    """Return where the tensors in ``value`` keep their elements."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return {t.untyped_storage().data_ptr() for t in tensors} - {0}
