"""The convolutions on torch's oneDNN: convolution, bias and add in one call.

The ops under ``torch.ops.mkldnn`` are private to torch, so this is the only file that names them,
and :func:`available` probes them once before the first use.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends._derived import derived

ADVICE = "Use a torch build with oneDNN (the official wheels for x86-64 and ARM have it)."


@functools.cache
def _probe() -> str | None:
    """Run one small convolution with add and compare it with torch's own."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    try:
        x, weight, residual = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1), torch.ones(1, 2, 3, 3)
        y = _run(x, _pack(weight, None, (1, 1), (0, 0), (1, 1), 1, x.shape), None, residual,
                 (1, 1), (0, 0), (1, 1), 1)  # fmt: skip
    except (RuntimeError, AttributeError, TypeError) as error:
        return f"torch {torch.__version__} has other oneDNN ops than this package knows: {error}"
    if not torch.equal(y, torch.full_like(y, 3.0)):
        return f"torch {torch.__version__}'s oneDNN ops gave a wrong answer to the probe"
    return None


def available() -> str | None:
    """Return why oneDNN cannot be used here, or None."""
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.flags(enabled=False) is in force"
    return _probe()


def supports(op: str, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    """Return why oneDNN does not take this call, or None."""
    if x.device.type != "cpu":
        return f"runs on the CPU, x is on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, x is {x.dtype}"
    if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bfloat16 support in oneDNN (AVX-512 needed)"
    if x.numel() == 0:
        return "x is empty"
    if args[2] is not None and len(weight) == 1:
        return "its add fails on a single channel (torch 2.11)"
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
    """Run the op; the scale is folded into packed weights, kept until weight or scale change."""
    key = ("onednn", *stride, *padding, *dilation, groups, tuple(x.shape))
    packed = derived(
        (weight, scale),
        key,
        lambda: _pack(weight, scale, stride, padding, dilation, groups, x.shape),
    )
    y = _run(x, packed, shift, residual, stride, padding, dilation, groups)
    # oneDNN's own ReLU turns NaN into 0; torch.relu keeps it.
    return torch.relu_(y) if act == "relu" else y


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
    """Run conv_bn_act, then torch's own max pool."""
    y = conv_bn_act(x, weight, scale, shift, None, stride, padding, dilation, groups, act)
    y = F.max_pool2d(y, list(pool_size), list(pool_stride), list(pool_padding))
    return y.contiguous(memory_format=torch.channels_last)


def _pack(
    weight: Tensor,
    scale: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_shape: Sequence[int],
) -> Tensor:
    folded = weight.detach()
    if scale is not None:
        # In float32, cast last: scale alone may pass what 16 bits hold.
        folded = (folded.float() * scale.detach().float().view(-1, 1, 1, 1)).to(weight.dtype)
    folded = folded.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_weight(
        folded, list(padding), list(stride), list(dilation), groups, list(input_shape)
    )


def _run(
    x: Tensor,
    packed: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    bias = None if shift is None else shift.to(x.dtype).contiguous()
    geometry = (list(padding), list(stride), list(dilation), groups)
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *geometry, "none", [], None)
    else:
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual.contiguous(memory_format=torch.channels_last), packed, bias,
            *geometry, "add", 1.0, None, [], None,
        )  # fmt: skip
    return y.contiguous(memory_format=torch.channels_last)
