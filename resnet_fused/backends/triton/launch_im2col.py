"""The launch of the Gluon convolution: imports Gluon, and so wants Triton 3.8 or later."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor, TensorDescriptorIm2Col

from resnet_fused.backends.triton.cost import occupancy
from resnet_fused.backends.triton.im2col import Windows
from resnet_fused.backends.triton.kernels.im2col import conv_im2col_fwd_kernel
from resnet_fused.backends.triton.launch import Launch, geometry, precision, processors
from resnet_fused.backends.triton.shapes import Config, Problem, count

_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def conv(
    x: Tensor,
    packed: Tensor,
    vectors: dict[str, Tensor | None],
    residual: Tensor | None,
    y: Tensor,
    problem: Problem,
    config: Config,
    relu: bool,
    capability: int,
) -> Launch:
    """Return the launch; the packed weight and ``vectors`` are those of :func:`launch.conv`."""
    out = (problem.m, problem.o)
    stride_h, stride_w = problem.stride
    weight = (problem.o, problem.taps, problem.c)
    tile = (config.block_m, config.block_n)
    arguments = {
        "x_desc": _windows(x, problem, config),
        "w_desc": _tiled(packed, weight, (config.block_n, 1, config.block_k)),
        "y_desc": _tiled(y, out, tile),
        "residual_desc": None if residual is None else _tiled(residual, out, tile),
        **vectors, **geometry(problem), "m": problem.m, "IN": problem.c, "OUT": problem.o,
        "STRIDE_H": stride_h, "STRIDE_W": stride_w, "RELU": relu, "STAGES": config.num_stages,
        "GROUP_M": config.group_m,
    }  # fmt: skip
    resident = occupancy(problem, precision(x.dtype), config, capability)
    grid = (min(count(problem, config), processors(x.device) * resident), 1, 1)
    return Launch(conv_im2col_fwd_kernel, grid, arguments, config.num_warps)


def _windows(x: Tensor, problem: Problem, config: Config) -> TensorDescriptorIm2Col:
    shape, block = (problem.n, problem.h, problem.w, problem.c), (config.block_m, config.block_k)
    windows = Windows.of(problem)
    return TensorDescriptorIm2Col(
        x, list(shape), _strides(shape), list(block), _layout(x, block),
        element_strides=[1, *windows.stride, 1],
        pixel_box_lower_corner=list(windows.lower),
        pixel_box_upper_corner=list(windows.upper),
    )  # fmt: skip


def _tiled(t: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> TensorDescriptor:
    return TensorDescriptor(t, list(shape), _strides(shape), list(block), _layout(t, block))


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _layout(t: Tensor, block: tuple[int, ...]) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _TYPES[t.dtype])
