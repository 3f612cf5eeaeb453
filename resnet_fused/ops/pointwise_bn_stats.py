"""pointwise_bn_stats: BatchNorm of a 1x1 convolution's output, by what is known of its input.

With z = W x at every pixel, the mean of z is W μ and its covariance W C Wᵀ, by the mean μ and the
covariance C of x: z need not be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math
from resnet_fused.ops import _bn, _checks, channel_covariance
from resnet_fused.ops._op import Op

NAME = "pointwise_bn_stats"
Result = tuple[Tensor, Tensor, Tensor, Tensor]


def check(
    weight: Tensor,
    x_mean: Tensor,
    x_cov: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    check_weight(NAME, weight)
    check_moments(NAME, x_mean, x_cov, weight)
    check_affine(NAME, bn_weight, bn_bias, weight)
    _bn.check_eps(NAME, eps)


def check_weight(op: str, weight: Tensor) -> None:
    """Check the weight of a 1x1 convolution without groups."""
    _checks.check_feature_map(op, weight, "weight")
    if tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(f"{op}: weight must be (O, C, 1, 1), got {tuple(weight.shape)}")


def check_moments(op: str, x_mean: Tensor, x_cov: Tensor, weight: Tensor) -> None:
    """Check the mean and covariance of what the weight convolves."""
    c, wide = weight.shape[1], _checks.accumulate_dtype(weight.dtype)
    for name, moment, shape in (("x_mean", x_mean, (c,)), ("x_cov", x_cov, (c, c))):
        if tuple(moment.shape) != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(moment.shape)}")
        if moment.dtype != wide:
            raise TypeError(
                f"{op}: {name} must be {wide} for weight of {weight.dtype}, got {moment.dtype}"
            )
        _checks.check_device(op, name, moment, weight)


def check_affine(op: str, bn_weight: Tensor | None, bn_bias: Tensor | None, weight: Tensor) -> None:
    """Check the weight and bias of the BatchNorm behind the convolution."""
    for name, vector in (("bn_weight", bn_weight), ("bn_bias", bn_bias)):
        _checks.check_channels(op, name, vector, weight.shape[0], weight)


def reference(
    weight: Tensor,
    x_mean: Tensor,
    x_cov: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
) -> Result:
    """Compute mean and biased variance, and BatchNorm's scale and shift, in plain torch."""
    rows = weight.flatten(1).to(x_mean.dtype)
    mean = rows @ x_mean
    # Rounding must not leave a variance below zero.
    var = ((rows @ x_cov) * rows).sum(1).clamp(min=0)
    return mean, var, *_bn_math.scale_shift(mean, var, bn_weight, bn_bias, eps)


def fake(
    weight: Tensor,
    x_mean: Tensor,
    x_cov: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
) -> Result:
    """Return four empty vectors."""
    mean, var, scale, shift = (x_mean.new_empty(len(weight)) for _ in range(4))
    return mean, var, scale, shift


def flops(weight_shape: Sequence[int], *args: Any, out_shape: Sequence[Any], **kwargs: Any) -> int:
    """Two per multiply-add of the weight with the covariance."""
    o, c, _, _ = weight_shape
    return 2 * o * c * c


def nbytes(
    weight: Tensor,
    x_mean: Tensor,
    x_cov: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
) -> int:
    """All arguments read once, four vectors written once."""
    given = (weight, x_mean, x_cov, bn_weight, bn_bias)
    return sum(t.nbytes for t in given if t is not None) + 4 * len(weight) * x_mean.itemsize


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield for the maps of channel_covariance, with and without affine vectors."""
    generator = torch.Generator().manual_seed(1)
    maps = channel_covariance.samples(device, dtype)
    # Of two pixels the covariance has rank one: a variance of next to nothing would show no more
    # than how products were rounded, but for eps.
    eps = (1e-3, 1e-5, 1e-3, 0.1, 1e-3)
    for i, ((x,), o) in enumerate(zip(maps, (24, 5, 130, 8, 2), strict=True)):
        c = x.shape[1]
        drawn = torch.randn((o, c, 1, 1), generator=generator, dtype=torch.float64)
        weight = drawn.to(device, dtype) / c**0.5
        kind = dtype if i == 1 else _checks.accumulate_dtype(dtype)
        affine = [
            None if i == 2 else torch.randn(o, generator=generator).to(device, kind)
            for _ in range(2)
        ]
        yield weight, *channel_covariance.reference(x), *affine, eps[i]


OP = Op(
    name=NAME,
    schema=(
        "(Tensor weight, Tensor x_mean, Tensor x_cov, Tensor? bn_weight, Tensor? bn_bias, "
        "float eps) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    check=check,
    reference=reference,
    fake=fake,
    autocast=("weight",),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
)
