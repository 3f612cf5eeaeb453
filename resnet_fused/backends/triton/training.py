"""The ops of training on the Triton kernels, each taking its op's arguments.

Sums over pixels are cut by the shape and merged in one order, so that every run gives the same
bits. This module does not import triton; what does is loaded by the first call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math
from resnet_fused.backends._sizes import pool_shape
from resnet_fused.backends.triton.shapes import Problem

if TYPE_CHECKING:
    from resnet_fused.backends.triton.bn_launch import BatchNorm
    from resnet_fused.backends.triton.launch import Launch


def _empty(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        tuple(shape), dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last
    )


def _run(x: Tensor, launches: Iterable[Launch]) -> None:
    with torch.cuda.device_of(x):
        for launch in launches:
            launch.run()


def conv_bn_stats(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op; a tile's statistics are taken while it is in registers."""
    problem = _problem(x.shape, weight.shape, stride, padding, dilation, groups)
    return _conv_bn_stats(x, weight, problem, None, None)


def bn_act_conv_bn_stats(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight: Tensor,
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op; the input is normalised on its way from memory to the products."""
    from resnet_fused.backends.triton import bn_launch

    problem = _problem(x.shape, weight.shape, stride, padding, dilation, groups)
    own = bn_launch.BatchNorm(mean, var, bn_weight, bn_bias, eps)
    return _conv_bn_stats(x, weight, problem, own, act)


def _problem(
    x_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Problem:
    problem = Problem.of(x_size, weight_size, stride, padding, dilation, groups, False)
    return dataclasses.replace(problem, training=True)


def _conv_bn_stats(
    x: Tensor, weight: Tensor, problem: Problem, own: BatchNorm | None, act: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    from resnet_fused.backends.triton import conv_launch, run

    y = _empty(x, (problem.n, problem.o * problem.groups, *problem.out_size))
    if not y.numel():
        nothing = torch.full(y.shape[1:2], torch.nan, device=y.device)
        return y, nothing, nothing.clone()
    launches, mean, var = conv_launch.conv_bn_stats(
        x, weight, y, problem, run.capability(x.device), own, act
    )
    _run(x, launches)
    return y, mean, var


def conv_backward_data(
    grad: Tensor,
    weight: Tensor,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Run the op: a convolution of stride 1 for every phase of the input's pixels."""
    from resnet_fused.backends.triton import conv_launch, run

    problem = _problem(x_size, weight.shape, stride, padding, dilation, groups)
    grad_x = _empty(grad, x_size)
    if grad_x.numel():
        arch = run.capability(grad.device)
        _run(grad, conv_launch.backward_data(grad, weight, grad_x, problem, arch))
    return grad_x


def conv_backward_weight(
    grad: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """Run the op: a product over pixels, in parts that are added in order."""
    from resnet_fused.backends.triton import conv_launch, run

    problem = _problem(x.shape, weight_size, stride, padding, dilation, groups)
    o, c, kh, kw = weight_size
    rows = grad.new_empty((o, kh * kw * c))
    if grad.numel():
        arch = run.capability(grad.device)
        _run(grad, conv_launch.backward_weight(grad, x, rows, problem, arch))
    else:
        rows.zero_()
    if channels_last:
        return rows.as_strided((o, c, kh, kw), (kh * kw * c, 1, kw * c, c))
    if kh * kw == 1 or c == 1:
        return rows.view(o, c, kh, kw)
    return rows.view(o, kh, kw, c).permute(0, 3, 1, 2).contiguous()


def bn_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> Tensor:
    """Run the op in one pass, in float32, rounded once."""
    from resnet_fused.backends.triton import bn_launch

    y = _empty(x, x.shape)
    if y.numel():
        own = bn_launch.BatchNorm(mean, var, weight, bias, eps)
        _run(x, [bn_launch.bn_act(x, y, own, act, residual)])
    return y


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
) -> Tensor:
    """Run the op in one pass, in float32, rounded once."""
    from resnet_fused.backends.triton import bn_launch

    y = _empty(x, x.shape)
    if y.numel():
        own = bn_launch.BatchNorm(mean, var, weight, bias, eps)
        theirs = bn_launch.BatchNorm(
            residual_mean, residual_var, residual_weight, residual_bias, residual_eps
        )
        _run(x, [bn_launch.bn_act(x, y, own, act, residual, theirs)])
    return y


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
) -> tuple[Tensor, Tensor]:
    """Run the op in one pass: each output normalises what its window holds."""
    from resnet_fused.backends.triton import bn_launch

    shape = pool_shape(x.shape, pool_size, pool_stride, pool_padding)
    y, index = _empty(x, shape), _empty(x, shape, torch.uint8)
    if y.numel():
        own = bn_launch.BatchNorm(mean, var, weight, bias, eps)
        pool = (pool_size, pool_stride, pool_padding)
        _run(x, [bn_launch.max_pool(x, own, act, pool, y, index)])
    return y, index


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
    """Run the op by its two parts."""
    saved = (x, mean, var, weight, bias, y, eps, act)
    return _bn_math.gradients(bn_act_backward_reduce, bn_act_backward_apply, grad, *saved, wanted)


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

    written = _empty(x, x.shape) if masked else None
    sum_g, sum_gx = torch.zeros_like(mean), torch.zeros_like(mean)
    if x.numel():
        own = bn_launch.BatchNorm(mean, var, weight, bias, eps)
        launches, (sum_g, sum_gx) = bn_launch.backward_reduce(grad, x, own, y, act, written)
        _run(x, launches)
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

    grad_x = _empty(x, x.shape)
    if x.numel():
        own = bn_launch.BatchNorm(mean, var, weight, bias, eps)
        sums = (sum_g, sum_gx)
        _run(x, [bn_launch.backward_apply(grad, x, own, y, sums, act, count, grad_x)])
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
    _run(x, launches)
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

    grad_x, grad_r = _empty(x, x.shape), _empty(x, x.shape)
    if x.numel():
        own = bn_launch.BatchNorm(mean, var, weight, None, eps)
        theirs = bn_launch.BatchNorm(
            residual_mean, residual_var, residual_weight, None, residual_eps
        )
        step = bn_launch.backward_apply(
            grad, x, own, y, (sum_g, sum_gx, sum_gr), act, count, grad_x, residual, theirs, grad_r
        )
        _run(x, [step])
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

    grad_x = _empty(grad, x_size)
    if grad_x.numel():
        pool = (pool_size, pool_stride, pool_padding)
        _run(grad, [bn_launch.max_pool_backward(grad, index, grad_x, pool)])
    return grad_x
