"""The convolutions of training on the Triton kernels, each taking its op's arguments.

This module does not import triton; what does is loaded by the first call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math, _turned
from resnet_fused.backends.triton import tiles
from resnet_fused.backends.triton.shapes import Config, Problem
from resnet_fused.backends.triton.training import empty_map, run_on

if TYPE_CHECKING:
    from resnet_fused.backends.triton.bn_launch import BatchNorm


def conv_bn_stats(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op with ``config``; a tile's statistics are taken while it is in registers.

    By default that of :func:`tiles.gathering`: with tiles that TMA fetches, which `tune` found
    faster for 24 of 29 calls on an H200, it is for `tune` to say which.
    """
    problem = _problem(x.shape, weight.shape, stride, padding, dilation, groups)
    return _conv_bn_stats(x, weight, problem, None, None, config)


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
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op with ``config``, by default that of :func:`tiles.heuristic`.

    The input is normalised on its way from memory to the products.
    """
    from resnet_fused.backends.triton import bn_launch

    problem = _problem(x.shape, weight.shape, stride, padding, dilation, groups, gathered=True)
    own = bn_launch.BatchNorm(mean, var, bn_weight, bn_bias, eps)
    return _conv_bn_stats(x, weight, problem, own, act, config)


def conv_bn_stats_candidates(
    x: Tensor, weight: Tensor, *geometry: Any
) -> dict[str, Callable[..., Any]]:
    """Return the op with every config worth measuring, by the config's name."""
    return _ways(conv_bn_stats, x, _problem(x.shape, weight.shape, *geometry))


def bn_act_conv_bn_stats_candidates(x: Tensor, *args: Any) -> dict[str, Callable[..., Any]]:
    """Return the op with every config worth measuring, by the config's name."""
    *_, weight, _, _, stride, padding, dilation, groups = args
    geometry = (stride, padding, dilation, groups)
    problem = _problem(x.shape, weight.shape, *geometry, gathered=True)
    return _ways(bn_act_conv_bn_stats, x, problem)


def _ways(run: Callable[..., Any], x: Tensor, problem: Problem) -> dict[str, Callable[..., Any]]:
    """Return an op as it runs by name, and on sm_90 with the configs worth measuring beside that.

    Of other devices not all of them were compiled, and some of those that were spill registers.
    """
    from resnet_fused.backends.triton import launch
    from resnet_fused.backends.triton import run as on_gpu

    ways: dict[str, Callable[..., Any]] = {"default": run}
    arch = on_gpu.capability(x.device)
    if not problem.m or not 90 <= arch < 100:
        return ways
    kind = launch.precision(x.dtype)
    configs = tiles.candidates(problem, kind, arch)
    by_name = tiles.gathering(problem, kind, arch)
    return ways | {str(c): functools.partial(run, config=c) for c in configs if c != by_name}


def conv_backward_data_candidates(
    grad: Tensor,
    weight: Tensor,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> dict[str, Callable[..., Any]]:
    """Return the op by phases, and as a convolution with every config worth measuring."""
    from resnet_fused.backends.triton import im2col, launch, run

    found: dict[str, Callable[..., Any]] = {"default": conv_backward_data}
    if not grad.numel() or _turned.declines(weight.shape, stride, padding, dilation):
        return found
    size = _turned.size(weight.shape, groups)
    around = _turned.around(weight.shape, padding, dilation)
    geometry = (stride, around, dilation, groups)
    problem = Problem.of(grad.shape, size, *geometry, residual is not None)
    configs = im2col.beside_tiles(
        problem, launch.precision(grad.dtype), run.capability(grad.device)
    )
    return found | {str(c): functools.partial(conv_backward_data, config=c) for c in configs}


def _problem(
    x_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    gathered: bool = False,
) -> Problem:
    problem = Problem.of(x_size, weight_size, stride, padding, dilation, groups, False)
    return dataclasses.replace(problem, training=True, gathered=gathered)


def _conv_bn_stats(
    x: Tensor,
    weight: Tensor,
    problem: Problem,
    own: BatchNorm | None,
    act: str | None,
    config: Config | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from resnet_fused.backends.triton import conv_launch, run

    y = empty_map(x, (problem.n, problem.o * problem.groups, *problem.out_size))
    if not y.numel():
        nothing = torch.full(y.shape[1:2], torch.nan, device=y.device)
        return y, nothing, nothing.clone()
    launches, mean, var = conv_launch.conv_bn_stats(
        x, weight.to(x.dtype), y, problem, run.capability(x.device), own, act, config
    )
    run_on(x, launches)
    return y, mean, var


def conv_backward_data(
    grad: Tensor,
    weight: Tensor,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """Run the op: a convolution of stride 1 for every phase of the input's pixels.

    With a config, for a stride of 1 alone, by the kernels of conv_bn_act.
    """
    from resnet_fused.backends.triton import conv_launch, run

    if config is not None:
        turned = _turned.convolution(grad, weight, padding, dilation, groups, residual)
        return functools.partial(run.conv_bn_act, config=config)(*turned)
    problem = _problem(x_size, weight.shape, stride, padding, dilation, groups)
    grad_x = empty_map(grad, x_size)
    if grad_x.numel():
        arch = run.capability(grad.device)
        weight = weight.to(grad.dtype)
        run_on(grad, conv_launch.backward_data(grad, weight, grad_x, problem, arch, residual))
    return grad_x


def relu_conv_backward_data(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the op: a tile passes ReLU's mask and is summed while it is in registers."""
    from resnet_fused.backends.triton import conv_launch, run

    problem = _problem(x.shape, weight.shape, stride, padding, dilation, groups)
    g = empty_map(x, x.shape)
    if not g.numel():
        return g, torch.zeros(x.shape[1], device=x.device)
    launches, sums = conv_launch.relu_backward_data(
        grad, weight.to(grad.dtype), x, g, problem, run.capability(grad.device), residual
    )
    run_on(grad, launches)
    return g, sums


def bn_act_conv_backward_data(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Run the op: a tile passes ReLU's mask and is summed while it is in registers.

    x's gradient is then written over it.
    """
    from resnet_fused.backends.triton import bn_launch, conv_launch, run

    problem = _problem(x.shape, weight.shape, stride, padding, dilation, groups)
    own, g = bn_launch.BatchNorm(mean, var, bn_weight, bn_bias, eps), empty_map(x, x.shape)

    def reduce(*_: object) -> tuple[Tensor, Tensor, Tensor]:
        if not g.numel():
            return torch.zeros_like(mean), torch.zeros_like(mean), g
        arch = run.capability(grad.device)
        launches, (sum_g, sum_gx) = conv_launch.bn_act_backward_data(
            grad, weight.to(grad.dtype), x, own, act, g, problem, arch
        )
        run_on(grad, launches)
        return sum_g, sum_gx, g

    def apply(*args: Any) -> Tensor:
        sum_g, sum_gx, _, _, count = args[-5:]
        if g.numel():
            step = bn_launch.backward_apply(g, x, own, None, (sum_g, sum_gx), None, count, g)
            run_on(x, [step])
        return g

    saved = (x, mean, var, bn_weight, bn_bias, None, eps, act)
    return _bn_math.gradients(reduce, apply, grad, *saved, (*wanted, True))[:3]


def bn_act_conv_backward(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Run the op by its two sides: the activation is on its way to the products, nowhere else."""
    vectors, geometry = (mean, var, bn_weight, bn_bias), (stride, padding, dilation, groups)
    found = bn_act_conv_backward_data(grad, weight, x, *vectors, eps, act, *geometry, wanted)
    rest: tuple[Any, ...] = (weight.shape, eps, act, *geometry, channels_last, dtype)
    return *found, bn_act_conv_backward_weight(grad, x, *vectors, *rest)


def conv_backward_weight(
    grad: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Run the op: a product over pixels, in parts that are added in order."""
    problem = _problem(x.shape, weight_size, stride, padding, dilation, groups)
    return _backward_weight(grad, x, weight_size, problem, None, None, channels_last, dtype)


def bn_act_conv_backward_weight(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight_size: Sequence[int],
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Run the op; the input is normalised on its way from memory to the products."""
    from resnet_fused.backends.triton import bn_launch

    problem = _problem(x.shape, weight_size, stride, padding, dilation, groups)
    own = bn_launch.BatchNorm(mean, var, bn_weight, bn_bias, eps)
    return _backward_weight(grad, x, weight_size, problem, own, act, channels_last, dtype)


def _backward_weight(
    grad: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    problem: Problem,
    own: BatchNorm | None,
    act: str | None,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    from resnet_fused.backends.triton import conv_launch, run

    o, c, kh, kw = weight_size
    rows = grad.new_empty((o, kh * kw * c), dtype=dtype)
    if grad.numel():
        arch = run.capability(grad.device)
        run_on(grad, conv_launch.backward_weight(grad, x, rows, problem, arch, own, act))
    else:
        rows.zero_()
    if channels_last:
        return rows.as_strided((o, c, kh, kw), (kh * kw * c, 1, kw * c, c))
    if kh * kw == 1 or c == 1:
        return rows.view(o, c, kh, kw)
    return rows.view(o, kh, kw, c).permute(0, 3, 1, 2).contiguous()
