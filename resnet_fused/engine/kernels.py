"""Which calls of a captured pass run on native kernels, and how they are bound to memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import AUTO, choose, cpu, requested
from resnet_fused.engine.capture import Call, Ref, refs

CONV = torch.ops.resnet_fused.conv_bn_act.default
HEAD = torch.ops.resnet_fused.avg_pool_linear.default
MAX_POOL = torch.ops.aten.max_pool2d.default

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
    recogniser = {CONV: _convolution, MAX_POOL: _max_pool, HEAD: _head}.get(call.target)
    if recogniser is None or call.kwargs or requested() not in (AUTO, "cpu") or cpu.available():
        return None
    x, residual = call.args[0], call.args[4] if call.target is CONV else None
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
    kernel, stride, padding, dilation, ceil_mode = pool_arguments(*args[1:])
    if ceil_mode or any(v != 1 for v in dilation):
        return None
    if any(len(set(pair)) != 1 for pair in (kernel, stride, padding)):
        return None

    def bind(x: Tensor, residual: Tensor | None, y: Tensor, scratch: Tensor) -> Any:
        return cpu.bind_max_pool(x, y, kernel[0], stride[0], padding[0])

    return lambda images: Kernel(bind, 0)


def pool_arguments(
    kernel: list[int],
    stride: list[int] | None = None,
    padding: list[int] | None = None,
    dilation: list[int] | None = None,
    ceil_mode: bool = False,
) -> tuple[list[int], list[int], list[int], list[int], bool]:
    """Return the arguments of a max pool behind its input, those left out filled in."""
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
