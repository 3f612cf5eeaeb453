"""The ops on Triton kernels, each with the config of its choice: imports triton."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from resnet_fused.backends.triton import im2col, launch, launch_ends, pair_tiles, stem, tiles
from resnet_fused.backends.triton.pair_tiles import Pair
from resnet_fused.backends.triton.shapes import Config, Problem
from resnet_fused.backends.triton.stem import Stem, StemConfig

#: What the interpreter stands for: the newest device with every path.
INTERPRETED_CAPABILITY = 90


@functools.lru_cache
def capability(device: torch.device) -> int:
    """Return a device's compute capability, such as 90."""
    if device.type != "cuda":
        return INTERPRETED_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
    config: Config | None = None,
) -> Tensor:
    """Run the op with ``config``, by default that of :func:`tiles.heuristic`."""
    shape = (x.shape, weight.shape, stride, padding, dilation, groups, residual is not None)
    problem = Problem.of(*shape)
    y = _empty(x, (problem.n, problem.o * groups, *problem.out_size))
    if y.numel() == 0:
        return y
    arch = capability(x.device)
    if config is None:
        config = tiles.heuristic(problem, launch.precision(x.dtype), arch)
    with torch.cuda.device_of(x):
        x, residual = launch.channels_last(x), _map(residual)
        for step in launch.conv(
            x, weight, scale, shift, residual, y, problem, config, act, arch
        ):  # fmt: skip
            step.run()
    return y


def conv_bn_act_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight2: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str | None,
    act2: str | None,
    config: Config | None = None,
) -> Tensor:
    """Run the op with ``config``, by default that of :func:`pair_tiles.heuristic`."""
    geometry = (stride, padding, dilation)
    pair = Pair.of(x.shape, weight.shape, weight2.shape, *geometry, residual is not None)
    y = _empty(x, (pair.first.n, pair.o, *pair.first.out_size))
    if y.numel() == 0:
        return y
    if config is None:
        config = pair_tiles.heuristic(pair, launch.precision(x.dtype), capability(x.device))
    with torch.cuda.device_of(x):
        x, residual = launch.channels_last(x), _map(residual)
        launch.pair(
            x, weight, scale, shift, weight2, scale2, shift2, residual, y, pair, config, act, act2
        ).run()
    return y


def conv_bn_act_max_pool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
    *pool: Sequence[int],
    config: StemConfig | None = None,
) -> Tensor:
    """Run the op with ``config``, by default that of :func:`stem.heuristic`."""
    problem = Stem.of(x.shape, weight.shape, stride, padding, dilation, *pool)
    y = _empty(x, (problem.conv.n, problem.conv.o, *problem.out_size))
    if y.numel() == 0:
        return y
    if config is None:
        config = stem.heuristic(problem, launch.precision(x.dtype), capability(x.device))
    with torch.cuda.device_of(x):
        x = launch.channels_last(x)
        launch_ends.stem(x, weight, scale, shift, y, problem, config, act).run()
    return y


def avg_pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run the op in two kernels, the means between them in float32."""
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    if y.numel():
        with torch.cuda.device_of(x):
            x = launch.channels_last(x)
            for step in launch_ends.head(x, weight, bias, y, capability(x.device)):
                step.run()
    return y


def bn_apply(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, act: str | None
) -> Tensor:
    """Run the op, and add_relu as the case without scale and shift."""
    y = _empty(x, x.shape)
    if y.numel():
        with torch.cuda.device_of(x):
            x, residual = launch.channels_last(x), _map(residual)
            launch.affine(x, scale, shift, residual, y, act).run()
    return y


def conv_candidates(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
) -> dict[str, Callable[..., Tensor]]:
    """Return the op with every config worth measuring, by the config's name."""
    problem = Problem.of(
        x.shape, weight.shape, stride, padding, dilation, groups, residual is not None
    )
    configs = im2col.beside_tiles(problem, launch.precision(x.dtype), capability(x.device))
    return {str(c): functools.partial(conv_bn_act, config=c) for c in configs}


def stem_candidates(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
    *pool: Sequence[int],
) -> dict[str, Callable[..., Tensor]]:
    """Return the op with every config worth measuring, by the config's name."""
    problem = Stem.of(x.shape, weight.shape, stride, padding, dilation, *pool)
    configs = stem.candidates(problem, launch.precision(x.dtype), capability(x.device))
    return {str(c): functools.partial(conv_bn_act_max_pool, config=c) for c in configs}


def pair_candidates(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight2: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str | None,
    act2: str | None,
) -> dict[str, Callable[..., Tensor]]:
    """Return the op with every config worth measuring, by the config's name."""
    geometry = (stride, padding, dilation)
    pair = Pair.of(x.shape, weight.shape, weight2.shape, *geometry, residual is not None)
    configs = pair_tiles.candidates(pair, launch.precision(x.dtype), capability(x.device))
    return {str(c): functools.partial(conv_bn_act_conv_bn_act, config=c) for c in configs}


def _map(t: Tensor | None) -> Tensor | None:
    return None if t is None else launch.channels_last(t)


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(
        tuple(shape), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
