"""Registration of ops with torch: no other file makes an op with ``torch.library``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from resnet_fused.backends import choose
from resnet_fused.ops import _casts, _direct
from resnet_fused.ops._checks import AUTOCAST_DEVICES
from resnet_fused.ops._op import Op

NAMESPACE = "resnet_fused"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
#: What goes past the dispatcher; a subclass never does.
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


def register(op: Op) -> None:
    """Make ``torch.ops.resnet_fused.<name>`` exist, with every transform torch knows."""
    qualified = f"{NAMESPACE}::{op.name}"
    _LIBRARY.define(op.name + op.schema, tags=(torch.Tag.needs_fixed_stride_order,))
    run = _direct.RUN[op.name] = _runner(op)
    checked = _checked(op, run)
    _LIBRARY.impl(op.name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, _checked(op, op.fake), lib=_LIBRARY)
    if not op.mutates:
        torch.library.register_autograd(
            qualified,
            op.backward or _refuse(op),
            setup_context=op.setup_context,
            lib=_LIBRARY,
        )
    handle = getattr(torch.ops.resnet_fused, op.name)
    for device in AUTOCAST_DEVICES:
        _LIBRARY.impl(op.name, _autocast(op, handle.default, device), f"Autocast{device.upper()}")
    register_flop_formula(handle)(op.flops)
    if op.mutates:
        # Of statistics that were just computed; a backend looks at the rest as it must anyway.
        _direct.RECORD[op.name] = _direct.PLAIN[op.name] = run
    elif op.setup_context and op.backward:
        callables = (op.setup_context, op.backward)
        _direct.RECORD[op.name] = _under_autocast(op, _direct.recorded(checked, *callables))
        _direct.PLAIN[op.name] = _under_autocast(op, checked)
        _direct.TAPED[op.name] = _direct.Taped(checked, *callables)
        if op.hands_on:
            again = functools.partial(_direct.record, op.name)
            recorded = _direct.recorded(again, *callables, hands_on=True)
            _direct.HANDING_ON[op.name] = _under_autocast(op, recorded)


def _refuse(op: Op) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{op.name}: has no gradient of its own: use the op it is a part of. Where that "
            "is a backward, double backward is not supported: use rf.unfuse(model)"
        )

    return backward


def _checked(op: Op, run: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        op.check(*args)
        return run(*args)

    return kernel


def _runner(op: Op) -> Callable[..., Any]:
    otherwise = op.decomposition or op.reference

    def runner(*args: Any) -> Any:
        if not op.mutates:
            args = _as_written(args)
        run = choose(op.name, *args)
        try:
            return (run or otherwise)(*args)
        except torch.OutOfMemoryError as error:
            # Whatever was to be allocated: an output, partial sums, a copy in another layout.
            raise torch.OutOfMemoryError(f"{op.name} on {_in_words(op, args)}: {error}") from error

    return runner


def _as_written(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with their values in memory, as kernels take addresses.

    A tensor may be the negative of what its memory holds, such as the gradient of an imaginary
    part. torch's dispatcher takes care of it, but not every call goes there.
    """
    for a in args:  # a loop over types takes 1.0 us of a call, any() of isinstance() 1.6
        if type(a) in _TENSORS and a.is_neg():
            return tuple(a.resolve_neg() if type(a) in _TENSORS else a for a in args)
    return args


def _in_words(op: Op, args: tuple[Any, ...]) -> str:
    """Return an op's tensors in words, such as ``x (8, 64, 56, 56) in torch.float16 on cuda:0``."""
    named = zip(inspect.signature(op.check).parameters, args, strict=True)
    words = [f"{n} {tuple(a.shape)}" for n, a in named if isinstance(a, torch.Tensor)]
    return f"{', '.join(words)} in {args[0].dtype} on {args[0].device}"


def _under_autocast(op: Op, recorded: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``recorded`` with what the dispatcher does before autograd sees an op."""
    autocasts = {device: _autocast(op, recorded, device) for device in AUTOCAST_DEVICES}

    def run(*args: Any) -> Any:
        device = args[0].device.type
        cast = device in autocasts and torch.is_autocast_enabled(device)
        return autocasts[device](*args) if cast else recorded(*args)

    return run


def _autocast(op: Op, handle: Any, device: str) -> Callable[..., Any]:
    """Cast the arguments that the op names, and those alone, then leave autocast.

    torch's own ``register_autocast`` casts every float argument, statistics included.
    """
    names = list(inspect.signature(op.check).parameters)
    kept = {names.index(name): op.kept_by_autocast(name, device) for name in op.autocast}
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(at: int, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value if value.dtype in kept[at] else _casts.cast(value, dtype)
        return value

    def autocast(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return handle(*(cast(i, a, dtype) if i in kept else a for i, a in enumerate(args)))

    return autocast
