"""Launches of a map's channel covariance and of a 1x1 convolution's BatchNorm by it.

Tensors on the meta device give the same launches, to be compiled where no GPU is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends.triton.bn_launch import contiguous
from resnet_fused.backends.triton.kernels.covariance import (
    covariance_kernel,
    merge_covariance_kernel,
    pointwise_gradients_kernel,
    pointwise_shift_kernel,
    pointwise_stats_kernel,
    pointwise_turn_kernel,
)
from resnet_fused.backends.triton.launch import Launch, channels_last, is_wide
from resnet_fused.backends.triton.shapes import power

#: Processors of an H100, and how many programs of smaller tiles than the largest one has at once.
#: By the shape alone, as the order of a sum's terms follows from it.
_PROCESSORS, _SMALL = 132, 4
#: Steps of a part at least: each part is a matrix to be written and read.
_STEPS = 8
#: The side of a tile of the covariance.
_TILE = 128
#: Of what a program merges: columns, which are a sector of memory; parts at most, and values.
_COLUMNS, _PARTS, _VALUES = 8, 128, 4096
#: The least side of a product; and the input channels that a program has at most at once.
_LEAST, _WIDEST = 16, 256
#: Bytes of the covariance that a program fetches at once.
_FETCHED = 2**15


class Cut(NamedTuple):
    """How the pixels of a covariance fall into parts."""

    tile: int
    block_k: int
    parts: int
    #: Blocks of one part.
    steps: int

    @staticmethod
    def of(pixels: int, channels: int, itemsize: int) -> Cut:
        """Return the cut for so many pixels and channels of so many bytes."""
        tile = min(_TILE if itemsize == 2 else _TILE // 2, max(_LEAST, power(channels)))
        block_k = 64 if itemsize == 2 else 16
        across = math.ceil(channels / tile)
        blocks = math.ceil(pixels / block_k)
        programs = _PROCESSORS * (1 if tile == _TILE else _SMALL)
        wanted = min(programs // (across * (across + 1) // 2), blocks // _STEPS)
        steps = math.ceil(blocks / max(wanted, 1))
        return Cut(tile, block_k, math.ceil(blocks / steps), steps)


def channel_covariance(x: Tensor, capability: int) -> tuple[list[Launch], Tensor, Tensor]:
    """Return the launches of a map's covariance, and what receives mean and covariance."""
    n, c, h, w = x.shape
    pixels = n * h * w
    cut = Cut.of(pixels, c, x.element_size())
    parts = torch.empty((cut.parts, c + 1, c), dtype=torch.float32, device=x.device)
    mean, cov = parts.new_empty(c), parts.new_empty(c, c)
    rows = cut.parts * cut.steps * cut.block_k
    across = math.ceil(c / cut.tile)
    products = {
        "x_ptr": channels_last(x), "parts_ptr": parts, "m": pixels, "steps": cut.steps,
        "CHANNELS": c, "PRECISION": "ieee", "WIDE": is_wide(x.numel(), rows * c, parts.numel()),
        "BLOCK_C": cut.tile, "BLOCK_K": cut.block_k,
    }  # fmt: skip
    at_once = min(_PARTS, power(cut.parts))
    merged = {
        "CHANNELS": c, "BLOCK_M": _VALUES // (_COLUMNS * at_once), "BLOCK_N": _COLUMNS,
        "BLOCK_P": at_once,
    }  # fmt: skip
    merge = {
        "parts_ptr": parts, "mean_ptr": mean, "cov_ptr": cov, "m": pixels, "parts": cut.parts,
        **merged,
    }  # fmt: skip
    grid = math.ceil(c / merged["BLOCK_M"]), math.ceil(c / _COLUMNS), 1
    warps = 8 if cut.tile == _TILE else 4
    stages = 5 if across == 1 else 3  # of one block, not of two
    launches = [
        Launch(covariance_kernel, (across * across, cut.parts, 1), products, warps, stages),
        Launch(merge_covariance_kernel, grid, merge),
    ]
    return launches, mean, cov


def _by_outputs(weight: Tensor) -> tuple[tuple[int, int, int], dict[str, int], int]:
    """Return grid, blocks and warps of kernels that have all of some rows of the weight."""
    o, c = weight.shape[:2]
    block_c = min(_WIDEST, max(_LEAST, power(c)))
    block_k = min(32, block_c, _FETCHED // (4 * block_c))
    blocks = {"OUT": o, "CHANNELS": c, "BLOCK_O": _LEAST, "BLOCK_C": block_c, "BLOCK_K": block_k}
    return (math.ceil(o / _LEAST), 1, 1), blocks, 8 if block_c == _WIDEST else 4


def pointwise_bn_stats(
    weight: Tensor,
    x_mean: Tensor,
    x_cov: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
) -> tuple[Launch, tuple[Tensor, ...]]:
    """Return the launch of the op, and what receives mean, variance, scale and shift."""
    made = tuple(x_mean.new_empty(len(weight)) for _ in range(4))
    mean, var, scale, shift = made
    grid, blocks, warps = _by_outputs(weight)
    arguments = {
        "w_ptr": weight.contiguous(), "x_mean_ptr": contiguous(x_mean),
        "cov_ptr": contiguous(x_cov), "weight_ptr": contiguous(bn_weight),
        "bias_ptr": contiguous(bn_bias), "mean_ptr": mean, "var_ptr": var, "scale_ptr": scale,
        "shift_ptr": shift, "eps": eps, **blocks,
    }  # fmt: skip
    return Launch(pointwise_stats_kernel, grid, arguments, warps, 3), made


def pointwise_bn_gradients(
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
) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """Return the launches of the op, and what receives its results."""
    o, c = weight.shape[:2]
    grad_w, of_g = weight.new_empty(o, c, 1, 1, dtype=dtype), weight.new_empty(o, c, 1, 1)
    of_x = weight.new_empty(c, c, 1, 1)
    scale, shift = x_mean.new_empty(c), x_mean.new_empty(c)
    grad_weight, slope = x_mean.new_empty(o), x_mean.new_empty(o)
    weight, sum_g, x_mean = weight.contiguous(), sum_g.contiguous(), x_mean.contiguous()
    grid, blocks, warps = _by_outputs(weight)
    gradients = {
        "w_ptr": weight, "product_ptr": product.contiguous(), "sum_g_ptr": sum_g,
        "mean_ptr": contiguous(mean), "var_ptr": contiguous(var), "x_mean_ptr": x_mean,
        "cov_ptr": contiguous(x_cov), "weight_ptr": contiguous(bn_weight), "grad_w_ptr": grad_w,
        "grad_weight_ptr": grad_weight, "of_g_ptr": of_g, "slope_ptr": slope, "eps": eps,
        "count": count, **blocks,
    }  # fmt: skip
    # These walk through all of the outputs: in long steps.
    sizes = {"OUT": o, "CHANNELS": c}
    block_c = min(32, max(_LEAST, power(c)))
    turn = {
        "w_ptr": weight, "slope_ptr": slope, "of_x_ptr": of_x, "scale_ptr": scale, **sizes,
        "BLOCK_O": 64, "BLOCK_C": block_c,
    }  # fmt: skip
    shifting = {
        "of_g_ptr": of_g, "of_x_ptr": of_x, "scale_ptr": scale, "sum_g_ptr": sum_g,
        "x_mean_ptr": x_mean, "shift_ptr": shift, "count": count, **sizes, "BLOCK_O": 256,
        "BLOCK_C": _LEAST,
    }  # fmt: skip
    side = math.ceil(c / block_c)
    launches = [
        Launch(pointwise_gradients_kernel, grid, gradients, warps, 3),
        Launch(pointwise_turn_kernel, (side, side, 1), turn, num_stages=2),
        Launch(pointwise_shift_kernel, (math.ceil(c / _LEAST), 1, 1), shifting),
    ]
    return launches, (grad_w, grad_weight, of_g, of_x, scale, shift)
