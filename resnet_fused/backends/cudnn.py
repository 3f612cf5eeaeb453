"""Convolutions on cuDNN through torch: conv_bn_act, and data gradients that are convolutions.

The scale is folded into the weights, the rest comes after it.

torch has two fused calls, undocumented but stable since 1.9, with x, weight, z, bias of one dtype:

- ``cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)``
  = relu(conv(x, weight) + bias)
- ``cudnn_convolution_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups)``
  = relu(conv(x, weight) + alpha · z + bias)

Both add and rectify in float32 and round once; a bias of None is zeros; the layout is channels_last
if x or weight is. Whether their ReLU keeps NaN is not certain: the cuDNN front end that torch is
built with asks for it in its newer versions only, and nobody promises it of every engine. So
:func:`conv_bn_act` rectifies with ``torch.relu_`` after the convolution, as oneDNN's does, and the
fused calls are a candidate that the tuner may choose: it has seen that the answer for this very
shape is right and keeps NaN. In float16 some of cuDNN's kernels give large numbers for infinity
(9.19 on an H200, a 1x1 of stride 2), eager torch's there too. The tuner has also timed the call,
which the 7x7 stem needs: there ``cudnn_convolution_relu`` was 17 times slower in channels_last
(pytorch #68506).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends import _turned
from resnet_fused.backends._derived import derived

ADVICE = "Use a CUDA build of torch on a machine with an NVIDIA GPU."

#: What "auto" leaves to others where `tune` has not measured a call.
ONLY_MEASURED = ("conv_backward_data",)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def _missing() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not torch.backends.cudnn.is_available():
        return f"torch {torch.__version__} was built without cuDNN"
    return None


def available() -> str | None:
    """Return why cuDNN cannot be used here, or None."""
    if not torch.backends.cudnn.enabled:
        return "torch.backends.cudnn.flags(enabled=False) is in force"
    return _missing()


def supports(op: str, x: Tensor, *args: Any) -> str | None:
    """Return why cuDNN does not take this call, or None."""
    if x.device.type != "cuda":
        return f"runs on NVIDIA GPUs, x is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"takes float32, float16 and bfloat16, x is {x.dtype}"
    if x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "bfloat16 needs a GPU of compute capability 8.0 or later"
    if x.numel() == 0:
        return "x is empty"
    if op == "conv_backward_data":
        weight, _, stride, padding, dilation, *_ = args
        return _turned.declines(weight.shape, stride, padding, dilation)
    return None


def candidates(op: str, *args: object) -> dict[str, Callable[..., Tensor]]:
    """Return the ways to run this call, by name, for the tuner."""
    if op == "conv_backward_data":
        return {"default": conv_backward_data}
    ways: dict[str, Callable[..., Tensor]] = {"default": conv_bn_act}
    if args[-1] == "relu":
        ways["fused"] = fused_conv_bn_act
    return ways


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
    """Run the op, at a stride of 1, as a convolution forward, for which cuDNN has other kernels."""
    return conv_bn_act(*_turned.convolution(grad, weight, padding, dilation, groups, residual))


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
    """Run the op as convolution with bias, then add and ReLU in place where they are asked for."""
    folded, bias = _fold(weight, scale, shift)
    x = x.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, folded, bias, list(stride), list(padding), list(dilation), groups)
    if residual is not None:
        y.add_(residual)
    return _exactly_channels_last(torch.relu_(y) if act == "relu" else y)


def fused_conv_bn_act(
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
    """Run the op, whose act is "relu", as one cuDNN call."""
    folded, bias = _fold(weight, scale, shift)
    x = x.contiguous(memory_format=torch.channels_last)
    geometry = (list(stride), list(padding), list(dilation), groups)
    if residual is None:
        y = torch.cudnn_convolution_relu(x, folded, bias, *geometry)
    else:
        z = residual.contiguous(memory_format=torch.channels_last)
        y = torch.cudnn_convolution_add_relu(x, folded, z, 1.0, bias, *geometry)
    return _exactly_channels_last(y)


def _fold(
    weight: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return scale · weight and the bias in weight's dtype, kept until one of the three changes."""
    bias = None
    if shift is not None:
        bias = derived(
            (shift,), ("cudnn", weight.dtype), lambda: shift.detach().to(weight.dtype).contiguous()
        )
    return derived((weight, scale), "cudnn", lambda: _folded(weight, scale)), bias


def _folded(weight: Tensor, scale: Tensor | None) -> Tensor:
    folded = weight.detach()
    if scale is None:
        return folded.contiguous(memory_format=torch.channels_last)
    # In float32, cast last, as one kernel: scale alone may pass what 16 bits hold.
    factors = scale.detach().float().view(-1, 1, 1, 1)
    return torch.mul(
        folded, factors, out=torch.empty_like(folded, memory_format=torch.channels_last)
    )


def _exactly_channels_last(y: Tensor) -> Tensor:
    """Return ``y`` channels_last, to the letter where one channel or pixel leaves strides open."""
    y = y.contiguous(memory_format=torch.channels_last)
    _, c, h, w = y.shape
    return y.as_strided(y.shape, (c * h * w, 1, w * c, c))
