"""pointwise_bn_gradients: what is small in the backward of a 1x1 convolution with its BatchNorm.

With z = W x at each of M pixels, BatchNorm's gradient (arXiv 1502.03167, section 3) is
∂z = a · (g - Σ g / M) + b · (z - μ_z), where a = γ / σ and b = -a · Σ g · (z - μ_z) / (M σ²). All
that needs z follows from the product P = Σ g xᵀ, from W, and from the mean μ and covariance C of x:

* Σ g · (z - μ_z) is the sum of P ∘ W over each row, less μ_z Σ g;
* Σ ∂z xᵀ, the weight's gradient, is a (P - Σ g μᵀ) + M b W C;
* Wᵀ ∂z, x's gradient, is (a W)ᵀ g + (Wᵀ b W) x, less its mean.

b is a mean over pixels, far below g, and would vanish in float16 where g does not: what turns x is
divided by a power of two near the largest b, which is its convolution's scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math
from resnet_fused.ops import _bn, _checks, pointwise_bn_stats
from resnet_fused.ops._op import Op

NAME = "pointwise_bn_gradients"
Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def check(
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
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    pointwise_bn_stats.check_weight(NAME, weight)
    pointwise_bn_stats.check_moments(NAME, x_mean, x_cov, weight)
    pointwise_bn_stats.check_affine(NAME, bn_weight, None, weight)
    if product.shape != weight.shape or product.dtype != x_mean.dtype:
        raise ValueError(
            f"{NAME}: product must be like weight {tuple(weight.shape)}, in {x_mean.dtype}, got "
            f"{tuple(product.shape)} in {product.dtype}"
        )
    _checks.check_device(NAME, "product", product, weight)
    for name, vector in (("sum_g", sum_g), ("mean", mean), ("var", var)):
        _checks.check_channels(NAME, name, vector, len(weight), product)
    _bn.check_eps(NAME, eps)
    _checks.check_result_dtype(NAME, dtype, weight)
    if count < 1:
        raise ValueError(f"{NAME}: count must be at least 1, got {count}")


def reference(
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
) -> Result:
    """Compute the op in plain torch.

    Returns:
        The gradients of weight, in ``dtype``, and of bn_weight; then for x's gradient by
        convolutions of 1x1: what turns g, (O, C, 1, 1), what turns x, (C, C, 1, 1), both in
        weight's dtype, the scale of what that gives, (C,), all one power of two, and the shift,
        (C,), by which what both give, as they are rounded, has no mean.
    """
    w, p = weight.flatten(1).to(product.dtype), product.flatten(1)
    rstd = _bn_math.invstd(var, eps)
    scale = rstd if bn_weight is None else rstd * bn_weight
    sum_gz = (p * w).sum(1) - mean * sum_g
    slope = rstd * rstd * sum_gz
    grad_w = scale[:, None] * (p - sum_g.outer(x_mean) - slope[:, None] * (w @ x_cov))
    of_g = (scale[:, None] * w).to(weight.dtype)
    # Symmetric: as a weight (out, in) it is its own transpose.
    slope_x = scale * slope / -count
    power = _power_below(slope_x.abs().max())
    of_x = (w.t() @ ((slope_x / power)[:, None] * w)).to(weight.dtype)
    shift = -(of_g.to(w.dtype).t() @ (sum_g / count)) - power * (of_x.to(w.dtype) @ x_mean)
    return (
        grad_w.to(dtype).view(weight.shape),
        rstd * sum_gz,
        of_g.view(weight.shape),
        of_x[..., None, None],
        power.expand(len(x_mean)).clone(),
        shift,
    )


def _power_below(value: Tensor) -> Tensor:
    """Return the largest power of two that is not above; one for zero and what is not finite."""
    mantissa, _ = torch.frexp(value)
    return torch.where(value.isfinite() & (value > 0), value / (2 * mantissa), 1)


def fake(
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
) -> Result:
    """Return empty results."""
    o, c, _, _ = weight.shape
    return (
        weight.new_empty(o, c, 1, 1, dtype=dtype),
        mean.new_empty(o),
        weight.new_empty(o, c, 1, 1),
        weight.new_empty(c, c, 1, 1),
        mean.new_empty(c),
        mean.new_empty(c),
    )


def flops(weight_shape: Sequence[int], *args: Any, out_shape: Sequence[Any], **kwargs: Any) -> int:
    """Two per multiply-add of the weight with the covariance, and with itself."""
    o, c, _, _ = weight_shape
    return 4 * o * c * c


def nbytes(
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
) -> int:
    """All arguments read once, the results written once."""
    given = (weight, product, sum_g, mean, var, x_mean, x_cov, bn_weight)
    o, c = weight.shape[:2]
    written = (o + c) * c * weight.itemsize + o * c * dtype.itemsize + (o + 2 * c) * mean.itemsize
    return written + sum(t.nbytes for t in given if t is not None)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield for the convolutions of pointwise_bn_stats, each with gradients that fit it."""
    generator = torch.Generator().manual_seed(2)
    for i, args in enumerate(pointwise_bn_stats.samples(device, dtype)):
        weight, x_mean, x_cov, bn_weight, _, eps = args
        mean, var, *_ = pointwise_bn_stats.reference(*args)
        drawn = torch.randn((2, *weight.shape), generator=generator, dtype=torch.float64)
        product, vectors = drawn.to(mean)
        moments = (vectors[:, 0, 0, 0], mean, var, x_mean, x_cov)
        yield weight, product, *moments, bn_weight, eps, 50, mean.dtype if i % 2 else dtype


OP = Op(
    name=NAME,
    schema=(
        "(Tensor weight, Tensor product, Tensor sum_g, Tensor mean, Tensor var, Tensor x_mean, "
        "Tensor x_cov, Tensor? bn_weight, float eps, SymInt count, ScalarType dtype) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    check=check,
    reference=reference,
    fake=fake,
    autocast=("weight",),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
)
