"""The ops of a 1x1 convolution with its BatchNorm as chains of smaller ones, whoever runs these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

#: Runs an op by its name.
Call = Callable[..., Any]
#: Stride, padding, dilation and groups.
GEOMETRY = ((1, 1), (0, 0), (1, 1), 1)


def pointwise_bn_act(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> tuple[Tensor, ...]:
    """Run the op as the convolution of inference behind what finds its scale and shift."""
    x_mean, x_cov = call("channel_covariance", x)
    read = weight.to(x.dtype)
    mean, var, *affine = call("pointwise_bn_stats", read, x_mean, x_cov, bn_weight, bn_bias, eps)
    y = call("conv_bn_act", x, read, *affine, residual, *GEOMETRY, act)
    return y, mean, var, x_mean, x_cov


def pointwise_bn_act_backward(
    call: Call,
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
) -> tuple[Tensor, ...]:
    """Run the op by its products; what turns g and x is small."""
    nothing = x.new_empty(0)
    masked, given = nothing, sum_g is not None
    if sum_g is None:
        # In place of a map to be normalised it reads grad again, whose second sum nobody wants.
        maps, vectors = (grad, grad), (mean, var, None, None)
        sum_g, _, masked = call(
            "bn_act_backward_reduce", *maps, *vectors, y, eps, act, act is not None
        )
    assert sum_g is not None
    g = grad if y is None else masked
    product = call("conv_backward_weight", g, x, weight.shape, *GEOMETRY, False, mean.dtype)
    grad_weight, grad_bn_weight, of_g, of_x, *affine = call(
        "pointwise_bn_gradients", weight.to(x.dtype), product, sum_g, mean, var, x_mean, x_cov,
        bn_weight, eps, max(x.numel() // x.shape[1], 1), weight.dtype,
    )  # fmt: skip
    grad_x = nothing
    if wanted[0]:
        turned = call("conv_bn_act", x, of_x, *affine, None, *GEOMETRY, None)
        grad_x = call("conv_backward_data", g, of_g, x.shape, *GEOMETRY, turned)
    # Of what came in, a copy: an op's result is no argument.
    own = sum_g.clone() if given else sum_g
    return grad_x, grad_weight, grad_bn_weight, own, masked if wanted[1] else nothing
