"""The native CPU kernels of the extension, on channels_last float32, bfloat16 and float16."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import (
    _cpu_conv,
    _cpu_once,
    _cpu_weight_gradient,
    _torch_conv,
    _training_kernels,
    _training_ops,
    native,
    onednn,
)
from resnet_fused.backends._cpu_conv import Call, Convolution
from resnet_fused.backends._cpu_once import Norm, convolve_once
from resnet_fused.backends._outputs import empty_channels_last, scratch
from resnet_fused.backends._sizes import pool_of, pool_shape

# Ops of training, run as they stand there.
from resnet_fused.backends._training_ops import bn_act as bn_act
from resnet_fused.backends._training_ops import bn_act_backward as bn_act_backward
from resnet_fused.backends._training_ops import bn_act_backward_apply as bn_act_backward_apply
from resnet_fused.backends._training_ops import bn_act_backward_reduce as bn_act_backward_reduce
from resnet_fused.backends._training_ops import bn_act_max_pool as bn_act_max_pool
from resnet_fused.backends._training_ops import bn_update_stats as bn_update_stats
from resnet_fused.backends._training_ops import dual_bn_act as dual_bn_act
from resnet_fused.backends._training_ops import (
    dual_bn_act_backward_apply as dual_bn_act_backward_apply,
)
from resnet_fused.backends._training_ops import (
    dual_bn_act_backward_reduce as dual_bn_act_backward_reduce,
)
from resnet_fused.backends._training_ops import max_pool_backward as max_pool_backward
from resnet_fused.backends.native import DTYPE_NAMES, as_vector

ADVICE = "Build the extension with GCC from 10 on: `pip install .` in the source of resnet_fused"

#: Dtypes in which a fused training step is no slower than torch's, for convolutions of at least so
#: many multiply-adds: each costs some 0.2 ms more in Python than torch's own layers. Two threads of
#: a Zen 5, blocks of two or three convolutions beside eager torch's in float32: with 19 million
#: each 0.7x, with 6 to 14 million 0.9x, 26 to 58 million 1.0x, 75 million 1.0 to 1.2x. All of
#: ResNet-34 and -50 but one 1x1 have more at batch 1: bfloat16 1.0x and 1.1x, float32 1.1x. Where
#: torch imitates a dtype, a million take it a millisecond: ResNet-20 at batch 1, with 2 million
#: each, is 4 times as fast, ResNet-34 12 times (bfloat16, a Zen 3). float16 where oneDNN computes
#: in it was not measured.
FASTER_IN_TRAINING: Mapping[torch.dtype, int] = {
    dtype: 40_000_000 if onednn.computes_in(dtype) else 1_000_000 for dtype in DTYPE_NAMES
}

#: Run unmeasured but for what :func:`faster_unmeasured` leaves to oneDNN.
ONLY_MEASURED = ("conv_bn_act", "conv_bn_act_max_pool")

#: Of the widest registers.
_LANES = 16
#: Window and stride of the native max pool, in pixels.
_LARGEST_POOL = 4096


def available() -> str | None:
    """Return why the native CPU kernels cannot be used here, or None."""
    extension = native.extension()
    if extension is None:
        return f"the extension is not loaded: {native.load_error()}"
    if extension.cpu_isa() == "none":
        return "this processor has neither AVX2 nor AVX-512"
    return None


def supports(op: str, x: Tensor, *args: Any) -> str | None:
    """Return why the native kernels do not take this call, or None."""
    if op == "bn_update_stats":
        return None if x.is_cpu else f"runs on the CPU, running_mean is on {x.device}"
    reason = declines(x)
    if reason is None and (pool := pool_of(op, args)):
        return _declines_pool(*pool)
    return reason


def faster_unmeasured(op: str, x: Tensor, weight: Tensor, *args: Any) -> bool:
    """Return whether a convolution it supports is faster here than by oneDNN.

    Where a group has fewer channels than a register has lanes, it is not: on two threads of an
    Emerald Rapids at batch 4, in float32, oneDNN took 0.12 of the time with one channel in each of
    64 groups, 0.61 with 4, 0.73 with 8, 0.94 with 16, 1.13 with 32. Nor where oneDNN has AMX for
    groups in bfloat16, which these kernels have not: 0.20 to 0.46 there, 0.07 with one channel.
    What oneDNN has no right answer to is not left to torch, whose own it is.
    """
    if _cpu_conv.left_to_torch(x.dtype):
        geometry = args[3:6] if op == "conv_bn_act" else args[2:5]
        return onednn.breaks_at(x, weight, *geometry) is not None
    groups = x.shape[1] // weight.shape[1]
    if groups == 1 or onednn.supports(op, x, weight, *args):
        return True
    return weight.shape[0] // groups >= _LANES and not _cpu_conv.multiplies_tiles(x.dtype)


def _declines_pool(*pool: Any) -> str | None:
    names = ("pool_size", "pool_stride", "pool_padding")
    for name, (first, second) in zip(names, pool, strict=True):
        if first != second:
            return f"pools with one {name} for both directions, got {(first, second)}"
        if first > _LARGEST_POOL:
            return f"pools with {name} of at most {_LARGEST_POOL}, got {first}"
    return None


def declines(x: Tensor) -> str | None:
    """Return why no kernel takes ``x``, or None."""
    if x.device.type != "cpu":
        return f"runs on the CPU, x is on {x.device}"
    if x.dtype not in DTYPE_NAMES:
        return f"takes float32, bfloat16 and float16, x is {x.dtype}"
    return None


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
) -> Tensor:
    """Run the op; the packed weights are kept until the weight changes."""
    conv = Convolution(x.shape, weight, stride, padding, dilation, groups)
    x, residual = native.as_image(x), None if residual is None else native.as_image(residual)
    y = empty_channels_last(conv.output_shape, x.dtype)
    work = scratch(conv.scratch_bytes)
    conv.bind(x, as_vector(scale), as_vector(shift), residual, y, work, act)()
    return y


def conv_bn_act_max_pool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Tensor:
    """Run the op as two kernels; the map between them lives in memory that is used again."""
    y = conv_bn_act(x, weight, scale, shift, None, stride, padding, dilation, groups, act)
    pooled = empty_channels_last(pool_shape(y.shape, pool_size, pool_stride, pool_padding), y.dtype)
    bind_max_pool(y, pooled, pool_size[0], pool_stride[0], pool_padding[0])()
    return pooled


def avg_pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run the op; in bfloat16 the means are rounded to it, as torch's.

    On a Zen 5, 7x7 maps to 1000 classes at batch 1, 8 and 32, in CPU time against torch's mean and
    linear: one thread bfloat16, 2048 channels 3.0x, 1.9x, 2.2x, 512 channels 2.4x, 1.9x, 1.5x;
    float32 1.1x, 2.3x, 1.6x and 0.9x, 2.0x, 1.7x; two threads, the caller's time, bfloat16 1.7x and
    more.
    """
    x = native.as_image(x)
    n, c = x.shape[:2]
    y = torch.empty(n, len(weight), dtype=x.dtype)
    bind_head(x, weight, bias, y, scratch(4 * n * c))()
    return y


def conv_bn_stats(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op; the convolution is torch's own where packing the weights anew would not pay."""
    return _with_moments(x, weight, (stride, padding, dilation, groups), None)


def _with_moments(
    x: Tensor, weight: Tensor, geometry: Sequence[Any], norm: Norm | None
) -> tuple[Tensor, Tensor, Tensor]:
    if declines(x) is None:
        made = convolve_once(x, weight, *geometry, norm=norm, with_stats=True)
        if made is not None:
            y, mean, var = made
            return y, mean, var
    if norm is not None:
        x, _ = bn_act(x, norm.mean, norm.var, norm.weight, norm.bias, None, norm.eps, norm.act)
    y = _torch_conv.forward(x, weight, *geometry)
    return y, *_training_kernels.bn_stats(y)


def bn_act_conv_bn_stats(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight: Tensor,
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op; the activation lives until the convolution has read it."""
    norm = Norm(mean, var, bn_weight, bn_bias, eps, act)
    return _with_moments(x, weight, (stride, padding, dilation, groups), norm)


def conv_backward_data(
    grad: Tensor,
    weight: Tensor,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> Tensor:
    """Run the op: a convolution of grad with turned kernels, or torch's own."""
    args = (grad, weight, x_size, stride, padding, dilation, groups, residual)
    own = _cpu_once.backward_data(*args) if declines(grad) is None else None
    return _torch_conv.backward_data(*args) if own is None else own


def conv_backward_weight(
    grad: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Run the op by Winograd's transform, directly, or by torch's own."""
    args = (grad, x, weight_size, stride, padding, dilation, groups, channels_last, dtype)
    own = _cpu_weight_gradient.backward_weight(*args) if declines(grad) is None else None
    return _torch_conv.backward_weight(*args) if own is None else own


bn_act_conv_backward = _training_ops.chained_backward(conv_backward_data, conv_backward_weight)
bn_act_conv_backward_data = _training_ops.chained_backward_data(conv_backward_data)
bn_act_conv_backward_weight = _training_ops.chained_backward_weight(conv_backward_weight)
bn_act_max_pool_backward = _training_ops.bn_act_max_pool_backward_by_parts


def bn_apply(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str | None
) -> Tensor:
    """Run the op."""
    return _training_kernels.bn_apply(x, scale, shift, residual, relu=act == "relu")


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """Run the op."""
    return _training_kernels.add_relu(x, residual)


def bind_max_pool(x: Tensor, y: Tensor, kernel: int, stride: int, padding: int) -> Call:
    """Return a call that pools ``x`` into ``y``, both channels_last and kept by the caller."""
    n, c, h, w = x.shape
    run: Call = functools.partial(
        native.loaded().max_pool, x.data_ptr(), y.data_ptr(), DTYPE_NAMES[x.dtype],
        n, h, w, c, kernel, stride, padding,
    )  # fmt: skip
    return run


def bind_head(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, scratch: Tensor) -> Call:
    """Return a call of global average pool and linear layer; the caller keeps all but weight alive.

    Args:
        x: (N, C, H, W), channels_last.
        weight: (K, C), contiguous, x's dtype.
        bias: (K,) or None, x's dtype.
        y: receives (N, K).
        scratch: at least 4 · N · C bytes.
    """
    n, c, h, w = x.shape
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    run = functools.partial(
        native.loaded().head, x.data_ptr(), weight.data_ptr(),
        native.address(bias), y.data_ptr(), scratch.data_ptr(), scratch.nbytes,
        DTYPE_NAMES[x.dtype], n, h * w, c, len(weight),
    )  # fmt: skip
    run.keeps = (weight, bias)  # type: ignore[attr-defined]
    return run
