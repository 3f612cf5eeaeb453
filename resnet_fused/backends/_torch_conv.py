"""torch's own convolution and its gradients, for training where no kernel of ours runs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends import onednn
from resnet_fused.backends._outputs import channels_last as as_channels_last
from resnet_fused.backends._outputs import empty_channels_last, empty_weight


def forward(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the convolution, channels_last."""
    geometry = (list(stride), list(padding), list(dilation), groups)
    if x.is_cpu and onednn.breaks_at(x, weight, stride, padding, dilation):
        # torch's own is oneDNN's; it is right on contiguous maps, in float32 at least.
        wide = torch.promote_types(x.dtype, torch.float32)
        x, weight, dtype = x.to(wide).contiguous(), weight.to(wide).contiguous(), x.dtype
        return as_channels_last(F.conv2d(x, weight, None, *geometry).to(dtype))
    dtype, x = x.dtype, x.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(_computable(x), _rounded(weight, dtype), None, *geometry)
    return as_channels_last(y.to(dtype))


def _computable(t: Tensor) -> Tensor:
    """Return ``t`` in a dtype that its device multiplies in, which all 16 bits fit into."""
    return t.float() if t.is_cpu and not onednn.computes_in(t.dtype) else t


def backward_data(
    grad: Tensor,
    weight: Tensor,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> Tensor:
    """Return the input's gradient plus residual, channels_last."""
    dtype, weight = grad.dtype, _rounded(weight, grad.dtype)
    grad = _computable(grad)
    # Not read; an expanded scalar would be copied to its full size.
    x = empty_channels_last(x_size, grad.dtype, grad.device)
    geometry = (stride, padding, dilation, False, [0, 0], groups)
    grad_x = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *geometry, [True, False, False]
    )[0]
    if residual is not None:
        grad_x.add_(residual)
    return as_channels_last(grad_x.to(dtype))


def backward_weight(
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
    """Return the weight's gradient, channels_last or contiguous, in ``dtype``."""
    grad, x = maps_of_weight_gradient(_computable(grad), _computable(x), weight_size, stride)
    weight = empty_channels_last(weight_size, grad.dtype, grad.device)
    if _is_strided_pointwise(grad, weight_size, stride):
        weight = weight.contiguous()
    geometry = (stride, padding, dilation, False, [0, 0], groups)
    grad_weight = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *geometry, [False, True, False]
    )[1]
    return laid_out(_cast(grad_weight, dtype, channels_last=channels_last), channels_last)


def maps_of_weight_gradient(
    grad: Tensor, x: Tensor, weight_size: Sequence[int], stride: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return grad and x as torch's gradient of a convolution's weight can be trusted with them.

    On the CPU that of a strided 1x1 writes past the end of its memory where they are channels_last
    (torch 2.13, float32, two threads, 8 channels to 8 on 28x12 maps).
    """
    if _is_strided_pointwise(grad, weight_size, stride):
        return grad.contiguous(), x.contiguous()
    return grad, x


def _is_strided_pointwise(grad: Tensor, weight_size: Sequence[int], stride: Sequence[int]) -> bool:
    return grad.is_cpu and tuple(weight_size[2:]) == (1, 1) and max(stride) > 1


def product(grad: Tensor, x: Tensor, channels_last: bool, dtype: torch.dtype) -> Tensor:
    """Return the weight's gradient of a convolution that is one matrix product, on a GPU.

    Not rounded to the dtype of the maps, as that of a convolution is before it is cast.
    """
    rows = [t.permute(0, 2, 3, 1).flatten(0, 2) for t in (grad, x)]
    made = torch.mm(rows[0].t(), rows[1], out_dtype=dtype)
    return laid_out(made[..., None, None], channels_last)


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``weight`` as ``dtype`` rounds it and as torch computes, in its own layout."""
    return _computable(_cast(weight, dtype, channels_last=not weight.is_contiguous()))


def _cast(weight: Tensor, dtype: torch.dtype, *, channels_last: bool) -> Tensor:
    """Return ``weight`` in ``dtype``, on the CPU in memory that is used again.

    Of a cast to fresh pages, touching them takes longer than the cast.
    """
    if weight.dtype == dtype or not weight.is_cpu:
        return weight.to(dtype)
    return empty_weight(weight.shape, dtype, channels_last=channels_last).copy_(weight)


def laid_out(weight: Tensor, channels_last: bool) -> Tensor:
    """Return ``weight`` channels_last or contiguous, to the letter where a side is 1."""
    if channels_last:
        return as_channels_last(weight)
    _, c, kh, kw = weight.shape
    return weight.contiguous().as_strided(weight.shape, (c * kh * kw, kh * kw, kw, 1))
