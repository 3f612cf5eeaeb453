"""As much of ``torch.cuda`` as an engine uses, on CPU tensors, with a detector of races.

Streams keep vector clocks: what is put on a stream happens after what was put there before, after
the events that the stream waits for, and after what the host has waited for. Two operations that
use one memory, one of them writing, must be ordered so. A graph is the list of torch operations
that were recorded, with their very tensors, run again at each replay.
"""

import contextlib
import itertools
import threading
from collections import defaultdict
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused.backends import _derived

#: What gives memory and leaves in it what was there.
EMPTY = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def later(a: dict, b: dict) -> dict:
    return {k: max(a.get(k, 0), b.get(k, 0)) for k in a.keys() | b.keys()}


class Stream:
    names = itertools.count()

    def __init__(self, cuda: "FakeCuda") -> None:
        self.cuda, self.name = cuda, next(Stream.names)
        self.clock: dict[int, int] = {}
        self.capturing = False

    def wait_event(self, event: "Event") -> None:
        assert not self.capturing, "a recording may not depend on what is outside of it"
        self.clock = later(self.clock, event.clock)

    def wait_stream(self, other: "Stream") -> None:
        self.clock = later(self.clock, other.clock)

    def synchronize(self) -> None:
        assert not self.capturing
        self.cuda.host = later(self.cuda.host, self.clock)


class Event:
    """Unrecorded, it has happened."""

    def __init__(self) -> None:
        self.clock: dict[int, int] = {}

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)


class Graph:
    def __init__(self) -> None:
        self.steps: list = []

    def replay(self) -> None:
        # As a graph, it knows nothing of autograd.
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.steps:
                if func._schema.name in EMPTY:
                    continue
                for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                    if memory(old) != memory(new):
                        old.copy_(new)


class Recording(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = [(t, t.clone()) for t in tensors((args, kwargs)) if func._schema.is_mutable]
        out = func(*args, **kwargs)
        self.graph.steps.append((func, args, kwargs, out))
        # A recording computes nothing.
        for t, values in before:
            t.copy_(values)
        known = {memory(t) for t in tensors((args, kwargs))}
        for t in tensors(out):
            if memory(t) not in known and t.is_floating_point():
                t.fill_(torch.nan)
        return out


class Watching(TorchDispatchMode):
    """Logs who uses which memory, and checks it against everybody before."""

    def __init__(self, cuda: "FakeCuda") -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._schema.name not in EMPTY:
            self.cuda.use(func, (args, kwargs), out)
        return out


class FakeCuda:
    """Put in place by :func:`install`; each thread has a current stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.host: dict[int, int] = {}
        self.races: list[str] = []
        self.guards = 0
        #: The arguments of each recording.
        self.recordings: list[dict] = []
        #: Raised inside the next recordings.
        self.fault: Exception | None = None
        #: Tensors whose memory the allocator would keep for a stream, with that stream.
        self.held: list[tuple[torch.Tensor, Stream]] = []
        self._engine_device = device
        self._local = threading.local()
        self._default = Stream(self)
        self._uses = defaultdict(list)
        self._kept: list = []
        self._lock = threading.Lock()

    # What torch.cuda has

    def Stream(self) -> Stream:
        assert self._local.guarded, "a stream is made on the current device"
        return Stream(self)

    def current_stream(self, device: torch.device | None = None) -> Stream:
        asked = device is not None or self._local.guarded
        assert asked, "the current stream is that of the current device"
        return self._current()

    @contextlib.contextmanager
    def stream(self, stream: Stream):
        before = self._current()
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    @contextlib.contextmanager
    def device(self, device: torch.device):
        assert device == self._engine_device
        before, self._local.guarded = getattr(self._local, "guarded", False), True
        self.guards += 1
        try:
            yield
        finally:
            self._local.guarded = before

    def is_current_stream_capturing(self) -> bool:
        return self._current().capturing

    def graph_pool_handle(self) -> object:
        return object()

    @contextlib.contextmanager
    def graph(self, graph: Graph, **options: Any):
        """Like torch's, leaves the stream as it is when a recording fails."""
        stream = options["stream"]
        self.recordings.append(options)
        self._local.stream = stream
        stream.capturing = True
        try:
            with Recording(graph):
                yield
                if self.fault:
                    raise self.fault
        finally:
            stream.capturing = False

    # What a test wants

    @contextlib.contextmanager
    def on(self, stream: Stream):
        """Run on a stream, the caller's, under the detector."""
        with self.stream(stream), Watching(self):
            yield

    def caller_stream(self) -> Stream:
        return Stream(self)

    def _current(self) -> Stream:
        return getattr(self._local, "stream", self._default)

    def use(self, func: Any, inputs: Any, out: Any) -> None:
        with self._lock:
            stream = self._current()
            if stream.capturing:
                return
            stream.clock = later(stream.clock, self.host)
            stream.clock[stream.name] = now = stream.clock.get(stream.name, 0) + 1
            given = tensors(inputs)
            written = {memory(t) for t in tensors(out)} - {memory(t) for t in given}
            if func._schema.is_mutable:
                written |= {memory(t) for t in tensors(out)}
            for value, known in zip(inputs[0], func._schema.arguments, strict=False):
                if known.alias_info is not None and known.alias_info.is_write:
                    written |= {memory(t) for t in tensors(value)}
            for place in {memory(t) for t in [*given, *tensors(out)]}:
                writes = place in written
                for name, time, wrote, what in self._uses[place]:
                    ordered = name == stream.name or stream.clock.get(name, 0) >= time
                    if (wrote or writes) and not ordered:
                        self.races.append(f"{what} and {func._schema.name}")
                self._uses[place].append((stream.name, now, writes, func._schema.name))
            # Addresses are not to come again.
            self._kept.append((given, tensors(out)))


def install(monkeypatch, device: torch.device) -> FakeCuda:
    cuda = FakeCuda(device)
    names = (
        "Stream", "current_stream", "stream", "device", "is_current_stream_capturing",
        "graph_pool_handle", "graph",
    )  # fmt: skip
    for name in names:
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.empty(0))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(_derived, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(_derived, "hold", lambda tensor, stream: cuda.held.append((tensor, stream)))
    return cuda
