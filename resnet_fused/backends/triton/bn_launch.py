"""Launches of BatchNorm's passes in training and of the stem's pool.

Maps of any layout are converted, those to write are channels_last. Tensors on the meta device give
the same launches, to be compiled where no GPU is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends.triton import passes
from resnet_fused.backends.triton.kernels.bn import (
    bn_act_bwd_apply_kernel,
    bn_act_bwd_reduce_kernel,
    bn_act_fwd_kernel,
)
from resnet_fused.backends.triton.kernels.moments import (
    bn_stats_kernel,
    merge_moments_kernel,
    merge_sums_kernel,
)
from resnet_fused.backends.triton.kernels.normalise import scale_shift_kernel
from resnet_fused.backends.triton.kernels.pool import (
    bn_act_max_pool_fwd_kernel,
    max_pool_bwd_kernel,
)
from resnet_fused.backends.triton.launch import Launch, channels_last, is_wide


class BatchNorm(NamedTuple):
    """What normalises a map: statistics, affine vectors or None, and the constant in the root."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def arguments(self, prefix: str = "") -> dict[str, Any]:
        """Return the kernels' arguments of this BatchNorm."""
        vectors = {"mean": self.mean, "var": self.var, "weight": self.weight, "bias": self.bias}
        found: dict[str, Any] = {f"{prefix}{k}_ptr": contiguous(v) for k, v in vectors.items()}
        return {**found, f"{prefix}eps": self.eps}


#: The arguments of a residual that has no BatchNorm, or of no residual.
_NO_RESIDUAL: dict[str, Any] = {
    **{f"residual_{name}_ptr": None for name in ("mean", "var", "weight", "bias")},
    "residual_eps": 0.0,
}


def contiguous(vector: Tensor | None) -> Tensor | None:
    """Return the vector with its values one after another."""
    return None if vector is None else vector.contiguous()


def _map(t: Tensor | None) -> Tensor | None:
    return None if t is None else channels_last(t)


def _over(x: Tensor, cut: passes.Cut) -> dict[str, Any]:
    n, c, h, w = x.shape
    rows = n * h * w + cut.block_m * cut.steps
    return {
        "m": n * h * w, "CHANNELS": c, "WIDE": is_wide(x.numel(), rows),
        "BLOCK_M": cut.block_m, "BLOCK_C": cut.block_c,
    }  # fmt: skip


def _pass(kernel: Any, x: Tensor, arguments: dict[str, Any]) -> Launch:
    n, c, h, w = x.shape
    cut = passes.passing(n * h * w, c)
    arguments = {**arguments, **_over(x, cut), "STEPS": cut.steps}
    return Launch(kernel, cut.grid(n * h * w, c), arguments)


def bn_act(
    x: Tensor,
    y: Tensor,
    own: BatchNorm,
    act: str | None,
    residual: Tensor | None = None,
    theirs: BatchNorm | None = None,
    bits: Tensor | None = None,
) -> Launch:
    """Return the launch of y = act(BN(x) + residual), or, with ``theirs``, + BN(residual).

    ``bits`` receives what passed act.
    """
    arguments = {
        "x_ptr": channels_last(x), "y_ptr": y, "residual_ptr": _map(residual),
        "RELU": act == "relu", **own.arguments(),
        **(theirs.arguments("residual_") if theirs else _NO_RESIDUAL),
        "bits_ptr": bits,
    }  # fmt: skip
    return _pass(bn_act_fwd_kernel, x, arguments)


def bn_stats(x: Tensor) -> tuple[list[Launch], Tensor, Tensor]:
    """Return the launches of a map's statistics, and what receives mean and biased variance."""
    n, c, h, w = x.shape
    m, cut = n * h * w, passes.staying(c)
    grid = cut.grid(m, c)
    parts = torch.empty((grid[0], 2, c), dtype=torch.float32, device=x.device)
    arguments = {"x_ptr": channels_last(x), "moments_ptr": parts, **_over(x, cut)}
    merges, mean, var = merge_moments(parts, m, cut.block_m)
    return [Launch(bn_stats_kernel, grid, arguments, num_warps=8), *merges], mean, var


def merge_moments(
    parts: Tensor, pixels: int, part_rows: int
) -> tuple[list[Launch], Tensor, Tensor]:
    """Return the launches that merge (parts, 2, C) moments, and what receives mean and variance."""
    mean, var = (torch.empty_like(parts[0, 0]) for _ in range(2))
    launches = []
    while True:
        count, _, channels = parts.shape
        cut = passes.merging(count)
        grid = cut.grid(count, channels)
        merged = None if grid[0] == 1 else parts.new_empty((grid[0], 2, channels))
        arguments = {
            "parts_ptr": parts, "out_ptr": merged, "mean_ptr": mean, "var_ptr": var, "m": pixels,
            "parts": count, "part_rows": part_rows, "CHANNELS": channels,
            "BLOCK_P": cut.block_m, "BLOCK_C": cut.block_c,
        }  # fmt: skip
        launches.append(Launch(merge_moments_kernel, grid, arguments))
        if merged is None:
            return launches, mean, var
        parts, part_rows = merged, part_rows * cut.block_m


def merge_sums(parts: Tensor, out: Sequence[Tensor]) -> list[Launch]:
    """Return the launches that add up (parts, sums, C) into as many tensors of C elements."""
    names = ("sum_g_ptr", "sum_gx_ptr", "sum_gr_ptr")
    vectors = dict(zip_longest(names, out))
    launches = []
    while True:
        count, sums, channels = parts.shape
        cut = passes.merging(count)
        grid = cut.grid(count, channels)
        merged = None if grid[0] == 1 else parts.new_empty((grid[0], sums, channels))
        arguments = {
            "parts_ptr": parts, "out_ptr": merged, **vectors, "parts": count,
            "CHANNELS": channels, "SUMS": sums, "BLOCK_P": cut.block_m, "BLOCK_C": cut.block_c,
        }  # fmt: skip
        launches.append(Launch(merge_sums_kernel, grid, arguments))
        if merged is None:
            return launches
        parts = merged


def backward_reduce(
    grad: Tensor,
    x: Tensor,
    own: BatchNorm,
    y: Tensor | None,
    act: str | None,
    masked: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mean: Tensor | None = None,
) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """Return the launches of the two sums, or three with a residual, and what receives them."""
    channels, sums = x.shape[1], 2 if residual is None else 3
    arguments = {
        "grad_ptr": channels_last(grad), "x_ptr": channels_last(x), "y_ptr": _map(y),
        "residual_ptr": _map(residual), "residual_mean_ptr": contiguous(residual_mean),
        "masked_ptr": masked, "SUMS": sums, "RELU": act == "relu", **own.arguments(),
    }  # fmt: skip
    step = _pass(bn_act_bwd_reduce_kernel, x, arguments)
    parts = torch.empty((step.grid[0], sums, channels), dtype=torch.float32, device=x.device)
    step.arguments["sums_ptr"] = parts
    out = tuple(torch.empty_like(parts[0, 0]) for _ in range(sums))
    return [step, *merge_sums(parts, out)], out


def backward_apply(
    grad: Tensor,
    x: Tensor,
    own: BatchNorm,
    y: Tensor | None,
    sums: Sequence[Tensor],
    act: str | None,
    count: int,
    grad_x: Tensor,
    residual: Tensor | None = None,
    theirs: BatchNorm | None = None,
    grad_residual: Tensor | None = None,
) -> Launch:
    """Return the launch of x's gradient and, with ``theirs``, of the residual's."""
    others = theirs.arguments("residual_") if theirs else dict(_NO_RESIDUAL)
    del others["residual_bias_ptr"]
    names = ("sum_g_ptr", "sum_gx_ptr", "sum_gr_ptr")
    given = [contiguous(s) for s in sums] + [None] * (3 - len(sums))
    arguments = {
        "grad_ptr": channels_last(grad), "x_ptr": channels_last(x), "y_ptr": _map(y),
        "residual_ptr": _map(residual), "grad_x_ptr": grad_x,
        "grad_residual_ptr": grad_residual, **own.arguments(), **others,
        **dict(zip(names, given, strict=True)), "count": max(count, 1), "RELU": act == "relu",
    }  # fmt: skip
    return _pass(bn_act_bwd_apply_kernel, x, arguments)


def scale_shift(own: BatchNorm) -> tuple[Launch, Tensor, Tensor]:
    """Return the launch of a BatchNorm's scale and shift, and what receives them."""
    scale, shift = torch.empty_like(own.mean), torch.empty_like(own.mean)
    channels, block = len(own.mean), 128
    arguments = {
        **own.arguments(), "scale_ptr": scale, "shift_ptr": shift, "CHANNELS": channels,
        "BLOCK": block,
    }  # fmt: skip
    return Launch(scale_shift_kernel, (math.ceil(channels / block), 1, 1), arguments), scale, shift


def _pool(
    kernel: Any,
    over: Tensor,
    x_size: Sequence[int],
    y_size: Sequence[int],
    pool: Sequence[Sequence[int]],
    arguments: dict[str, Any],
) -> Launch:
    n, c, h, w = over.shape
    cut = passes.passing(n * h * w, c)._replace(steps=1)
    (kh, kw), (stride_h, stride_w), (pad_h, pad_w) = pool
    over_rows = _over(over, cut)
    wide = over_rows["WIDE"] or is_wide(math.prod(x_size), math.prod(y_size))
    arguments = {
        **arguments, **over_rows, "h": x_size[2], "w": x_size[3], "oh": y_size[2],
        "ow": y_size[3], "KH": kh, "KW": kw, "STRIDE_H": stride_h, "STRIDE_W": stride_w,
        "PAD_H": pad_h, "PAD_W": pad_w, "WIDE": wide,
    }  # fmt: skip
    return Launch(kernel, cut.grid(n * h * w, c), arguments)


def max_pool(
    x: Tensor,
    own: BatchNorm,
    act: str | None,
    pool: Sequence[Sequence[int]],
    y: Tensor,
    index: Tensor,
    taken: Tensor | None,
) -> Launch:
    """Return the launch of the pool of act(BN(x)), with what it takes of x and where."""
    arguments = {
        "x_ptr": channels_last(x), "y_ptr": y, "index_ptr": index, "taken_ptr": taken,
        "RELU": act == "relu", **own.arguments(),
    }  # fmt: skip
    return _pool(bn_act_max_pool_fwd_kernel, y, x.shape, y.shape, pool, arguments)


def max_pool_backward(
    grad: Tensor, index: Tensor, grad_x: Tensor, pool: Sequence[Sequence[int]]
) -> Launch:
    """Return the launch of the pool's gradient."""
    arguments = {
        "grad_ptr": channels_last(grad), "index_ptr": channels_last(index), "grad_x_ptr": grad_x
    }  # fmt: skip
    return _pool(max_pool_bwd_kernel, grad_x, grad_x.shape, grad.shape, pool, arguments)
