"""A plan: the steps of one forward pass, bound to buffers that are reused from call to call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from resnet_fused.engine import arena
from resnet_fused.engine.capture import Call, Captured, Ref
from resnet_fused.engine.layout import Layout, bind, fill


class Plan:
    """Runs a captured forward pass on inputs of one shape.

    Convolutions that the native kernels take write into buffers planned ahead; every other call
    runs as torch runs it. A plan serves one call at a time; a second thread waits.
    """

    def __init__(self, captured: Captured, x: Tensor) -> None:
        self._lock = threading.Lock()
        self._outputs, self._spec = captured.outputs, captured.spec
        self._values: list[Any] = [None] * captured.size
        layout = Layout(captured, x)
        planned = arena.place(list(dict.fromkeys(layout.buffers.values())))
        #: Bytes of activations and scratch memory that the plan keeps.
        self.nbytes = planned + layout.scratch_bytes
        self._block = torch.empty(self.nbytes, dtype=torch.uint8, device=x.device)
        for index in layout.buffers:
            self._values[index] = layout.view(self._block, index)
        self._input: Tensor = self._values[0]
        #: Values that live in the plan's memory and must be copied before they leave it.
        self._kept = {i for i, root in layout.root.items() if root in layout.buffers}
        self._steps = [self._step(call, layout) for call in captured.calls]

    def _step(self, call: Call, layout: Layout) -> Callable[[], Any]:
        conv = layout.convolutions.get(call.out)
        if conv is not None:
            scratch = self._block[self.nbytes - layout.scratch_bytes :]
            return bind(call, conv, self._values, scratch)
        values, frees = self._values, layout.frees(call)

        def run() -> None:
            values[call.out] = call.target(*fill(call.args, values), **fill(call.kwargs, values))
            for index in frees:
                values[index] = None

        return run

    def run(self, x: Tensor) -> Any:
        """Run the plan on ``x``; the result is the caller's own."""
        with self._lock:
            self._input.copy_(x)
            for step in self._steps:
                step()
            leaves = [self._hand_out(leaf) for leaf in self._outputs]
        return pytree.tree_unflatten(leaves, self._spec)

    def _hand_out(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        if not isinstance(leaf, Ref):
            return leaf
        value = self._values[leaf.index]
        if leaf.index in self._kept:
            return value.clone()
        return value
