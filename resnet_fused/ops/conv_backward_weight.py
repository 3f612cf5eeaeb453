"""conv_backward_weight: the gradient of a convolution's weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends._sizes import output_shape
from resnet_fused.backends._torch_conv import maps_of_weight_gradient
from resnet_fused.ops import _checks, _samples, conv_bn_stats
from resnet_fused.ops._op import Op
from resnet_fused.ops.conv_bn_act import check_geometry
from resnet_fused.ops.conv_bn_act import flops as convolution_flops

NAME = "conv_backward_weight"


def check(
    grad: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    check_gradient(NAME, grad, x, weight_size, stride, padding, dilation, groups, dtype)


def check_gradient(
    op: str,
    grad: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
) -> None:
    """Check that grad is of the output that x and a weight of ``weight_size`` give, and dtype."""
    _checks.check_feature_map(op, grad, "grad")
    _checks.check_same(op, "x", x, grad)
    _checks.check_result_dtype(op, dtype, x)
    check_geometry(op, stride, padding, dilation)
    expected = output_shape(x.shape, weight_size, stride, padding, dilation)
    if tuple(grad.shape) != expected or x.shape[1] != weight_size[1] * groups:
        raise ValueError(
            f"{op}: grad of shape {tuple(grad.shape)}, x {tuple(x.shape)} and groups {groups} "
            f"do not belong to a weight of shape {tuple(weight_size)}: expected {expected}"
        )


def reference(
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
    """Compute the op in plain torch, the result in the weight's own layout.

    Where ``dtype`` is wide, kernels may leave out the rounding to x's.
    """
    weight = grad.new_empty(()).expand(tuple(weight_size))
    grad, x = maps_of_weight_gradient(grad, x, weight_size, stride)
    grad_weight = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups,
        [False, True, False],
    )[1]  # fmt: skip
    return empty_like_weight(grad, weight_size, channels_last, dtype).copy_(grad_weight)


def empty_like_weight(
    grad: Tensor, size: Sequence[int], channels_last: bool, dtype: torch.dtype
) -> Tensor:
    """Return an empty weight, channels_last to the letter or contiguous."""
    if channels_last:
        return _checks.empty_channels_last(grad, size, dtype)
    return grad.new_empty(tuple(size), dtype=dtype)


def fake(
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
    """Return an empty tensor of the weight's shape and layout."""
    return empty_like_weight(grad, weight_size, channels_last, dtype)


def flops(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    weight_size: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    """As many as the convolution's own."""
    return convolution_flops(x_shape, weight_size, out_shape=grad_shape)


def nbytes(
    grad: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    dtype: torch.dtype,
) -> int:
    """Grad and x read once, the weight's gradient written once."""
    return grad.nbytes + x.nbytes + torch.Size(weight_size).numel() * dtype.itemsize


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield over the convolutions of conv_bn_stats."""
    draw = _samples.normal(3, device, dtype)
    convolutions = enumerate(conv_bn_stats.samples(device, dtype))
    for i, (x, weight, stride, padding, dilation, groups) in convolutions:
        grad = draw(*output_shape(x.shape, weight.shape, stride, padding, dilation))
        geometry = (stride, padding, dilation, groups)
        yield grad, x, list(weight.shape), *geometry, bool(i % 2), weight.dtype


OP = Op(
    name=NAME,
    schema=(
        "(Tensor grad, Tensor x, SymInt[] weight_size, SymInt[2] stride, SymInt[2] padding, "
        "SymInt[2] dilation, SymInt groups, bool channels_last, ScalarType dtype) -> Tensor"
    ),
    check=check,
    reference=reference,
    fake=fake,
    autocast=("grad", "x"),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
)
