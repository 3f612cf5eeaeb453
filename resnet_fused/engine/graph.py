"""CUDA graphs: a pass recorded once per input shape, replayed by one launch.

The one file of the engine that speaks to ``torch.cuda``.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused.backends import _derived

#: A pass: from an input, which it may overwrite, to tensors by name.
Compute = Callable[[Tensor], dict[int, Tensor]]

#: They look for True in a mask, on the host; dynamic shapes have a tag of torch's own.
_READ_MASKS = ("aten::index", "aten::index_put", "aten::index_put_")


def graphs_on(device: torch.device, records: bool = True) -> Graphs | None:
    """Return what an engine on ``device`` has for streams and graphs; None where there are none."""
    return Graphs(device, records) if device.type == "cuda" else None


class Graphs:
    """What the CUDA graphs of one engine share: a stream, memory, and a turn on the device.

    They are recorded on one stream that is theirs alone, as torch keeps a cuBLAS workspace per
    stream and a graph keeps its address. They share a memory pool, which is safe because no two of
    them ever run at once: every use waits, on the device, until the one before it has copied its
    outputs out, whatever the two streams are. Nothing but inputs and outputs, which each graph
    keeps from reuse, is in the pool between two replays.

    Args:
        device: a GPU.
        records: whether the engine wants graphs; if not, its calls run one by one, on any stream.
    """

    def __init__(self, device: torch.device, records: bool = True) -> None:
        self.device, self.records = device, records
        #: Held while a use is put on a stream.
        self.lock = threading.Lock()
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
            #: The end of the last use.
            self.free = torch.cuda.Event()

    def capturing(self) -> bool:
        """Return whether this thread is recording a graph of its own."""
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def record(self, compute: Compute, example: Tensor) -> tuple[Graph | None, str]:
        """Warm a pass up and record it; one thread of the process at a time may do so.

        Other threads may go on using the GPU, but must neither synchronise the whole device nor
        draw its random numbers meanwhile: CUDA and torch forbid both beside a recording.

        Returns:
            The graph, or None and the reason why it cannot be recorded, which is empty where none
            is wanted. Reasons are looked for in
            the warm-up: a recording that fails leaves torch's allocator less able to give memory
            back.
        """
        with torch.cuda.device(self.device):
            if not self.records:
                # What the plan was made of may now be read on any stream.
                torch.cuda.current_stream().synchronize()
                return None, ""
            self._stream.wait_stream(torch.cuda.current_stream())
            # Entered by hand too, as a recording that fails does not return to the old stream.
            with torch.cuda.stream(self._stream):
                with Watch(self.device) as watch:
                    compute(example)
                # What it has derived from parameters may now be read on any stream.
                self._stream.synchronize()
                if watch.reason:
                    return None, watch.reason
                try:
                    return self._record(compute, example), ""
                except RuntimeError as error:
                    return None, f"CUDA could not record it: {str(error).splitlines()[0]}"

    def _record(self, compute: Compute, example: Tensor) -> Graph:
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        # The engine's parameters are its own, and the warm-up has been waited for.
        with no_garbage_collection(), recording, _derived.constant():
            # Inside, so that it lies in the pool: freed, it is not given to another stream.
            memory = torch.empty_like(example)
            outputs = compute(memory)
        return Graph(self, graph, memory, outputs)


class Graph:
    """A recorded pass with the memory that it reads its input from and leaves its outputs in."""

    def __init__(
        self, graphs: Graphs, graph: Any, memory: Tensor, outputs: dict[int, Tensor]
    ) -> None:
        self._graphs, self._graph = graphs, graph
        self._memory, self._outputs = memory, outputs

    def replay(self, x: Tensor) -> dict[int, Tensor]:
        """Run the pass on ``x`` on the caller's stream; the results are the caller's own."""
        with torch.cuda.device(self._graphs.device), self._graphs.lock:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._graphs.free)
            try:
                self._memory.copy_(x)
                self._graph.replay()
                return {name: output.clone() for name, output in self._outputs.items()}
            finally:
                self._graphs.free.record(stream)


class Watch(TorchDispatchMode):
    """Looks for what a graph cannot repeat, in a pass as it runs.

    Args:
        device: where all tensors have to be.
        random: whether it may draw random numbers, as a training step does.
    """

    def __init__(self, device: torch.device, *, random: bool = False) -> None:
        super().__init__()
        self._device, self._random = device, random
        #: The first reason that was found; empty if there is none.
        self.reason = ""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled functions compiled: Dynamo passes by, for good, what runs under a mode."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.reason = self.reason or self._reason(func, (args, kwargs, out))
        return out

    def _reason(self, func: Any, values: Any) -> str:
        name = func._schema.name
        tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
        if name in _READ_MASKS and any(t.dtype in (torch.bool, torch.uint8) for t in tensors):
            return f"{name} reads a mask back to the host"
        elsewhere = [t.device for t in tensors if t.device != self._device]
        if elsewhere:
            return f"{name} has a tensor on {elsewhere[0]}"
        if torch.Tag.data_dependent_output in func.tags:
            return f"{name} reads a value back to the host"
        if torch.Tag.dynamic_output_shape in func.tags:
            return f"the shape that {name} returns depends on values"
        if torch.Tag.nondeterministic_seeded in func.tags and not self._random:
            return f"{name} draws random numbers"
        return ""


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep cycles for a while: to destroy a graph or a stream in them would end a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
