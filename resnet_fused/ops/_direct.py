"""How fused modules call ops, and ops each other: past torch's dispatcher where nobody listens.

The dispatcher and torch.library's layer of autograd take 60 to 90 us a call in forward and some
50 us in backward (Zen 5, one thread), for convolutions of which many take a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

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

#: What an argument is of where nobody else has a say in it; a SymInt, say, is of none of them.
_PLAIN = frozenset(
    {Tensor, nn.Parameter, torch.Size, torch.dtype, type(None), bool, int, float, str, tuple, list}
)


def call(name: str, *args: Any) -> Any:
    """Return ``torch.ops.resnet_fused.<name>(*args)``, in a backward of arguments of its forward.

    It goes by the dispatcher in grad mode, where double backward is refused.
    """
    if torch.is_grad_enabled() or watched(args):
        return getattr(torch.ops.resnet_fused, name)(*args)
    return RUN[name](*args)


def record(name: str, *args: Any) -> Any:
    """Return ``torch.ops.resnet_fused.<name>(*args)``, in a forward."""
    if torch.compiler.is_compiling() or watched(args):
        return getattr(torch.ops.resnet_fused, name)(*args)
    return (RECORD if torch.is_grad_enabled() else PLAIN)[name](*args)


def record_handing_on(name: str, x: Tensor, *args: Any) -> Any:
    """Return ``torch.ops.resnet_fused.<name>(x, *args)`` and x, for its other readers to read.

    The gradient by these goes to the op's backward, which adds it to its own while it writes it; by
    themselves they would have autograd add two maps in a pass of its own. Not for torch.compile, to
    which an op's result is never its argument.
    """
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
