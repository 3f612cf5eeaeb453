"""The native CUDA kernels of the extension: BatchNorm's passes, the stem, Hopper's 1x1 convolution.

Maps are channels_last. Convolutions within the ops of training are torch's own, but for the stem's,
and on Hopper for the data gradient of a 1x1 with something to add to it.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import (
    _cuda_stem,
    _hopper_gemm,
    _torch_conv,
    _training_kernels,
    _training_ops,
    native,
)

# The stem of the paper's networks.
from resnet_fused.backends._cuda_stem import conv_bn_act_max_pool as conv_bn_act_max_pool
from resnet_fused.backends._sizes import is_product, pool_of

# Ops of training, run as they stand there.
from resnet_fused.backends._training_ops import bn_act as bn_act
from resnet_fused.backends._training_ops import bn_act_backward as bn_act_backward
from resnet_fused.backends._training_ops import (
    bn_act_backward_apply as bn_act_backward_apply,
)
from resnet_fused.backends._training_ops import (
    bn_act_backward_reduce as bn_act_backward_reduce,
)
from resnet_fused.backends._training_ops import bn_act_max_pool as bn_act_max_pool
from resnet_fused.backends._training_ops import (
    bn_act_max_pool_backward as bn_act_max_pool_backward,
)
from resnet_fused.backends._training_ops import bn_update_stats as bn_update_stats
from resnet_fused.backends._training_ops import dual_bn_act as dual_bn_act
from resnet_fused.backends._training_ops import (
    dual_bn_act_backward_apply as dual_bn_act_backward_apply,
)
from resnet_fused.backends._training_ops import (
    dual_bn_act_backward_reduce as dual_bn_act_backward_reduce,
)
from resnet_fused.backends._training_ops import max_pool_backward as max_pool_backward
from resnet_fused.backends.native import DTYPE_NAMES

ADVICE = (
    "Use an NVIDIA GPU from Ampere on (sm_80) with a CUDA build of torch, and build the extension "
    "with nvcc: `RESNET_FUSED_CUDA=1 pip install .` in the source of resnet_fused"
)

#: Dtypes in which a fused training step was measured to be no slower than torch's: none so far.
FASTER_IN_TRAINING: Mapping[torch.dtype, int] = {}
#: Likewise of a step that is one CUDA graph, for convolutions of at least so many multiply-adds:
#: ResNet-50 at batch 256 had 1.7 times eager's speed and at batch 64 1.3; no convolution of the
#: latter has fewer. Measured on an H200, carried over to other GPUs.
FASTER_IN_A_GRAPH: Mapping[torch.dtype, int] = {torch.bfloat16: 800_000_000}

#: Ops that "auto" leaves to the backends after this one where `tune` has not measured a call, but
#: for those of :func:`faster_unmeasured`.
ONLY_MEASURED = ("conv_bn_act",)

#: The sides of what is pooled, by an op's first arguments.
_POOLED: Mapping[str, Callable[..., tuple[int, ...]]] = {
    "bn_act_max_pool": lambda x, *_: tuple(x.shape),
    "bn_act_max_pool_backward": lambda grad, index, taken, x, *_: tuple(x.shape),
    "max_pool_backward": lambda grad, index, x_size, *_: tuple(x_size),
}


@functools.cache
def available() -> str | None:
    """Return why the native CUDA kernels cannot be used here, or None."""
    extension = native.extension()
    if extension is None:
        return f"the extension is not loaded: {native.load_error()}"
    if not hasattr(extension, "cuda"):
        return "the extension was built without CUDA kernels"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "there is no CUDA GPU that torch can use"
    fault: str | None = extension.cuda.fault()
    if fault:
        return f"CUDA does not start: {fault}"
    reasons = [_declines_device(i) for i in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


@functools.cache
def _declines_device(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    archs = native.loaded().cuda.archs.split()
    if any(runs_on(arch, capability) for arch in archs):
        return None
    name = torch.cuda.get_device_name(device)
    number = "".join(map(str, capability))
    return f"was built for {', '.join(archs)}; cuda:{device} is a {name} of sm_{number}"


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Return whether code built for ``arch``, such as "90a" or "100+PTX", runs on a device.

    Machine code runs on its own major version, from its minor version on; with "a" on that very
    device, with "f" on its family; PTX on all later ones.
    """
    code, _, ptx = arch.partition("+")
    number, special = int(code.rstrip("af")), code.rstrip("0123456789")
    own = (number // 10, number % 10)
    if special == "a":
        return capability == own
    if capability[0] == own[0] and capability[1] >= own[1]:
        return True
    return bool(ptx) and not special and capability >= own


def supports(op: str, x: Tensor, *args: Any) -> str | None:
    """Return why the kernels do not take this call, or None."""
    if x.device.type != "cuda":
        return f"runs on CUDA GPUs, x is on {x.device}"
    if x.dtype not in DTYPE_NAMES:
        return f"takes float32, bfloat16 and float16, x is {x.dtype}"
    if op in _POOLED and (pool := pool_of(op, args)):
        if any(first != second for first, second in pool):
            return f"takes square pools, got {pool}"
        size = _POOLED[op](x, *args)
        if math.prod(size[1:]) >= 2**31:
            return f"pools images of up to 2^31 elements, got {size}"
    if op == "conv_bn_act" and not _is_stem(x, *args):
        return _hopper_gemm.declines(x, *args)
    if op == "conv_bn_act_max_pool" and (reason := _cuda_stem.declines(x, *args)):
        return reason
    return _declines_device(x.device.index)


def faster_unmeasured(op: str, *args: Any) -> bool:
    """Return whether a call it supports is faster here than by the backends after this one.

    The stem is: in bfloat16 at batch 256 it took 327 us, by Triton's fastest tile 835, and with its
    pool, at batch 1, 10 for 46. Measured on an H200, carried over to other GPUs and float16.
    """
    if op != "conv_bn_act":
        return False
    x, weight, _, _, residual, *_ = args
    return _is_stem(*args) or _hopper_gemm.beats_triton(x, weight, residual)


def candidates(op: str, *args: Any) -> dict[str, Callable[..., Tensor]]:
    """Return the ways to run this call, by name, for the tuner: tiles, or bands of rows."""
    if op == "conv_bn_act" and not _is_stem(*args):
        return _hopper_gemm.candidates(*args)
    if op == "conv_backward_data":
        return _data_candidates(*args)
    if op in ("conv_bn_act", "conv_bn_act_max_pool"):
        run = getattr(_cuda_stem, op)
        return _cuda_stem.candidates(run, args[0], pool=op == "conv_bn_act_max_pool")
    return {"default": getattr(sys.modules[__name__], op)}


def _is_stem(
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
) -> bool:
    geometry = (stride, padding, dilation, groups)
    return residual is None and not _cuda_stem.declines_convolution(x, weight.shape, *geometry)


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
    """Run the op: the stem of the paper's networks, or 1x1 by CUTLASS, on sm_90 alone."""
    args = (x, weight, scale, shift, residual, stride, padding, dilation, groups, act)
    return (_cuda_stem if _is_stem(*args) else _hopper_gemm).conv_bn_act(*args)


def bn_apply(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str | None
) -> Tensor:
    """Run the op."""
    return _training_kernels.bn_apply(x, scale, shift, residual, relu=act == "relu")


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """Run the op."""
    return _training_kernels.add_relu(x, residual)


def conv_bn_stats(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op; the convolution is torch's own, but for the stem."""
    geometry = (stride, padding, dilation, groups)
    if _cuda_stem.declines_convolution(x, weight.shape, *geometry):
        y = _torch_conv.forward(x, weight, *geometry)
    else:
        y = _cuda_stem.convolve(x, weight.to(x.dtype))
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
    a, _ = bn_act(x, mean, var, bn_weight, bn_bias, None, eps, act)
    return conv_bn_stats(a, weight, stride, padding, dilation, groups)


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
    """Run the op; the gradient is torch's own, but for the stem's."""
    geometry = (stride, padding, dilation, groups)
    if dtype != grad.dtype and is_product(weight_size, stride, padding, groups):
        return _torch_conv.product(grad, x, channels_last, dtype)
    if x.numel() == 0 or _cuda_stem.declines_convolution(x, weight_size, *geometry):
        return _torch_conv.backward_weight(grad, x, weight_size, *geometry, channels_last, dtype)
    return _cuda_stem.backward_weight(grad, x, weight_size, channels_last).to(dtype)


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
    """Run the op: torch's own gradient, but on Hopper that of a 1x1 with something to add to it.

    That is a 1x1 too, by the weight turned, and adds in its epilogue.
    """
    geometry = (stride, padding, dilation, groups)
    if residual is not None and grad.numel():
        product = _as_product(grad, weight, residual, *geometry)
        if not _hopper_gemm.declines(*product):
            return _hopper_gemm.conv_bn_act(*product)
    return _torch_conv.backward_data(grad, weight, x_size, *geometry, residual)


def _as_product(
    grad: Tensor, weight: Tensor, residual: Tensor | None, *geometry: Any
) -> tuple[Any, ...]:
    """Return conv_bn_act's arguments for the data gradient of a 1x1 of stride 1.

    With a view of the weight, as what is declined is to copy nothing.
    """
    turned = weight.to(grad.dtype).transpose(0, 1)
    return grad, turned, None, None, residual, *geometry, None


def _data_candidates(
    grad: Tensor,
    weight: Tensor,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {"default": conv_backward_data}
    product = _as_product(grad, weight, residual, stride, padding, dilation, groups)
    if not grad.numel() or _hopper_gemm.declines(*product):
        return found
    kernels = _hopper_gemm.candidates(*product)
    if residual is not None:  # which the default runs
        del kernels[_hopper_gemm.heuristic(residual)]
    return found | {name: functools.partial(_by_product, kernel=name) for name in kernels}


def _by_product(
    grad: Tensor,
    weight: Tensor,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    kernel: str,
) -> Tensor:
    product = _as_product(grad, weight, residual, stride, padding, dilation, groups)
    return functools.partial(_hopper_gemm.conv_bn_act, kernel=kernel)(*product)


bn_act_conv_backward = _training_ops.chained_backward(conv_backward_data, conv_backward_weight)
bn_act_conv_backward_data = _training_ops.chained_backward_data(conv_backward_data)
bn_act_conv_backward_weight = _training_ops.chained_backward_weight(conv_backward_weight)
