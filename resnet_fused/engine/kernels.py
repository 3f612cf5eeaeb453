"""Which calls of a captured pass run on native kernels, and how they are bound to memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import AUTO, ORDER, choose, cpu, requested
from resnet_fused.engine.capture import Call, Captured, Ref, refs
from resnet_fused.ops._checks import FLOAT_DTYPES

_CONV = torch.ops.resnet_fused.conv_bn_act.default
_HEAD = torch.ops.resnet_fused.avg_pool_linear.default
_MAX_POOL = torch.ops.aten.max_pool2d.default
_AVG_POOL = torch.ops.aten.adaptive_avg_pool2d.default
_FLATTEN = torch.ops.aten.flatten.using_ints
_LINEAR = torch.ops.aten.linear.default

#: ``bind(x, residual, y, scratch)`` returns a call that reads and writes these very buffers.
Bind = Callable[[Tensor, Tensor | None, Tensor, Tensor], Callable[[], None]]


class Kernel(NamedTuple):
    """A native kernel for a given number of images."""

    bind: Bind
    scratch_bytes: int


class Native(NamedTuple):
    """A call that native kernels can run, image by image or all at once."""

    x: Any
    residual: Any
    #: ``make(images)`` returns the kernel for that many images.
    make: Callable[[int], Kernel]


def adopt(call: Call, args: tuple[Any, ...]) -> Native | None:
    """Return how native kernels run ``call``, given what its arguments are, or None.

    All three kinds treat every image by itself, so a batch may be split.
    """
    recogniser = {_CONV: _convolution, _MAX_POOL: _max_pool, _HEAD: _head}.get(call.target)
    if recogniser is None or call.kwargs or requested() not in (AUTO, "cpu") or cpu.available():
        return None
    x, residual = call.args[0], call.args[4] if call.target is _CONV else None
    operands = [o for o in (x, residual) if isinstance(o, Ref)]
    # Weights are packed once, so they have to be constants.
    if not isinstance(x, Ref) or len(operands) != len(list(refs(call))):
        return None
    if any(not _usable(o) for o in (args[0], None if residual is None else args[4])):
        return None
    make = recogniser(args)
    return make and Native(x, residual, make)


def _usable(operand: Tensor | None) -> bool:
    if operand is None:
        return True
    autocast = torch.is_autocast_enabled(operand.device.type)
    channels_last = operand.is_contiguous(memory_format=torch.channels_last)
    return bool(operand.numel()) and channels_last and not autocast and not cpu.declines(operand)


def _convolution(args: tuple[Any, ...]) -> Callable[[int], Kernel] | None:
    x, weight, scale, shift, _, stride, padding, dilation, groups, act = args
    if choose("conv_bn_act", *args) is not cpu.conv_bn_act:
        return None

    def make(images: int) -> Kernel:
        shape = (images, *x.shape[1:])
        conv = cpu.Convolution(shape, weight, stride, padding, dilation, groups)
        vectors = cpu.as_vector(scale), cpu.as_vector(shift)

        def bind(x: Tensor, residual: Tensor | None, y: Tensor, scratch: Tensor) -> Any:
            return conv.bind(x, *vectors, residual, y, scratch, act)

        return Kernel(bind, conv.scratch_bytes)

    return make


def _max_pool(args: tuple[Any, ...]) -> Callable[[int], Kernel] | None:
    kernel, stride, padding, dilation, ceil_mode = _pool_arguments(*args[1:])
    if ceil_mode or any(v != 1 for v in dilation):
        return None
    if any(len(set(pair)) != 1 for pair in (kernel, stride, padding)):
        return None

    def bind(x: Tensor, residual: Tensor | None, y: Tensor, scratch: Tensor) -> Any:
        return cpu.bind_max_pool(x, y, kernel[0], stride[0], padding[0])

    return lambda images: Kernel(bind, 0)


def _pool_arguments(
    kernel: list[int],
    stride: list[int] | None = None,
    padding: list[int] | None = None,
    dilation: list[int] | None = None,
    ceil_mode: bool = False,
) -> tuple[list[int], list[int], list[int], list[int], bool]:
    return kernel, stride or kernel, padding or [0], dilation or [1], ceil_mode


def _head(args: tuple[Any, ...]) -> Callable[[int], Kernel] | None:
    x, weight, bias = args
    if choose("avg_pool_linear", *args) is not cpu.avg_pool_linear:
        return None

    def make(images: int) -> Kernel:
        def bind(x: Tensor, residual: Tensor | None, y: Tensor, scratch: Tensor) -> Any:
            return cpu.bind_head(x, weight, bias, y, scratch)

        return Kernel(bind, images * x.shape[1] * 4)

    return make


def merge_heads(captured: Captured) -> Captured:
    """Write each average pool → flatten → linear in a row as one call of avg_pool_linear.

    Only where nobody else reads the parts, and the op takes the weights. A backend asked for by
    name was not asked for an op that the model does not call.
    """
    if requested() in ORDER and not hasattr(ORDER[requested()], "avg_pool_linear"):
        return captured
    made = {call.out: call for call in captured.calls}
    readers: dict[int, int] = {}
    for ref in [*(r for c in captured.calls for r in refs(c)), *captured.outputs]:
        if isinstance(ref, Ref):
            readers[ref.index] = readers.get(ref.index, 0) + 1

    def source(call: Call | None, target: Any) -> Call | None:
        """Return the call of ``target`` that made the first argument, if it is its only reader."""
        ref = call.args[0] if call else None
        if not isinstance(ref, Ref) or readers[ref.index] != 1 or ref.index not in made:
            return None
        return made[ref.index] if made[ref.index].target is target else None

    dropped: set[int] = set()
    merged: dict[int, Call] = {}
    for call in captured.calls:
        flatten = source(call, _FLATTEN) if call.target is _LINEAR else None
        pool = source(flatten, _AVG_POOL)
        if flatten is None or pool is None or call.out - pool.out != 2:
            continue
        if flatten.args[1:] == (1,) and list(pool.args[1]) == [1, 1]:
            weight, bias = call.args[1], call.args[2] if len(call.args) > 2 else None
            if _is_classifier(weight, bias):
                merged[call.out] = Call(_HEAD, (pool.args[0], weight, bias), {}, call.out)
                dropped |= {flatten.out, pool.out}
    calls = tuple(merged.get(c.out, c) for c in captured.calls if c.out not in dropped)
    return Captured(calls, captured.outputs, captured.spec, captured.size)


def _is_classifier(weight: Any, bias: Any) -> bool:
    """Return whether avg_pool_linear takes the weights of a linear layer behind a pool.

    With one input feature the pooled map may have been one without a batch, (C, H, W).
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] < 2:
        return False
    if weight.dtype not in FLOAT_DTYPES:
        return False
    if bias is None:
        return True
    return (
        isinstance(bias, Tensor) and bias.shape == weight.shape[:1] and bias.dtype == weight.dtype
    )
