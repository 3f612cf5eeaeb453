"""pointwise_bn_act_backward: all gradients of pointwise_bn_act, without the convolution's output.

The gradient in front of ReLU, g, is written once and read by two products: with x, for all that
BatchNorm and the weight want (`pointwise_bn_gradients`), and with the weight, for x's gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _pointwise
from resnet_fused.backends._pointwise import GEOMETRY
from resnet_fused.ops import (
    _bn,
    _checks,
    bn_act_backward_reduce,
    conv_backward_data,
    conv_backward_weight,
    pointwise_bn_act,
    pointwise_bn_gradients,
    pointwise_bn_stats,
)
from resnet_fused.ops._direct import call
from resnet_fused.ops._op import Op
from resnet_fused.ops.conv_bn_act import check_convolution

NAME = "pointwise_bn_act_backward"
Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def check(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    x_mean: Tensor,
    x_cov: Tensor,
    bn_weight: Tensor | None,
    y: Tensor | None,
    sum_g: Tensor | None,
    eps: float,
    act: str | None,
    wanted: Sequence[bool],
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    shape = check_convolution(NAME, x, weight, *GEOMETRY)
    pointwise_bn_stats.check_weight(NAME, weight)
    _checks.check_weight(NAME, weight, x)
    _checks.check_feature_map(NAME, grad, "grad")
    if tuple(grad.shape) != shape:
        raise ValueError(f"{NAME}: grad must have shape {shape}, got {tuple(grad.shape)}")
    _checks.check_same(NAME, "grad", grad, x)
    _bn.check_statistics(NAME, mean, var, grad)
    pointwise_bn_stats.check_moments(NAME, x_mean, x_cov, weight)
    pointwise_bn_stats.check_affine(NAME, bn_weight, None, weight)
    _bn.check_eps(NAME, eps)
    _checks.check_act(NAME, act)
    if (y is None) != (act is None):
        raise ValueError(f"{NAME}: y must be given for act='relu', and for it alone")
    if y is not None:
        _checks.check_like(NAME, "y", y, grad)
    if sum_g is not None and y is not None:
        raise ValueError(f"{NAME}: sum_g must be None where y is given, which says what to sum")
    _checks.check_channels(NAME, "sum_g", sum_g, grad.shape[1], mean)
    _bn.check_wanted(NAME, wanted, {"x": x, "residual": y})


def reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    x_mean: Tensor,
    x_cov: Tensor,
    bn_weight: Tensor | None,
    y: Tensor | None,
    sum_g: Tensor | None,
    eps: float,
    act: str | None,
    wanted: Sequence[bool],
) -> Result:
    """Compute the op in plain torch: the convolution's output made again, and its gradient.

    Both are rounded to x's dtype, as they are where they are maps.

    With ``sum_g`` the gradient is summed already, and past ReLU.

    Returns:
        The gradients of x, weight, bn_weight and bn_bias, and of the residual: that in front of
        ReLU. The first and the last are empty where not wanted. Those of BatchNorm are in the
        accumulation dtype.
    """
    wide = mean.dtype
    g = grad if y is None else torch.where(_bn.passed(y), grad, torch.zeros_like(grad))
    rows, w = g.to(wide).permute(0, 2, 3, 1).flatten(0, 2), weight.flatten(1).to(x.dtype).to(wide)
    inputs = x.to(wide).permute(0, 2, 3, 1).flatten(0, 2)
    rstd = torch.rsqrt(var + eps)
    normal = ((inputs @ w.t()).to(x.dtype).to(wide) - mean) * rstd
    sum_g = rows.sum(0) if sum_g is None else sum_g
    sum_gn = (rows * normal).sum(0)
    scale = rstd if bn_weight is None else rstd * bn_weight
    grad_z = scale * (rows - (sum_g + normal * sum_gn) / max(len(rows), 1))
    grad_z = grad_z.to(x.dtype).to(wide)
    n, c, height, width = x.shape
    grad_x = (grad_z @ w).view(n, height, width, c).permute(0, 3, 1, 2)
    nothing = x.new_empty(0)
    return (
        _checks.channels_last(grad_x.to(x.dtype)) if wanted[0] else nothing,
        (grad_z.t() @ inputs).to(weight.dtype).view(weight.shape),
        sum_gn,
        sum_g.clone(),
        _checks.channels_last(g.clone()) if wanted[1] else nothing,
    )


decomposition = functools.partial(_pointwise.pointwise_bn_act_backward, call)


def fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    x_mean: Tensor,
    x_cov: Tensor,
    bn_weight: Tensor | None,
    y: Tensor | None,
    sum_g: Tensor | None,
    eps: float,
    act: str | None,
    wanted: Sequence[bool],
) -> Result:
    """Return empty maps, a weight and two vectors; maps without elements where not wanted."""
    o, c = weight.shape[:2]
    return (
        _checks.empty_channels_last(x, x.shape) if wanted[0] else x.new_empty(0),
        weight.new_empty(o, c, 1, 1),
        mean.new_empty(o),
        mean.new_empty(o),
        _checks.empty_channels_last(x, grad.shape) if wanted[1] else x.new_empty(0),
    )


def flops(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[Any],
    **kwargs: Any,
) -> int:
    """Two per multiply-add of g with x and, for x's gradient, with the weight and of x itself."""
    n, o, h, w = grad_shape
    c = x_shape[1]
    of_x = o + c if len(out_shape[0]) == len(x_shape) else 0
    return 2 * n * h * w * c * (o + of_x)


def nbytes(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    x_mean: Tensor,
    x_cov: Tensor,
    bn_weight: Tensor | None,
    y: Tensor | None,
    sum_g: Tensor | None,
    eps: float,
    act: str | None,
    wanted: Sequence[bool],
) -> int:
    """What the op's chain reads and writes."""
    total, wide = 0, mean.dtype
    if sum_g is None:
        steps = (grad, grad, mean, var, None, None, y, eps, act, act is not None)
        total += bn_act_backward_reduce.nbytes(*steps) - grad.nbytes  # which it is given twice
    total += conv_backward_weight.nbytes(grad, x, weight.shape, *GEOMETRY, False, wide)
    product = weight.to(wide)
    small = (weight, product, mean, mean, var, x_mean, x_cov, bn_weight, eps, 1, weight.dtype)
    total += pointwise_bn_gradients.nbytes(*small)
    if wanted[0]:
        total += 2 * x.nbytes + x_cov.numel() * x.itemsize  # read, and its turned self written
        total += conv_backward_data.nbytes(grad, weight, x.shape, *GEOMETRY, x)
    return total


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield for the calls of pointwise_bn_act, with all or some of the gradients wanted."""
    generator = torch.Generator().manual_seed(5)
    for i, args in enumerate(pointwise_bn_act.samples(device, dtype)):
        x, weight, bn_weight, _, residual, eps, act = args
        y, *moments = pointwise_bn_act.reference(*args)
        grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        relu = act == "relu"
        wanted = [i != 4, relu and residual is not None]
        saved = (*moments, bn_weight, y if relu else None)
        sum_g = None if relu or i % 4 else grad.to(moments[0].dtype).sum((0, 2, 3))
        yield grad, x, weight, *saved, sum_g, eps, act, wanted


OP = Op(
    name=NAME,
    schema=(
        "(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor var, Tensor x_mean, "
        "Tensor x_cov, Tensor? bn_weight, Tensor? y, Tensor? sum_g, float eps, str? act, "
        "bool[2] wanted) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    check=check,
    reference=reference,
    decomposition=decomposition,
    fake=fake,
    autocast=(),
    wide=("weight",),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
)
