"""bn_act_conv_backward_weight: a weight's gradient whose input is normalised as it is read.

The activation that the convolution read in the forward was not kept; where a kernel makes it on its
way from memory to the products, it is not written now either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends._sizes import output_shape
from resnet_fused.ops import (
    _bn,
    _checks,
    _samples,
    bn_act,
    bn_act_conv_bn_stats,
    conv_backward_weight,
)
from resnet_fused.ops._direct import call
from resnet_fused.ops._op import Op

NAME = "bn_act_conv_backward_weight"


def check(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight_size: Sequence[int],
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    geometry = (stride, padding, dilation, groups)
    conv_backward_weight.check_gradient(NAME, grad, x, weight_size, *geometry, dtype)
    _bn.check_statistics(NAME, mean, var, x)
    _bn.check_affine(NAME, bn_weight, bn_bias, x, "bn_")
    _bn.check_eps(NAME, eps)
    _checks.check_act(NAME, act)


def reference(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight_size: Sequence[int],
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the op in plain torch; the activation is rounded to x's dtype."""
    a, _ = bn_act.reference(x, mean, var, bn_weight, bn_bias, None, eps, act)
    geometry = (stride, padding, dilation, groups)
    return conv_backward_weight.reference(grad, a, weight_size, *geometry, channels_last, dtype)


def decomposition(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight_size: Sequence[int],
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Run the op as two; the activation lives until the convolution has read it."""
    a, _ = call("bn_act", x, mean, var, bn_weight, bn_bias, None, eps, act)
    geometry = (stride, padding, dilation, groups)
    grad_weight: Tensor = call(
        "conv_backward_weight", grad, a, weight_size, *geometry, channels_last, dtype
    )
    return grad_weight


def fake(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight_size: Sequence[int],
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return an empty tensor of the weight's shape and layout."""
    return conv_backward_weight.empty_like_weight(grad, weight_size, channels_last, dtype)


def flops(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    mean_shape: Sequence[int],
    var_shape: Sequence[int],
    bn_weight_shape: Sequence[int] | None,
    bn_bias_shape: Sequence[int] | None,
    weight_size: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    """As many as the convolution's own."""
    return conv_backward_weight.flops(grad_shape, x_shape, weight_size, out_shape=out_shape)


def nbytes(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight_size: Sequence[int],
    *args: Any,
) -> int:
    """grad, x and the vectors read once, the weight's gradient written once."""
    read = sum(t.nbytes for t in (grad, x, mean, var, bn_weight, bn_bias) if t is not None)
    return read + torch.Size(weight_size).numel() * args[-1].itemsize


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield over the calls of bn_act_conv_bn_stats."""
    draw = _samples.normal(5, device, dtype)
    for i, (x, *vectors, weight, eps, act, stride, padding, dilation, groups) in enumerate(
        bn_act_conv_bn_stats.samples(device, dtype)
    ):
        grad = draw(*output_shape(x.shape, weight.shape, stride, padding, dilation))
        geometry = (stride, padding, dilation, groups)
        rest = (eps, act, *geometry, bool(i % 2), weight.dtype)
        yield grad, x, *vectors, list(weight.shape), *rest


OP = Op(
    name=NAME,
    schema=(
        "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, "
        "SymInt[] weight_size, float eps, str? act, SymInt[2] stride, SymInt[2] padding, "
        "SymInt[2] dilation, SymInt groups, bool channels_last, ScalarType dtype) -> Tensor"
    ),
    check=check,
    reference=reference,
    decomposition=decomposition,
    fake=fake,
    autocast=("grad",),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
)
