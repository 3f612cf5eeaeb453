"""BatchNorm's per-channel arithmetic, the same for the reference and for every backend.

Ioffe and Szegedy (arXiv 1502.03167), algorithm 1: with M values per channel,
x̂ = (x - μ) / √(σ² + ε) and y = γ x̂ + β. Vectors are in the statistics' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def invstd(var: Tensor, eps: float) -> Tensor:
    """Return 1 / √(σ² + ε)."""
    return torch.rsqrt(var + eps)


def scale_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return scale = γ / √(σ² + ε) and shift = β - μ · scale."""
    scale = invstd(var, eps)
    if weight is not None:
        scale = scale * weight
    if bias is None:
        return scale, -mean * scale
    return scale, torch.addcmul(bias.to(scale.dtype), mean, scale, value=-1)


def gradient_vectors(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    sum_g: Tensor,
    sum_gx: Tensor,
    eps: float,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a, b, d with grad_x = a · g + b · x + d.

    grad_x = γ/σ · (g - Σg / M - x̂ · Σ(g x̂) / M), with sum_gx = Σ g · (x - μ).
    """
    inverse = invstd(var, eps)
    a = inverse if weight is None else inverse * weight
    b = a * inverse * inverse * sum_gx / -count
    return a, b, -(a * sum_g / count) - b * mean
