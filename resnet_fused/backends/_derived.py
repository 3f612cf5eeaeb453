"""Values derived from parameters, kept until a parameter changes. They never enter a state_dict.

On a GPU they may be asked for on another stream than the one that made them, which then waits. A
recording of a CUDA graph neither leaves values behind, as they would be there only after a replay,
nor reads those that are kept: it may not wait for what is outside of it, and they may be gone when
it is replayed. It derives its own at every replay, and so follows the parameters. Whoever knows
better says so: :func:`constant`.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")

#: By the id of the first source: its values, by key. Gone with that tensor.
_cache: dict[int, dict[Hashable, _Kept]] = {}
#: By the id of the first source: what takes its values with it.
_finalizers: dict[int, Any] = {}
#: By the id of a parameter: how many steps of optimizers had it. A later tensor of the same id goes
#: on counting.
_steps: dict[int, int] = {}


def _count_step(optimizer: Optimizer, *_: Any) -> None:
    """Count a step for its parameters: torch's fused optimizers move no version counter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _steps[id(parameter)] = _steps.get(id(parameter), 0) + 1


register_optimizer_step_post_hook(_count_step)

_thread = threading.local()


@contextlib.contextmanager
def constant() -> Iterator[None]:
    """Let recordings in this thread read what is kept.

    For parameters that never change and outlive the graph, whose values are there already.
    """
    before, _thread.constant = _recordings_read(), True
    try:
        yield
    finally:
        _thread.constant = before


def _recordings_read() -> bool:
    return getattr(_thread, "constant", False)


class Made:
    """Where on a GPU a value was made: what other streams wait for."""

    def __init__(self, device: torch.device, value: Any) -> None:
        self._device, self._tensors = device, tensors(value)
        stream = torch.cuda.current_stream(device)
        self._event = torch.cuda.Event()
        self._event.record(stream)
        #: The streams whose work from now on comes behind it.
        self._ordered = {stream}

    def readable(self) -> bool:
        """Return whether what follows on the current stream may read it, which waits if it must."""
        if torch.cuda.is_current_stream_capturing():
            return _recordings_read()
        self.wait()
        return True

    def wait(self) -> None:
        """Have what follows on the current stream come behind it."""
        stream = torch.cuda.current_stream(self._device)
        if stream not in self._ordered:
            stream.wait_event(self._event)
            for tensor in self._tensors:
                hold(tensor, stream)
            self._ordered.add(stream)


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors among a value or a tuple of them."""
    values = value if isinstance(value, tuple) else (value,)
    return [v for v in values if isinstance(v, Tensor)]


def hold(tensor: Tensor, stream: Any) -> None:
    """Have the allocator wait for a stream's work before it gives the tensor's memory away."""
    tensor.record_stream(stream)


def on_gpu(tensor: Tensor) -> bool:
    """Return whether work on a tensor is put on streams."""
    return tensor.is_cuda


class _Kept:
    """A value and the state of its sources when it was made."""

    def __init__(self, sources: tuple[Tensor | None, ...], value: Any, made: Made | None) -> None:
        # None answers "is it the same tensor" like any other source that has gone.
        self._sources = [(_nothing if s is None else weakref.ref(s), stamp(s)) for s in sources]
        self.value = value
        #: None on the CPU, where a value is there once it is returned.
        self.made = made

    def holds(self, sources: tuple[Tensor | None, ...]) -> bool:
        """Return whether the sources are the same tensors, not written since."""
        # A loop, as this runs in every call of every layer. A stamp is taken of a tensor known from
        # before only: no other is sure to have a version counter.
        for source, (known, then) in zip(sources, self._sources, strict=True):
            if known() is not source or stamp(source) != then:
                return False
        return True


def derived(sources: tuple[Tensor | None, ...], key: Hashable, make: Callable[[], T]) -> T:
    """Return ``make()``, or what it returned before if no source has changed since.

    A source counts as changed when it is another tensor, lives in other memory, was written in
    place (its version counter moved), or had a step of an optimizer. Writing through
    ``tensor.data`` elsewhere moves no counter and is not seen: write under ``torch.no_grad()``
    instead. Tensors made in inference mode have no counter, and those of torch's function
    transforms and fake tensors no memory; nothing is kept for them.

    Args:
        sources: the tensors the value depends on; the value lives as long as the first one.
        key: what else it depends on, and which value it is.
        make: computes the value.
    """
    first = sources[0]
    values = _cache.get(id(first))
    kept = values.get(key) if values is not None else None
    if kept is not None and kept.holds(sources) and (kept.made is None or kept.made.readable()):
        return kept.value
    value = make()
    if first is not None and all(s is None or _countable(s) for s in sources):
        made = None
        if on_gpu(first):
            if torch.cuda.is_current_stream_capturing():
                return value
            made = Made(first.device, value)
        if values is None:
            values = _cache.setdefault(id(first), {})
            _finalizers[id(first)] = weakref.finalize(first, _gone, id(first))
        values[key] = _Kept(sources, value, made)
    return value


def forget(sources: Iterable[Tensor]) -> None:
    """Drop all that is kept for tensors, and so every weak reference to them by their own values.

    ``torch.utils.swap_tensors`` takes no tensor that somebody refers to.
    """
    for source in sources:
        finalizer = _finalizers.pop(id(source), None)
        if finalizer is not None:
            finalizer.detach()
            _cache.pop(id(source), None)


def _gone(source: int) -> None:
    _cache.pop(source, None)
    _finalizers.pop(source, None)


def _nothing() -> None:
    return None


def stamp(source: Tensor | None) -> tuple[int, int, torch.dtype, int] | None:
    """Return what changes when a tensor is written, but through ``.data`` by no optimizer."""
    if source is None:
        return None
    return (source._version, source.data_ptr(), source.dtype, _steps.get(id(source), 0))


def _countable(source: Tensor) -> bool:
    return (
        type(source) in (Tensor, nn.Parameter, nn.Buffer)
        and not source.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(source)
    )
