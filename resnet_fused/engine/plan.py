"""A plan: the steps of one forward pass, bound to buffers that are reused from call to call."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from resnet_fused.engine import arena
from resnet_fused.engine.capture import Call, Captured, Ref, fill
from resnet_fused.engine.graph import Graphs
from resnet_fused.engine.kernels import Kernel, Native
from resnet_fused.engine.layout import CONSTANT, Layout, Segment
from resnet_fused.engine.merge import merge

Step = Callable[[], Any]

_uses = itertools.count()


class Plan:
    """Runs a captured forward pass on inputs of one shape.

    Calls that native kernels take write into buffers planned ahead, chunk of images by chunk of
    images; every other call runs as torch runs it. A plan serves one call at a time; a second
    thread waits.

    With ``graphs``, on a GPU, the steps are recorded and replayed as one CUDA graph. Where that
    cannot or is not to be, and while the caller records a graph of his own, they run one by one on
    memory that is new for every call, so that calls on several streams never meet.
    """

    def __init__(self, captured: Captured, x: Tensor, graphs: Graphs | None = None) -> None:
        self._lock = threading.Lock()
        #: Grows with every run, over all plans: the plan with the least was run longest ago.
        self.last_use = next(_uses)
        captured = merge(captured)
        self._outputs, self._spec = captured.outputs, captured.spec
        self._returned = {leaf.index for leaf in self._outputs if isinstance(leaf, Ref)}
        self._values: list[Any] = [None] * captured.size
        layout = Layout(captured, x, plans_input=graphs is None)
        kernels = {
            call.out: layout.native[call.out].make(segment.images)
            for segment in layout.segments
            for call in segment.calls
            if call.out in layout.native
        }
        planned = arena.place(list(dict.fromkeys(layout.buffers.values())))
        scratch = max((kernel.scratch_bytes for kernel in kernels.values()), default=0)
        #: Bytes of activations and scratch memory that the plan keeps.
        self.nbytes = planned + scratch
        self._block = torch.empty(self.nbytes, dtype=torch.uint8, device=x.device)
        self._scratch = self._block[planned:]
        for index in layout.buffers:
            self._values[index] = layout.view(self._block, index)
        self._input: Tensor | None = self._values[0]
        self._example = torch.empty_like(x, device="meta")
        own = {CONSTANT, *layout.buffers}
        #: Values that live in the engine's memory and must be copied before they leave it.
        self._kept = {i for i, roots in layout.roots.items() if roots & own}
        #: Values made by torch: dropped after a run.
        self._passing = [i for i, value in enumerate(self._values) if value is None]
        self._steps = [
            s for segment in layout.segments for s in self._bind(segment, layout, kernels)
        ]
        #: Whether a graph of the caller's reads the plan's constants: it has to stay.
        self.pinned = False
        #: All steps as one launch; None where there is none, for the reason beside it.
        self._graph, self.ungraphed = graphs.record(self._compute, x) if graphs else (None, "")

    def _bind(self, segment: Segment, layout: Layout, kernels: dict[int, Kernel]) -> Iterator[Step]:
        if not segment.images:
            for call in segment.calls:
                yield self._generic(call, layout.frees(call))
            return
        for start in range(0, max(layout.batch, 1), segment.images):
            for call in segment.calls:
                native = layout.native[call.out]
                yield self._native(kernels[call.out], native, call, start, segment.images)

    def _generic(self, call: Call, frees: tuple[int, ...]) -> Step:
        values = self._values

        def run() -> None:
            values[call.out] = call.target(*fill(call.args, values), **fill(call.kwargs, values))
            for index in frees:
                values[index] = None

        return run

    def _native(self, kernel: Kernel, native: Native, call: Call, start: int, images: int) -> Step:
        """Bind one kernel to one chunk, now if its inputs are planned, else at every run."""

        def chunk(operand: Any) -> Any:
            value = self._values[operand.index] if isinstance(operand, Ref) else operand
            # What holds one chunk only is overwritten by the next.
            return value if value is None or len(value) == images else value[start : start + images]

        def bind() -> Step:
            y = chunk(Ref(call.out))
            return kernel.bind(chunk(native.x), chunk(native.residual), y, self._scratch)

        operands = [o for o in (native.x, native.residual) if isinstance(o, Ref)]
        if all(self._values[operand.index] is not None for operand in operands):
            return bind()
        return lambda: bind()()

    def run(self, x: Tensor) -> Any:
        """Run the plan on ``x``; the result is the caller's own."""
        if self._graph is None:
            return self.run_steps(x)
        self.last_use = next(_uses)
        return self._result(self._graph.replay(x))

    def run_steps(self, x: Tensor) -> Any:
        """Run the plan as :meth:`run` does, but never replay a graph."""
        self.last_use = next(_uses)
        with self._lock:
            memory = self._input
            if memory is None:
                memory = torch.empty_like(self._example, device=x.device)
            values = self._compute(memory.copy_(x))
            values = {i: v.clone() if i in self._kept else v for i, v in values.items()}
        return self._result(values)

    def _compute(self, x: Tensor) -> dict[int, Any]:
        """Return the values that are returned, some of them in the engine's memory.

        One tensor per value, also where the model returns it twice. What is not planned, ``x``
        with it, is dropped.
        """
        self._values[0] = x
        for step in self._steps:
            step()
        results = {i: self._values[i] for i in self._returned}
        for index in self._passing:
            self._values[index] = None
        return results

    def _result(self, values: dict[int, Any]) -> Any:
        leaves = [
            values[leaf.index] if isinstance(leaf, Ref)
            else leaf.clone() if isinstance(leaf, Tensor)
            else leaf
            for leaf in self._outputs
        ]  # fmt: skip
        return pytree.tree_unflatten(leaves, self._spec)
