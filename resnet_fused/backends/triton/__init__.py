"""The Triton kernels: every op on NVIDIA GPUs from sm_80, in float32, bfloat16 and float16.

This module does not import triton; what does (``run``, ``launch``, ``kernels``) is loaded by the
first call. With TRITON_INTERPRET=1 set before that, Triton's interpreter runs the same kernels on
CPU tensors, slowly: so only for a call that asked for this backend by name.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _requested
from resnet_fused.backends._bn_math import bn_update_stats as bn_update_stats
from resnet_fused.backends.triton import pair_tiles, training_conv

# Ops of training, run as they stand there.
from resnet_fused.backends.triton.covariance import channel_covariance as channel_covariance
from resnet_fused.backends.triton.covariance import pointwise_bn_act as pointwise_bn_act
from resnet_fused.backends.triton.covariance import (
    pointwise_bn_act_backward as pointwise_bn_act_backward,
)
from resnet_fused.backends.triton.covariance import (
    pointwise_bn_gradients as pointwise_bn_gradients,
)
from resnet_fused.backends.triton.covariance import pointwise_bn_stats as pointwise_bn_stats
from resnet_fused.backends.triton.stem import Stem
from resnet_fused.backends.triton.training import bn_act as bn_act
from resnet_fused.backends.triton.training import bn_act_backward as bn_act_backward
from resnet_fused.backends.triton.training import bn_act_backward_apply as bn_act_backward_apply
from resnet_fused.backends.triton.training import bn_act_backward_reduce as bn_act_backward_reduce
from resnet_fused.backends.triton.training import bn_act_max_pool as bn_act_max_pool
from resnet_fused.backends.triton.training import (
    bn_act_max_pool_backward as bn_act_max_pool_backward,
)
from resnet_fused.backends.triton.training import dual_bn_act as dual_bn_act
from resnet_fused.backends.triton.training import (
    dual_bn_act_backward_apply as dual_bn_act_backward_apply,
)
from resnet_fused.backends.triton.training import (
    dual_bn_act_backward_reduce as dual_bn_act_backward_reduce,
)
from resnet_fused.backends.triton.training import max_pool_backward as max_pool_backward
from resnet_fused.backends.triton.training_conv import (
    bn_act_conv_backward as bn_act_conv_backward,
)
from resnet_fused.backends.triton.training_conv import (
    bn_act_conv_backward_data as bn_act_conv_backward_data,
)
from resnet_fused.backends.triton.training_conv import (
    bn_act_conv_backward_weight as bn_act_conv_backward_weight,
)
from resnet_fused.backends.triton.training_conv import bn_act_conv_bn_stats as bn_act_conv_bn_stats
from resnet_fused.backends.triton.training_conv import conv_backward_data as conv_backward_data
from resnet_fused.backends.triton.training_conv import conv_backward_weight as conv_backward_weight
from resnet_fused.backends.triton.training_conv import conv_bn_stats as conv_bn_stats
from resnet_fused.backends.triton.training_conv import (
    relu_conv_backward_data as relu_conv_backward_data,
)

ADVICE = (
    "Use an NVIDIA GPU from Ampere on (sm_80) with a CUDA build of torch, which brings triton; "
    "or set TRITON_INTERPRET=1 before the first call to try the kernels on CPU tensors."
)
LEAST_CAPABILITY = (8, 0)
#: What CUDA takes as the second and third side of a grid.
MOST_BLOCKS = 65535
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def interpreted() -> bool:
    """Return whether kernels are interpreted; settled once, as Triton settles it on loading."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _load_error() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # a folder of that name on the path has no origin
        return "triton is not installed"
    if not interpreted() and (reason := _device_error()):
        return reason
    try:
        import triton.language  # noqa: F401
    except ImportError as error:
        return f"triton does not load: {error}"
    return None


def _device_error() -> str | None:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "there is no CUDA GPU, and TRITON_INTERPRET=1 is not set"
    devices = range(torch.cuda.device_count())
    if all(torch.cuda.get_device_capability(i) < LEAST_CAPABILITY for i in devices):
        return f"needs a GPU of sm_80 or later, {_name(0)}"
    return None


@functools.cache
def _name(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{device} is a {torch.cuda.get_device_name(device)} of sm_{major}{minor}"


@functools.cache
def _too_old(device: int) -> bool:
    return torch.cuda.get_device_capability(device) < LEAST_CAPABILITY


#: Dtypes in which a fused training step was measured to be no slower than torch's: none yet.
FASTER_IN_TRAINING: Mapping[torch.dtype, int] = {}
#: So "auto" leaves the ops of training to others where `tune` has not measured a call.
ONLY_MEASURED = (
    "conv_bn_stats", "bn_act_conv_bn_stats", "bn_act", "dual_bn_act", "bn_act_max_pool",
    "bn_act_backward", "bn_act_backward_reduce", "bn_act_backward_apply",
    "dual_bn_act_backward_reduce", "dual_bn_act_backward_apply", "max_pool_backward",
    "bn_act_max_pool_backward", "conv_backward_data", "conv_backward_weight",
    "bn_act_conv_backward", "bn_act_conv_backward_data", "bn_act_conv_backward_weight",
    "pointwise_bn_act", "pointwise_bn_act_backward", "relu_conv_backward_data",
)  # fmt: skip


def available() -> str | None:
    """Return why Triton kernels cannot be used here, or None."""
    return _load_error()


def supports(op: str, x: Tensor, *args: Any) -> str | None:
    """Return why the kernels do not take this call, or None."""
    by_name = _requested.name() == "triton"
    if x.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, x is {x.dtype}"
    if interpreted():
        if not by_name:
            return "its interpreter (TRITON_INTERPRET=1) runs only what asks for triton by name"
    elif x.device.type != "cuda":
        return f"runs on CUDA GPUs, x is on {x.device}"
    elif _too_old(x.device.index):
        return f"needs a GPU of sm_80 or later, {_name(x.device.index)}"
    return _DECLINES[op](x, *args) if op in _DECLINES else None


def _declines_groups(x: Tensor, weight: Tensor, *args: Any) -> str | None:
    groups = args[-2]
    if groups > MOST_BLOCKS and weight.shape[1] > 1:  # depthwise kernels have one grid for all
        return f"takes {MOST_BLOCKS} groups at most, groups={groups}"
    return None


def _declines_stem(x: Tensor, weight: Tensor, *args: Any) -> str | None:
    _, _, stride, padding, dilation, groups, _, *pool = args
    if groups != 1:
        return f"takes this op with groups of 1, got {groups}"
    # Blocks are of one row and 16 channels at least.
    rows = Stem.of(x.shape, weight.shape, stride, padding, dilation, *pool).out_size[0]
    if rows > MOST_BLOCKS:
        return f"takes outputs of {MOST_BLOCKS} rows at most, got {rows}"
    if weight.shape[0] > (most := 16 * MOST_BLOCKS):
        return f"takes {most} output channels at most, weight has {weight.shape[0]}"
    return None


def _declines_head(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    most = 64 * MOST_BLOCKS  # blocks are of 64 images, and of 64 channels
    if max(x.shape[:2]) > most:
        return f"takes {most} images and channels at most, x is {tuple(x.shape)}"
    return None


def _declines_pair(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight2: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str | None,
    act2: str | None,
) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"takes both convolutions in one kernel in bfloat16 and float16, x is {x.dtype}"
    shapes = (x.shape, weight.shape, weight2.shape)
    return pair_tiles.declines(
        pair_tiles.Pair.of(*shapes, stride, padding, dilation, residual is not None)
    )


#: Why the kernel of an op does not take a call, or None, by the op's name.
_DECLINES: Mapping[str, Callable[..., str | None]] = {
    "avg_pool_linear": _declines_head, "conv_bn_act": _declines_groups,
    "conv_bn_act_conv_bn_act": _declines_pair, "conv_bn_act_max_pool": _declines_stem,
}  # fmt: skip


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
    from resnet_fused.backends.triton import run

    return run.conv_bn_act(
        x, weight, scale, shift, residual, stride, padding, dilation, groups, act
    )  # fmt: skip


def conv_bn_act_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight2: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str | None,
    act2: str | None,
) -> Tensor:
    """Run the op as one kernel; the map between the convolutions is never written."""
    from resnet_fused.backends.triton import run

    return run.conv_bn_act_conv_bn_act(
        x, weight, scale, shift, weight2, scale2, shift2, residual,
        stride, padding, dilation, act, act2,
    )  # fmt: skip


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
    """Run the op in one kernel, which keeps the map before the pool in registers."""
    from resnet_fused.backends.triton import run

    pool = (pool_size, pool_stride, pool_padding)
    return run.conv_bn_act_max_pool(
        x, weight, scale, shift, stride, padding, dilation, groups, act, *pool
    )  # fmt: skip


def avg_pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run the op; the means stay in float32."""
    from resnet_fused.backends.triton import run

    return run.avg_pool_linear(x, weight, bias)


def bn_apply(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str | None
) -> Tensor:
    """Run the op in one pass, in float32, rounded once."""
    from resnet_fused.backends.triton import run

    return run.bn_apply(x, scale, shift, residual, act)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """Run the op in one pass."""
    from resnet_fused.backends.triton import run

    return run.bn_apply(x, None, None, residual, "relu")


def candidates(op: str, *args: Any) -> dict[str, Callable[..., Tensor]]:
    """Return the ways to run this call that are worth measuring, the most promising first.

    Args:
        op: an op's name.
        args: its arguments, a call that :func:`supports` takes.

    Returns:
        By a name that stays the same, functions of the op's arguments.
    """
    from resnet_fused.backends.triton import run

    ways: dict[str, Callable[..., dict[str, Callable[..., Any]]]] = {
        "conv_bn_act": run.conv_candidates,
        "conv_bn_act_max_pool": run.stem_candidates,
        "conv_bn_act_conv_bn_act": run.pair_candidates,
        "conv_bn_stats": training_conv.conv_bn_stats_candidates,
        "bn_act_conv_bn_stats": training_conv.bn_act_conv_bn_stats_candidates,
        "conv_backward_data": training_conv.conv_backward_data_candidates,
    }
    if op in ways:
        return ways[op](*args)
    return {"default": getattr(sys.modules[__name__], op)}
