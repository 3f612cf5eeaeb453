"""Launches of the convolutions of training: with statistics, and their gradients.

Maps of any layout are converted, those to write are channels_last. Tensors on the meta device give
the same launches, to be compiled where no GPU is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends._derived import derived
from resnet_fused.backends.triton import bn_launch, gradients, launch, tiles
from resnet_fused.backends.triton.bn_launch import BatchNorm
from resnet_fused.backends.triton.kernels.conv_backward import (
    conv_bwd_data_kernel,
    conv_bwd_weight_kernel,
)
from resnet_fused.backends.triton.launch import Launch, channels_last, is_wide
from resnet_fused.backends.triton.shapes import Config, Problem, row_tiles


def conv_bn_stats(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    problem: Problem,
    capability: int,
    own: BatchNorm | None = None,
    act: str | None = None,
    config: Config | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:
    """Return the launches of a convolution with its output's statistics, and what receives these.

    Args:
        x: the input, or, with ``own``, what that BatchNorm and ``act`` make it from.
        weight: of the convolution.
        y: receives the output.
        problem: the convolution, in training.
        capability: of the device, such as 90.
        own: normalises the input.
        act: behind that.
        config: how it is cut; None for that of :func:`tiles.gathering`.
    """
    config = config or tiles.gathering(problem, launch.precision(x.dtype), capability)
    if problem.depthwise:
        return _depthwise(x, weight, y, problem, config, capability, own, act)
    convolve = launch.conv(
        channels_last(x), weight, None, None, None, y, problem, config, None, capability
    )[0]  # fmt: skip
    shape = (row_tiles(problem, config), 2, y.shape[1])
    parts = torch.empty(shape, dtype=torch.float32, device=y.device)
    convolve.arguments["moments_ptr"] = parts
    launches = [convolve]
    if own is not None:
        first, scale, shift = bn_launch.scale_shift(own)
        convolve.arguments.update(in_scale_ptr=scale, in_shift_ptr=shift, IN_RELU=act == "relu")
        launches = [first, convolve]
    merges, mean, var = bn_launch.merge_moments(parts, problem.m, config.block_m)
    return [*launches, *merges], mean, var


def _depthwise(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    problem: Problem,
    config: Config,
    capability: int,
    own: BatchNorm | None,
    act: str | None,
) -> tuple[list[Launch], Tensor, Tensor]:
    """Return the launches one by one: there is little to a depthwise convolution but its maps."""
    before, a = [], channels_last(x)
    if own is not None:
        a = torch.empty_like(a)
        before = [bn_launch.bn_act(x, a, own, act)]
    convolve = launch.conv(
        a, weight, None, None, None, y, problem, config, None, capability
    )  # fmt: skip
    after, mean, var = bn_launch.bn_stats(y)
    return [*before, *convolve, *after], mean, var


def backward_data(
    grad: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    problem: Problem,
    capability: int,
    residual: Tensor | None = None,
) -> list[Launch]:
    """Return the launches of the input's gradient plus residual, one for each pair of phases.

    Pixels that no tap meets, such as three in four at a strided 1x1 convolution, get their zeros
    from a launch without products.
    """
    grad = channels_last(grad)
    residual = None if residual is None else channels_last(residual)
    packed, strides = _packed(weight, problem)
    vertical, horizontal = (
        gradients.phases(size, *axis)
        for size, axis in zip((problem.h, problem.w), _axes(problem), strict=True)
    )
    return [
        _phase(grad, packed, strides, grad_x, residual, problem, capability, v, h)
        for v in vertical
        for h in horizontal
    ]


def bn_act_backward_data(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    own: BatchNorm,
    act: str | None,
    g: Tensor,
    problem: Problem,
    capability: int,
) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """Return the launches of the gradient in front of act, with BatchNorm's two sums of it.

    Args:
        grad: of the convolution's output.
        weight: of the convolution.
        x: what ``own`` and ``act`` make the convolution's input from.
        own: normalises x.
        act: behind that.
        g: receives the gradient of BN(x).
        problem: the convolution.
        capability: of the device, such as 90.

    Returns:
        The launches, and what receives Σ g and Σ g · (x - μ).
    """
    first, normalised = [], {"x_ptr": channels_last(x), "mean_ptr": own.mean.contiguous()}
    if act:
        launch_vectors, scale, shift = bn_launch.scale_shift(own)
        first, normalised = [launch_vectors], normalised | {"scale_ptr": scale, "shift_ptr": shift}
    steps = backward_data(grad, weight, g, problem, capability)
    parts = _with_parts(steps, g, 2, normalised)
    sums = tuple(torch.empty_like(parts[0, 0]) for _ in range(2))
    return [*first, *steps, *bn_launch.merge_sums(parts, sums)], sums


def relu_backward_data(
    grad: Tensor,
    weight: Tensor,
    y: Tensor,
    g: Tensor,
    problem: Problem,
    capability: int,
    residual: Tensor | None,
) -> tuple[list[Launch], Tensor]:
    """Return the launches of the gradient in front of the ReLU that gave ``y``, and of its sums.

    Args:
        grad: of the convolution's output.
        weight: of the convolution.
        y: its input.
        g: receives the gradient.
        problem: the convolution.
        capability: of the device, such as 90.
        residual: added in front of the mask.

    Returns:
        The launches, and what receives Σ g.
    """
    steps = backward_data(grad, weight, g, problem, capability, residual)
    parts = _with_parts(steps, g, 1, {"y_ptr": channels_last(y)})
    sums = torch.empty_like(parts[0, 0])
    return [*steps, *bn_launch.merge_sums(parts, (sums,))], sums


def _with_parts(steps: Sequence[Launch], g: Tensor, sums: int, arguments: dict[str, Any]) -> Tensor:
    """Give ``arguments`` to the steps of a data gradient, and memory for so many sums a tile."""
    counts = [math.ceil(s.arguments["m"] / s.arguments["BLOCK_M"]) for s in steps]
    parts = torch.empty((sum(counts), sums, g.shape[1]), dtype=torch.float32, device=g.device)
    for step, own_parts in zip(steps, parts.split(counts), strict=True):
        step.arguments.update(arguments, sums_ptr=own_parts)
    return parts


def _packed(weight: Tensor, problem: Problem) -> tuple[Tensor, dict[str, int]]:
    """Return the weight as the input's gradient reads it, and its strides.

    In 16 bits as the forward packs it. Tensor cores take float32 only with K, here the output's
    channels, running fastest.
    """
    _, c, kh, kw = weight.shape
    o, taps = problem.o, kh * kw
    if weight.dtype != torch.float32:  # a depthwise weight, too, in rows
        packed = derived((weight,), ("triton", 1), lambda: launch.pack(weight, 1))
        pitch = packed.shape[1]
        return packed, {"W_IN": 1, "W_OUT": pitch, "W_TAP": c, "W_GROUP": o * pitch}
    packed = derived(
        (weight,),
        ("triton", "turned", problem.groups),
        lambda: weight.detach().view(-1, o, c, kh, kw).permute(0, 2, 3, 4, 1).contiguous(),
    )
    return packed, {"W_IN": taps * o, "W_OUT": 1, "W_TAP": o, "W_GROUP": c * taps * o}


def _axes(problem: Problem) -> list[tuple[int, ...]]:
    geometry = (problem.kernel, problem.stride, problem.padding, problem.dilation)
    return list(zip(*geometry, strict=True))


def _phase(
    grad: Tensor,
    packed: Tensor,
    strides: dict[str, int],
    grad_x: Tensor,
    residual: Tensor | None,
    problem: Problem,
    capability: int,
    vertical: gradients.Phase,
    horizontal: gradients.Phase,
) -> Launch:
    kind = launch.precision(grad.dtype)
    config = tiles.heuristic(
        gradients.as_convolution(problem, vertical, horizontal), kind, capability
    )
    gh, gw = grad.shape[2:]
    m = problem.n * vertical.size * horizontal.size
    arguments = {
        "grad_ptr": grad, "w_ptr": packed, "grad_x_ptr": grad_x, "residual_ptr": residual,
        "m": m, "gh": gh, "gw": gw, "h": problem.h, "w": problem.w, "rows": vertical.size,
        "columns": horizontal.size,
        "IN": problem.c, "OUT": problem.o, "GROUPS": problem.groups, **strides,
        "KW": problem.kernel[1], "STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1],
        "LEAVES": vertical.leaves(gh) or horizontal.leaves(gw),
        "WIDE": is_wide(grad.numel(), grad_x.numel(), packed.numel(), m + config.block_m),
        "PRECISION": launch.dot_precision(kind), **_blocks(config), "GROUP_M": config.group_m,
    }  # fmt: skip
    for axis, phase in (("H", vertical), ("W", horizontal)):
        arguments |= {
            f"FIRST_{axis}": phase.first, f"TAPS_{axis}": phase.taps, f"TAP_{axis}": phase.tap,
            f"EVERY_{axis}": phase.every, f"SHIFT_{axis}": phase.shift,
            f"DIL_{axis}": phase.dilation,
        }  # fmt: skip
    tiles_m, tiles_n = math.ceil(m / config.block_m), math.ceil(problem.c / config.block_n)
    grid = (tiles_m * tiles_n, problem.groups, 1)
    return Launch(conv_bwd_data_kernel, grid, arguments, config.num_warps, config.num_stages)


def _blocks(config: Config) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}


def backward_weight(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    problem: Problem,
    capability: int,
    own: BatchNorm | None = None,
    act: str | None = None,
) -> list[Launch]:
    """Return the launches of the weight's gradient: of the parts of K, and their sum in order.

    Args:
        grad: of the output.
        x: the input, or, with ``own``, what that BatchNorm and ``act`` make it from.
        out: receives the gradient, (O, KH · KW · C/groups), contiguous.
        problem: the convolution.
        capability: of the device, such as 90.
        own: normalises the input.
        act: behind that.
    """
    kind = launch.precision(x.dtype)
    config = gradients.weight_config(problem, kind, capability)
    grad, x, parts = channels_last(grad), channels_last(x), out[None]
    if config.split_k > 1:
        parts = torch.empty((config.split_k, *out.shape), dtype=torch.float32, device=out.device)
    steps = math.ceil(problem.m / (config.block_k * config.split_k))
    rows = steps * config.block_k * config.split_k
    arguments = {
        "grad_ptr": grad, "x_ptr": x, "out_ptr": parts, "m": problem.m, "h": problem.h,
        "w": problem.w, **launch.geometry(problem), "steps": steps, "IN": problem.c,
        "OUT": problem.o, "GROUPS": problem.groups, "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1], "FLAT": gradients.flat(problem),
        "PRECISION": launch.dot_precision(kind),
        "WIDE": is_wide(grad.numel(), x.numel(), parts.numel(), rows), **_blocks(config),
    }  # fmt: skip
    tiles_m = math.ceil(problem.o / config.block_m)
    tiles_n = gradients.column_tiles(problem, config.block_n)
    grid = (tiles_m * tiles_n, config.split_k, problem.groups)
    step = Launch(conv_bwd_weight_kernel, grid, arguments, config.num_warps, config.num_stages)
    launches = [step]
    if own is not None:
        first, scale, shift = bn_launch.scale_shift(own)
        step.arguments.update(in_scale_ptr=scale, in_shift_ptr=shift, IN_RELU=act == "relu")
        launches = [first, step]
    if config.split_k > 1:
        launches += bn_launch.merge_sums(parts.flatten(1)[:, None], (out,))
    return launches
