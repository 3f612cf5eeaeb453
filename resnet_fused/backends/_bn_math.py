"""BatchNorm's per-channel arithmetic, the same for the reference and for every backend.

Ioffe and Szegedy (arXiv 1502.03167), algorithm 1: with M values per channel,
x̂ = (x - μ) / √(σ² + ε) and y = γ x̂ + β. Vectors are in the statistics' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Channels that a byte tells of.
BITS = 8
#: Which maps have bits, in an error's words.
NO_BITS = "there are only for 16-bit maps of 8, 16, ... channels"

#: Both sums of a BatchNorm's backward over a joined batch, divided by its count.
Means = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def bits_shape(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...] | None:
    """Return the shape of the bits that say which elements of a map passed ReLU.

    A channels_last map of bytes: bit j of byte k is channel 8 k + j. None: there are no bits, and
    ReLU's result says so itself. They are for maps of 16 bits, of whose bytes they are a sixteenth,
    with a number of channels that 8 divides: what a thread reads at once has one byte. In float32
    backward would save as little time, and more would be kept for it than the next convolution
    keeps of the result anyway.
    """
    n, c, h, w = shape
    return (n, c // BITS, h, w) if dtype.itemsize == 2 and c % BITS == 0 else None


def bits_for(x: Tensor, summed: bool, act: str | None) -> tuple[int, ...] | None:
    """Return the shape of the bits that an op on ``x`` writes, or None if it writes none.

    Of the ReLU of a sum: without one, x itself says again what passed.
    """
    return bits_shape(x.shape, x.dtype) if summed and act == "relu" else None


def no_bits(x: Tensor) -> Tensor:
    """Return what an op gives in place of bits where it has none."""
    return x.new_empty(0, dtype=torch.uint8)


def taken_shape(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """Return the shape of what a max pool's result of ``shape`` says it took of its input.

    In 16 bits all of it, in others no images: a stem in float32 would keep a hundredth more for
    backward of what eager torch keeps.
    """
    return (shape[0] if dtype.itemsize == 2 else 0, *shape[1:])


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


def gradients(
    reduce: Callable[..., tuple[Tensor, Tensor, Tensor]],
    apply: Callable[..., Tensor],
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    eps: float,
    act: str | None,
    wanted: Sequence[bool],
    means: Means | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what bn_act_backward does, by the two ops that it is made of.

    Args:
        reduce: bn_act_backward_reduce.
        apply: bn_act_backward_apply.
        means: gives both sums over the joined batch, divided by its count; None: x is the batch.
    """
    want_x, want_weight, want_bias, want_residual = wanted
    vectors = (mean, var, weight, bias)
    # The masked gradient is the residual's own; written once, it also spares a second mask.
    sum_g, sum_gx, masked = reduce(grad, x, *vectors, y, eps, act, want_residual)
    grad_x = x.new_empty(0)
    if want_x:
        g, left = (masked, None) if want_residual else (grad, act)
        sums, count = _over_batch(x, sum_g, sum_gx, means)
        grad_x = apply(g, x, *vectors, y, *sums, eps, left, count)
    wants = (want_weight, want_bias)
    of_affine = _affine_gradients(x, var, weight, bias, eps, sum_g, sum_gx, wants)
    return grad_x, *of_affine, masked


def _over_batch(
    x: Tensor, sum_g: Tensor, sum_gx: Tensor, means: Means | None
) -> tuple[tuple[Tensor, ...], int]:
    """Return both sums of the batch that x belongs to, and by how many values to divide them."""
    if means is not None:
        return means(sum_g, sum_gx), 1
    return (sum_g, sum_gx), x.shape[0] * x.shape[2] * x.shape[3]


def _affine_gradients(
    x: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sum_g: Tensor,
    sum_gx: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and bias, empty where not wanted."""
    # An op's results may not be one tensor.
    grad_weight, grad_bias = x.new_empty(0), x.new_empty(0)
    if wanted[0] and weight is not None:
        grad_weight = (sum_gx * invstd(var, eps)).to(weight.dtype)
    if wanted[1] and bias is not None:
        grad_bias = sum_g.to(bias.dtype)
    return grad_weight, grad_bias


def pooled_gradients(
    parts: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]],
    grad: Tensor,
    index: Tensor,
    taken: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    wanted: Sequence[bool],
    means: Means | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what bn_act_max_pool_backward does, by ops; the map behind the pool is written.

    Where it is known what the pool took, the sums are over that, else over the map.

    Args:
        parts: bn_act_backward_reduce, max_pool_backward and bn_act_backward_apply.
        means: as for :func:`gradients`.
    """
    reduce, pool_backward, apply = parts
    vectors, pool = (mean, var, weight, bias), (pool_size, pool_stride, pool_padding)
    known, grad_a, grad_x = taken.numel() > 0, grad, x.new_empty(0)
    if wanted[0] or not known:
        grad_a = pool_backward(grad, index, x.shape, *pool)
    summed = (grad, taken) if known else (grad_a, x)
    sum_g, sum_gx, _ = reduce(*summed, *vectors, None, eps, act, False)
    if wanted[0]:
        sums, count = _over_batch(x, sum_g, sum_gx, means)
        grad_x = apply(grad_a, x, *vectors, None, *sums, eps, act, count)
    return grad_x, *_affine_gradients(x, var, weight, bias, eps, sum_g, sum_gx, wanted[1:])


def bn_update_stats(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
) -> None:
    """Do what the op does, in plain torch."""
    share: float | Tensor = 0.0 if momentum is None else momentum
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            # As torch: a scalar in double, of any dtype and shape that holds one number.
            share = num_batches_tracked.reshape(()).double().reciprocal()
    for running, batch in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
        if running.dtype == batch.dtype and isinstance(share, float):
            running.mul_(1 - share).add_(batch, alpha=share)
        else:
            running.copy_(running.to(batch.dtype) * (1 - share) + batch * share)
