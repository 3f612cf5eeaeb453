"""BatchNorm and the pool in training on the Triton kernels, each taking its op's arguments.

Sums over pixels are cut by the shape and merged in one order, so that every run gives the same
bits. This module does not import triton; what does is loaded by the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math
from resnet_fused.backends._sizes import pool_shape
from resnet_fused.backends._training_maps import new_bits, with_bits

if TYPE_CHECKING:
    from resnet_fused.backends.triton.launch import Launch


def empty_map(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty channels_last map on x's device, of x's dtype if no other is given."""
    return torch.empty(
        tuple(shape), dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last
    )


def run_on(x: Tensor, launches: Iterable[Launch]) -> None:
    """Launch on x's device and its current stream."""
    with torch.cuda.device_of(x):
        for launch in launches:
            launch.run()


def bn_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    """Run the op in one pass, in float32, rounded once."""
    from resnet_fused.backends.triton import bn_launch

    y, bits = empty_map(x, x.shape), new_bits(x, summed=residual is not None, act=act)
    if y.numel():
        own = bn_launch.BatchNorm(mean, var, weight, bias, eps)
        run_on(x, [bn_launch.bn_act(x, y, own, act, residual, bits=bits)])
    return with_bits(y, bits)


def dual_bn_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    eps: float,
    residual_eps: float,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    """Run the op in one pass, in float32, rounded once."""
    from resnet_fused.backends.triton import bn_launch

    y, bits = empty_map(x, x.shape), new_bits(x, summed=True, act=act)
    if y.numel():
        own = bn_launch.BatchNorm(mean, var, weight, bias, eps)
        theirs = bn_launch.BatchNorm(
            residual_mean, residual_var, residual_weight, residual_bias, residual_eps
        )
        run_on(x, [bn_launch.bn_act(x, y, own, act, residual, theirs, bits)])
    return with_bits(y, bits)


def bn_act_max_pool(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op in one pass: each output normalises what its window holds."""
    from resnet_fused.backends.triton import bn_launch

    shape = pool_shape(x.shape, pool_size, pool_stride, pool_padding)
    y, taken = empty_map(x, shape), empty_map(x, _bn_math.taken_shape(shape, x.dtype))
    index = empty_map(x, shape, torch.uint8)
    if y.numel():
        own = bn_launch.BatchNorm(mean, var, weight, bias, eps)
        pool = (pool_size, pool_stride, pool_padding)
        kept = taken if taken.numel() else None
        run_on(x, [bn_launch.max_pool(x, own, act, pool, y, index, kept)])
    return y, index, taken


def bn_act_backward(
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
) -> tuple[Tensor, ...]:
    """Run the op by its two parts; what bn_act gave is computed apart."""
    vectors, (*gradients, activation) = (mean, var, weight, bias), wanted
    saved = (x, *vectors, y, eps, act)
    reduce, apply = bn_act_backward_reduce, bn_act_backward_apply
    found = _bn_math.gradients(reduce, apply, grad, *saved, gradients)
    a = bn_act(x, *vectors, None, eps, act)[0] if activation else x.new_empty(0)
    return *found, a


def bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    eps: float,
    act: str | None,
    masked: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op."""
    from resnet_fused.backends.triton import bn_launch

    written = empty_map(x, x.shape) if masked else None
    sum_g, sum_gx = torch.zeros_like(mean), torch.zeros_like(mean)
    if x.numel():
        own = bn_launch.BatchNorm(mean, var, weight, bias, eps)
        launches, (sum_g, sum_gx) = bn_launch.backward_reduce(grad, x, own, y, act, written)
        run_on(x, launches)
    return sum_g, sum_gx, x.new_empty(0) if written is None else written


def bn_act_backward_apply(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    sum_g: Tensor,
    sum_gx: Tensor,
    eps: float,
    act: str | None,
    count: int,
) -> Tensor:
    """Run the op in one pass."""
    from resnet_fused.backends.triton import bn_launch

    grad_x = empty_map(x, x.shape)
    if x.numel():
        own = bn_launch.BatchNorm(mean, var, weight, bias, eps)
        sums = (sum_g, sum_gx)
        run_on(x, [bn_launch.backward_apply(grad, x, own, y, sums, act, count, grad_x)])
    return grad_x


def dual_bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    residual: Tensor,
    residual_mean: Tensor,
    y: Tensor | None,
    act: str | None,
) -> tuple[Tensor, ...]:
    """Run the op; ReLU's output is there, so that neither BatchNorm's other vectors are read."""
    from resnet_fused.backends.triton import bn_launch

    if not x.numel():
        return tuple(torch.zeros_like(mean) for _ in range(3))
    own = bn_launch.BatchNorm(mean, mean, None, None, 0.0)
    launches, sums = bn_launch.backward_reduce(
        grad, x, own, y, act, residual=residual, residual_mean=residual_mean
    )
    run_on(x, launches)
    return sums


def dual_bn_act_backward_apply(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None,
    y: Tensor | None,
    sum_g: Tensor,
    sum_gx: Tensor,
    sum_gr: Tensor,
    eps: float,
    residual_eps: float,
    act: str | None,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Run the op in one pass, which reads the gradient once."""
    from resnet_fused.backends.triton import bn_launch

    grad_x, grad_r = empty_map(x, x.shape), empty_map(x, x.shape)
    if x.numel():
        own = bn_launch.BatchNorm(mean, var, weight, None, eps)
        theirs = bn_launch.BatchNorm(
            residual_mean, residual_var, residual_weight, None, residual_eps
        )
        step = bn_launch.backward_apply(
            grad, x, own, y, (sum_g, sum_gx, sum_gr), act, count, grad_x, residual, theirs, grad_r
        )
        run_on(x, [step])
    return grad_x, grad_r


def max_pool_backward(
    grad: Tensor,
    index: Tensor,
    x_size: Sequence[int],
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Tensor:
    """Run the op: each input adds up what the outputs that took it give, in one order."""
    from resnet_fused.backends.triton import bn_launch

    grad_x = empty_map(grad, x_size)
    if grad_x.numel():
        pool = (pool_size, pool_stride, pool_padding)
        run_on(grad, [bn_launch.max_pool_backward(grad, index, grad_x, pool)])
    return grad_x


bn_act_max_pool_backward = functools.partial(
    _bn_math.pooled_gradients, (bn_act_backward_reduce, max_pool_backward, bn_act_backward_apply)
)
