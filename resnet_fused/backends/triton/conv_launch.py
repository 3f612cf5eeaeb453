"""Launches of the convolutions of training: with statistics, and their gradients.

Maps of any layout are converted, those to write are channels_last. Tensors on the meta device give
the same launches, to be compiled where no GPU is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_fused.backends.triton import bn_launch, launch, tiles
from resnet_fused.backends.triton.bn_launch import BatchNorm
from resnet_fused.backends.triton.launch import Launch, channels_last
from resnet_fused.backends.triton.shapes import Config, Problem


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
        config: how to cut it, by default as :func:`tiles.heuristic` says.
    """
    config = config or tiles.heuristic(problem, launch.precision(x.dtype), capability)
    if problem.depthwise:
        return _depthwise(x, weight, y, problem, config, capability, own, act)
    convolve = launch.conv(
        channels_last(x), weight, None, None, None, y, problem, config, None, capability
    )[0]  # fmt: skip
    shape = (math.ceil(problem.m / config.block_m), 2, y.shape[1])
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
