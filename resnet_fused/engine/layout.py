"""What a plan must know before memory is laid out: lifetimes, views, and who writes where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import choose, cpu
from resnet_fused.engine import arena
from resnet_fused.engine.capture import Call, Captured, Ref

_CONV = torch.ops.resnet_fused.conv_bn_act.default


class Layout:
    """Facts about the values of a captured pass, found by running it once on an example."""

    def __init__(self, captured: Captured, x: Tensor) -> None:
        #: The call that reads each value last; outputs are read after all calls.
        self.last_read = _last_reads(captured)
        #: The value whose memory each value lives in: its own, or that of what it is a view of.
        self.root: dict[int, int] = {0: 0}
        #: The convolutions bound to the native kernels, by the index of their value.
        self.convolutions: dict[int, cpu.Convolution] = {}
        self._shapes: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}
        self._explore(captured, x)
        self._end = _ends(self.root, self.last_read)
        #: Planned memory, by root: the input's and the native convolutions' outputs.
        self.buffers = self._plan(captured)
        self.scratch_bytes = max((c.scratch_bytes for c in self.convolutions.values()), default=0)

    def _explore(self, captured: Captured, x: Tensor) -> None:
        values: list[Any] = [x, *[None] * (captured.size - 1)]
        self._shapes[0] = (tuple(x.shape), x.dtype)
        for call in captured.calls:
            value = call.target(*fill(call.args, values), **fill(call.kwargs, values))
            values[call.out] = value
            inputs = [ref.index for ref in refs(call)]
            views = [i for i in inputs if _same_memory(values[i], value)]
            self.root[call.out] = self.root[views[0]] if views else call.out
            if isinstance(value, Tensor):
                self._shapes[call.out] = (tuple(value.shape), value.dtype)
            if call.target is _CONV and _runs_native(fill(call.args, values)):
                x_, weight = fill(call.args[:2], values)
                self.convolutions[call.out] = cpu.Convolution(x_.shape, weight, *call.args[5:9])
            for index in inputs:
                if self.last_read[index] == call.out:
                    values[index] = None

    def _plan(self, captured: Captured) -> dict[int, arena.Buffer]:
        buffers = {0: self._buffer(0)}
        for call in captured.calls:
            if call.out not in self.convolutions:
                continue
            host = self._in_place(call, buffers)
            if host is None:
                buffers[call.out] = self._buffer(call.out)
            else:
                # The sum overwrites the shortcut, which nobody reads any more.
                buffers[call.out] = buffers[host]
                buffers[host].last = self._end[call.out]
        return buffers

    def _in_place(self, call: Call, buffers: dict[int, arena.Buffer]) -> int | None:
        residual, x = call.args[4], call.args[0]
        if not isinstance(residual, Ref):
            return None
        host = self.root[residual.index]
        same = self._shapes[call.out] == self._shapes[host] == self._shapes[residual.index]
        free = self._end[host] == call.out and host != self.root[x.index]
        return host if host in buffers and same and free else None

    def _buffer(self, index: int) -> arena.Buffer:
        shape, dtype = self._shapes[index]
        return arena.Buffer(torch.Size(shape).numel() * dtype.itemsize, index, self._end[index])

    def view(self, block: Tensor, index: int) -> Tensor:
        """Return the planned memory of a value as a channels_last tensor."""
        return arena.view(block, self.buffers[index], *self._shapes[index])

    def frees(self, call: Call) -> tuple[int, ...]:
        """Return the unplanned values that nobody reads after ``call``."""
        done = (ref.index for ref in refs(call) if self.last_read[ref.index] == call.out)
        return tuple(i for i in done if i not in self.buffers)


def refs(call: Call) -> Iterator[Ref]:
    """Yield the values a call reads."""
    yield from _find((call.args, call.kwargs))


def fill(value: Any, values: list[Any]) -> Any:
    """Return ``value`` with each Ref in it, also inside sequences, replaced by its value."""
    if isinstance(value, Ref):
        return values[value.index]
    if isinstance(value, tuple | list):
        return type(value)(fill(v, values) for v in value)
    if isinstance(value, dict):
        return {k: fill(v, values) for k, v in value.items()}
    return value


def bind(
    call: Call, conv: cpu.Convolution, values: list[Any], scratch: Tensor
) -> Callable[[], Any]:
    """Return a call of the native kernel that reads ``values`` and writes ``values[call.out]``.

    Inputs that stand in ``values`` already are planned, so their addresses are taken once; the
    others are results that torch allocates anew in every pass.
    """
    scale, shift = (cpu.as_vector(v) for v in call.args[2:4])

    def run() -> None:
        x, residual = fill(call.args[0], values), fill(call.args[4], values)
        conv.bind(x, scale, shift, residual, values[call.out], scratch, call.args[9])()

    if any(values[ref.index] is None for ref in refs(call)):
        return run
    x, residual = fill(call.args[0], values), fill(call.args[4], values)
    return conv.bind(x, scale, shift, residual, values[call.out], scratch, call.args[9])


def _find(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _find(item)
    elif isinstance(value, dict):
        yield from _find(list(value.values()))


def _last_reads(captured: Captured) -> dict[int, int]:
    last = {i: i for i in range(captured.size)}
    last.update((ref.index, call.out) for call in captured.calls for ref in refs(call))
    last.update((ref.index, captured.size) for ref in _find(captured.outputs))
    return last


def _ends(root: dict[int, int], last_read: dict[int, int]) -> dict[int, int]:
    """Return for each root the last read of it or of any view of it."""
    ends: dict[int, int] = {}
    for index, owner in root.items():
        ends[owner] = max(ends.get(owner, owner), last_read[index])
    return ends


def _same_memory(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0


def _runs_native(args: tuple[Any, ...]) -> bool:
    x, residual = args[0], args[4]
    dense = all(
        t is None or t.is_contiguous(memory_format=torch.channels_last) for t in (x, residual)
    )
    return dense and choose("conv_bn_act", *args) is cpu.conv_bn_act
