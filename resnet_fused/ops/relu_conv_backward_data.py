"""relu_conv_backward_data: the gradient through a convolution and the ReLU before it, with sums.

That ReLU ends a block, and what passes it is summed over each channel for the BatchNorm behind it:
where a kernel has the op whole, while the gradient is in registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops import _bn, _checks, _samples, conv_backward_data, conv_bn_stats
from resnet_fused.ops._direct import call
from resnet_fused.ops._op import Op

NAME = "relu_conv_backward_data"
Result = tuple[Tensor, Tensor]


def check(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    _checks.check_feature_map(NAME, x)
    _checks.check_same(NAME, "x", x, grad)
    conv_backward_data.check_gradient(
        NAME, grad, weight, x.shape, stride, padding, dilation, groups
    )
    _checks.check_residual(NAME, residual, x.shape, grad)


def reference(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> Result:
    """Compute the op in plain torch; ``x`` is ReLU's result.

    Returns:
        The gradient in front of the ReLU, and its sums over each channel.
    """
    geometry = (stride, padding, dilation, groups)
    grad_x = conv_backward_data.reference(grad, weight, x.shape, *geometry, residual)
    g = torch.where(_bn.passed(x), grad_x, torch.zeros_like(grad_x))
    return _checks.channels_last(g), g.to(_checks.accumulate_dtype(g.dtype)).sum((0, 2, 3))


def decomposition(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> Result:
    """Run the op as two: the gradient is written, and read again with x."""
    grad_x = call(
        "conv_backward_data", grad, weight, x.shape, stride, padding, dilation, groups, residual
    )
    nothing = _bn.vector_like(x).zero_()
    sums, _, g = call(
        "bn_act_backward_reduce", grad_x, grad_x, nothing, nothing, None, None, x, 0.0, "relu", True
    )
    return g, sums


def fake(grad: Tensor, weight: Tensor, x: Tensor, *_: Any) -> Result:
    """Return an empty map like x, and an empty vector."""
    return _checks.empty_channels_last(x, x.shape), _bn.vector_like(x)


def flops(
    grad_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[Any],
    **kwargs: Any,
) -> int:
    """As many as the convolution's own."""
    return conv_backward_data.flops(grad_shape, weight_shape, out_shape=out_shape[0])


def nbytes(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> int:
    """All maps and the weight read once, the gradient and its sums written once."""
    read = sum(t.nbytes for t in (grad, weight, x, residual) if t is not None)
    return read + x.nbytes + x.shape[1] * _checks.accumulate_dtype(x.dtype).itemsize


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield over the convolutions of conv_bn_stats, with and without a residual."""
    draw = _samples.normal(8, device, dtype)
    for i, (x, weight, *geometry) in enumerate(conv_bn_stats.samples(device, dtype)):
        y = conv_bn_stats.fake(x, weight, *geometry)[0]
        grad, residual = (draw(*t.shape) for t in (y, x))
        yield grad, weight, x.relu(), *geometry, residual if i % 2 else None


OP = Op(
    name=NAME,
    schema=(
        "(Tensor grad, Tensor weight, Tensor x, SymInt[2] stride, SymInt[2] padding, "
        "SymInt[2] dilation, SymInt groups, Tensor? residual) -> (Tensor, Tensor)"
    ),
    check=check,
    reference=reference,
    decomposition=decomposition,
    fake=fake,
    autocast=("grad", "weight", "residual"),
    wide=("weight",),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
)
