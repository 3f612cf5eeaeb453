"""How fused modules call ops, and ops each other: past torch's dispatcher where nobody listens.

The dispatcher and torch.library's layer of autograd take 60 to 90 us a call in forward and some
50 us in backward (Zen 5, one thread), for convolutions of which many take a millisecond.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

#: By an op's name, what runs it on arguments that are known to fit; filled by `_register`.
RUN: dict[str, Callable[..., Any]] = {}
#: By an op's name, what checks its arguments, casts them for autocast, runs it and has autograd
#: record it; filled by `_register` for the ops of a forward.
RECORD: dict[str, Callable[..., Any]] = {}
#: By an op's name, the same without autograd.
PLAIN: dict[str, Callable[..., Any]] = {}
#: Like RECORD, with the first argument handed on as a last result.
HANDING_ON: dict[str, Callable[..., Any]] = {}
#: By the name of an op of a forward, what :class:`resnet_fused.ops._tape.Tape` makes of it.
TAPED: dict[str, Taped] = {}

#: What an argument is of where nobody else has a say in it; a SymInt, say, is of none of them.
_PLAIN = frozenset(
    {Tensor, nn.Parameter, torch.Size, torch.dtype, type(None), bool, int, float, str, tuple, list}
)


class Taped(NamedTuple):
    """An op of a forward without autograd and autocast, and its callables of an :class:`Op`."""

    run: Callable[..., Any]
    setup_context: Callable[..., None]
    backward: Callable[..., Any]


class Recorder(Protocol):
    """What records a thread's ops in autograd's place."""

    def record(self, name: str, args: tuple[Any, ...], *, hands_on: bool = False) -> Any:
        """Run an op and record it."""

    def needs(self, x: Tensor) -> bool:
        """Return whether a gradient of ``x`` is wanted."""


class _Active(threading.local):
    recorder: Recorder | None = None


_active = _Active()


@contextlib.contextmanager
def recording_on(recorder: Recorder) -> Iterator[None]:
    """Have this thread's ops recorded by ``recorder``, and not by autograd."""
    assert _active.recorder is None
    _active.recorder = recorder
    try:
        yield
    finally:
        _active.recorder = None


def records(x: Tensor) -> bool:
    """Return whether what is computed of ``x`` now will have a backward."""
    if _active.recorder is not None:
        return _active.recorder.needs(x)
    return x.requires_grad and torch.is_grad_enabled()


def call(name: str, *args: Any) -> Any:
    """Return ``torch.ops.resnet_fused.<name>(*args)``, in a backward of arguments of its forward.

    It goes by the dispatcher in grad mode, where double backward is refused.
    """
    if torch.is_grad_enabled() or watched(args):
        return getattr(torch.ops.resnet_fused, name)(*args)
    return RUN[name](*args)


def record(name: str, *args: Any) -> Any:
    """Return ``torch.ops.resnet_fused.<name>(*args)``, in a forward."""
    if _active.recorder is not None:
        return _active.recorder.record(name, args)
    if torch.compiler.is_compiling() or watched(args):
        return getattr(torch.ops.resnet_fused, name)(*args)
    return (RECORD if torch.is_grad_enabled() else PLAIN)[name](*args)


def record_handing_on(name: str, x: Tensor, *args: Any) -> Any:
    """Return ``torch.ops.resnet_fused.<name>(x, *args)`` and x, for its other readers to read.

    The gradient by these goes to the op's backward, which adds it to its own while it writes it; by
    themselves they would have autograd add two maps in a pass of its own. Not for torch.compile, to
    which an op's result is never its argument.
    """
    if _active.recorder is not None:
        return _active.recorder.record(name, (x, *args), hands_on=True)
    return HANDING_ON[name](x, *args)


def watched(args: Iterable[Any]) -> bool:
    """Return whether a mode, a trace, a profiler or a subclass of Tensor wants to see an op."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
        or torch.autograd._profiler_enabled()
        or not _PLAIN.issuperset(map(type, args))
    )


def recorded(
    run: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    *,
    hands_on: bool = False,
) -> Callable[..., Any]:
    """Return ``run`` as a function with gradients, by the callables of an :class:`Op`."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            result = run(*args)
            setup_context(ctx, args, result)
            # Not a view to autograd, but with x's memory and its count of writes.
            return (*result, args[0].detach()) if hands_on else result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    apply: Callable[..., Any] = Recorded.apply
    return apply
