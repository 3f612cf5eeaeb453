"""A 1x1 convolution's BatchNorm by its input's covariance, on the Triton kernels.

This module does not import triton; what does is loaded by the first call.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _pointwise
from resnet_fused.backends.triton.training import run_on


def channel_covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the op: products over parts of the pixels, added in order in double precision."""
    from resnet_fused.backends.triton import covariance_launch, run

    if not x.numel():
        nothing = torch.full((x.shape[1],), torch.nan, device=x.device)
        return nothing, nothing.outer(nothing)
    launches, mean, cov = covariance_launch.channel_covariance(x, run.capability(x.device))
    run_on(x, launches)
    return mean, cov


def pointwise_bn_stats(
    weight: Tensor,
    x_mean: Tensor,
    x_cov: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Run the op in one kernel."""
    from resnet_fused.backends.triton import covariance_launch

    step, made = covariance_launch.pointwise_bn_stats(
        weight, x_mean, x_cov, bn_weight, bn_bias, eps
    )
    run_on(weight, [step])
    return made


def pointwise_bn_gradients(
    weight: Tensor,
    product: Tensor,
    sum_g: Tensor,
    mean: Tensor,
    var: Tensor,
    x_mean: Tensor,
    x_cov: Tensor,
    bn_weight: Tensor | None,
    eps: float,
    count: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Run the op in three kernels."""
    from resnet_fused.backends.triton import covariance_launch

    launches, made = covariance_launch.pointwise_bn_gradients(
        weight, product, sum_g, mean, var, x_mean, x_cov, bn_weight, eps, count, dtype
    )
    run_on(weight, launches)
    return made


def _call(op: str, *args: Any) -> Any:
    """Run another op by this backend's own kernels."""
    return getattr(sys.modules["resnet_fused.backends.triton"], op)(*args)


def pointwise_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> tuple[Tensor, ...]:
    """Run the op as a chain."""
    return _pointwise.pointwise_bn_act(_call, x, weight, bn_weight, bn_bias, residual, eps, act)


def pointwise_bn_act_backward(
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
    """Run the op as a chain."""
    saved = (x, weight, mean, var, x_mean, x_cov, bn_weight, y, sum_g, eps, act)
    return _pointwise.pointwise_bn_act_backward(_call, grad, *saved, wanted)
