"""conv_backward_data: the gradient of a convolution's input, added to what others have of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends._sizes import output_shape
from resnet_fused.ops import _checks, _samples, conv_bn_stats
from resnet_fused.ops._op import Op
from resnet_fused.ops.conv_bn_act import check_geometry
from resnet_fused.ops.conv_bn_act import flops as convolution_flops

NAME = "conv_backward_data"


def check(
    grad: Tensor,
    weight: Tensor,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    check_gradient(NAME, grad, weight, x_size, stride, padding, dilation, groups)
    _checks.check_residual(NAME, residual, x_size, grad)


def check_gradient(
    op: str,
    grad: Tensor,
    weight: Tensor,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Check that grad is of the output that weight and an input of ``x_size`` give."""
    _checks.check_feature_map(op, grad, "grad")
    _checks.check_weight(op, weight, grad)
    check_geometry(op, stride, padding, dilation)
    expected = output_shape(x_size, weight.shape, stride, padding, dilation)
    if tuple(grad.shape) != expected or x_size[1] != weight.shape[1] * groups:
        raise ValueError(
            f"{op}: grad of shape {tuple(grad.shape)}, weight {tuple(weight.shape)} and groups "
            f"{groups} do not belong to an input of shape {tuple(x_size)}: expected {expected}"
        )


def reference(
    grad: Tensor,
    weight: Tensor,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> Tensor:
    """Compute the op in plain torch; ``residual`` is the gradient by the input's other readers."""
    x = grad.new_empty(()).expand(tuple(x_size))
    grad_x = torch.ops.aten.convolution_backward(
        grad, x, weight.to(grad.dtype), None, stride, padding, dilation, False, [0, 0], groups,
        [True, False, False],
    )[0]  # fmt: skip
    return _checks.channels_last(grad_x if residual is None else grad_x + residual)


def fake(grad: Tensor, weight: Tensor, x_size: Sequence[int], *_: Any) -> Tensor:
    """Return an empty channels_last tensor of the input's shape."""
    return _checks.empty_channels_last(grad, x_size)


def flops(
    grad_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    """As many as the convolution's own."""
    return convolution_flops(out_shape, weight_shape, out_shape=grad_shape)


def nbytes(
    grad: Tensor,
    weight: Tensor,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> int:
    """grad, weight and residual read once, the input's gradient written once."""
    read = sum(t.nbytes for t in (grad, weight, residual) if t is not None)
    return read + torch.Size(x_size).numel() * grad.element_size()


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield over the convolutions of conv_bn_stats, with and without a residual."""
    draw = _samples.normal(2, device, dtype)
    for i, (x, weight, *geometry) in enumerate(conv_bn_stats.samples(device, dtype)):
        grad = draw(*output_shape(x.shape, weight.shape, *geometry[:3]))
        residual = draw(*x.shape) if i % 3 == 1 else None
        yield grad, weight, list(x.shape), *geometry, residual


OP = Op(
    name=NAME,
    schema=(
        "(Tensor grad, Tensor weight, SymInt[] x_size, SymInt[2] stride, SymInt[2] padding, "
        "SymInt[2] dilation, SymInt groups, Tensor? residual) -> Tensor"
    ),
    check=check,
    reference=reference,
    fake=fake,
    autocast=("grad", "weight", "residual"),
    wide=("weight",),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
)
