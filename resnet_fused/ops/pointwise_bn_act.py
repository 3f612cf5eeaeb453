"""pointwise_bn_act: 1x1 convolution, BatchNorm by the batch's statistics, add and ReLU in one pass.

The convolution's output is never there. Its statistics come before it, from the covariance of its
input (`pointwise_bn_stats`), and so does all that its gradient wants of it. In a bottleneck that
output is, with the block's result, the largest map of a block (arXiv 1512.03385, figure 5).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends import _bn_math, _pointwise
from resnet_fused.backends._pointwise import GEOMETRY
from resnet_fused.ops import (
    _bn,
    _checks,
    _past_relu,
    _samples,
    channel_covariance,
    pointwise_bn_stats,
)
from resnet_fused.ops._direct import call
from resnet_fused.ops._op import Op
from resnet_fused.ops.conv_bn_act import check_convolution

NAME = "pointwise_bn_act"
Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def check(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    shape = check_convolution(NAME, x, weight, *GEOMETRY)
    pointwise_bn_stats.check_weight(NAME, weight)
    _checks.check_weight(NAME, weight, x)
    pointwise_bn_stats.check_affine(NAME, bn_weight, bn_bias, weight)
    _checks.check_residual(NAME, residual, shape, x)
    _bn.check_eps(NAME, eps)
    _checks.check_act(NAME, act)


def reference(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> Result:
    """Compute the op in plain torch, in float32 (float64 for float64), rounded once.

    Returns:
        y, the mean and biased variance of the convolution's output, and mean and covariance of x.
    """
    x_mean, x_cov = channel_covariance.reference(x)
    z = F.conv2d(x.to(x_mean.dtype), weight.to(x.dtype).to(x_mean.dtype))
    mean, var = _bn.statistics(z)
    scale, shift = _bn_math.scale_shift(mean, var, bn_weight, bn_bias, eps)
    y = z * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    if residual is not None:
        y = y + residual
    if act == "relu":
        y = torch.relu(y)
    return _checks.channels_last(y.to(x.dtype)), mean, var, x_mean, x_cov


#: The convolution of inference, behind what finds its scale and shift.
decomposition = functools.partial(_pointwise.pointwise_bn_act, call)


def fake(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> Result:
    """Return an empty channels_last map, three empty vectors and an empty matrix."""
    o, c = weight.shape[:2]
    y = _checks.empty_channels_last(x, (len(x), o, *x.shape[2:]))
    x_mean = _bn.vector_like(x)
    return y, x_mean.new_empty(o), x_mean.new_empty(o), x_mean, x_mean.new_empty(c, c)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    """Save x, weight, what is known of x and of the convolution's output, and ReLU's result."""
    x, weight, bn_weight, bn_bias, _, ctx.eps, ctx.act = inputs
    y, *moments = output
    ctx.bias_dtype = None if bn_bias is None else bn_bias.dtype
    ctx.token = _past_relu.want(y) if ctx.act == "relu" else None
    ctx.save_for_backward(x, weight, *moments, bn_weight, y if ctx.act == "relu" else None)
    ctx.mark_non_differentiable(*moments)
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Gradients through the statistics too."""
    if grad is None:
        return (None,) * 7
    x, weight, *saved = ctx.saved_tensors
    bn_weight, y = saved[-2:]
    wants, act = ctx.needs_input_grad, ctx.act
    given = _past_relu.sums_of(grad, ctx.token)
    if given is not None:
        y = act = None
    wanted = [wants[0], wants[4] and y is not None]
    grad_x, grad_weight, grad_bn_weight, sum_g, grad_residual = call(
        "pointwise_bn_act_backward", grad, x, weight, *saved[:-1], y, given, ctx.eps, act, wanted
    )
    found: list[Tensor | None] = [None] * 7
    if wants[0]:
        found[0] = grad_x
    if wants[1]:
        found[1] = grad_weight
    if wants[2] and bn_weight is not None:
        found[2] = grad_bn_weight.to(bn_weight.dtype)
    if wants[3] and ctx.bias_dtype is not None:
        found[3] = sum_g.to(ctx.bias_dtype)
    if wants[4]:  # in front of ReLU the residual's gradient is the output's
        found[4] = grad if y is None else grad_residual
        if y is not None:  # a projection's BatchNorm wants them, too
            _past_relu.leave(grad_residual, ctx.token, sum_g)
    return tuple(found)


def flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[Any],
    **kwargs: Any,
) -> int:
    """Two per multiply-add of the convolution, and of x's covariance."""
    n, c, h, w = x_shape
    return 2 * n * h * w * c * (weight_shape[0] + c)


def nbytes(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> int:
    """All arguments read once, x twice, for its covariance first; the results written once."""
    given = (x, weight, bn_weight, bn_bias, residual)
    read = x.nbytes + sum(t.nbytes for t in given if t is not None)
    (n, c, h, w), o = x.shape, len(weight)
    wide = _checks.accumulate_dtype(x.dtype).itemsize
    return read + n * o * h * w * x.itemsize + (2 * o + c + c * c) * wide


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield odd and many channels, with and without affine vectors, residual and ReLU."""
    draw = _samples.normal(3, device, dtype)
    shapes = ((2, 16, 7, 5, 40), (3, 7, 6, 6, 5), (4, 64, 6, 9, 136), (2, 8, 5, 5, 3))
    for i, (n, c, h, w, o) in enumerate(shapes):
        x, wide = draw(n, c, h, w).relu(), _checks.accumulate_dtype(dtype)
        weight = draw(o, c, 1, 1, to=wide if i == 2 else dtype) / c**0.5
        kind = dtype if i == 1 else wide
        affine = [None if i == 3 else draw(o, to=kind) for _ in range(2)]
        residual = draw(n, o, h, w) if i != 1 else None
        for act in _checks.ACTIVATIONS:
            yield x, weight, *affine, residual, 1e-5 if i else 1e-3, act


OP = Op(
    name=NAME,
    schema=(
        "(Tensor x, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, "
        "float eps, str? act) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    check=check,
    reference=reference,
    decomposition=decomposition,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    autocast=("x", "weight", "residual"),
    wide=("weight",),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
)
