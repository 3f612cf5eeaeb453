"""The launches of a network's two ends, the stem and the head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_fused.backends._derived import derived
from resnet_fused.backends.triton.head import head_config, register_limit
from resnet_fused.backends.triton.kernels.head import linear_kernel, mean_kernel
from resnet_fused.backends.triton.kernels.stem import stem_fwd_kernel
from resnet_fused.backends.triton.launch import (
    Launch,
    dot_precision,
    geometry,
    is_wide,
    precision,
    vector,
)
from resnet_fused.backends.triton.stem import STAGES, Run, Stem, StemConfig

#: Pixels and channels that a block averages at a time.
_MEAN_PIXELS, _MEAN_CHANNELS = 16, 64


def pack_stem(weight: Tensor, dilation: int, run: Run) -> Tensor:
    """Return the weight as the stem's kernel reads it, (align, O, KH, length).

    At ``[lead]`` each row of taps lies behind as many zeros, with zeros between and behind them;
    where the taps do not fit behind so many there are zeros alone, which nothing reads.
    """
    o, c, kh, kw = weight.shape
    taps = weight.new_zeros(o, kh, (kw - 1) * dilation + 1, c)
    taps[:, :, ::dilation] = weight.detach().permute(0, 2, 3, 1)
    taps = taps.flatten(2)
    packed = weight.new_zeros(run.align, o, kh, run.length)
    for lead in range(min(run.align, run.length - taps.shape[2] + 1)):
        packed[lead, :, :, lead : lead + taps.shape[2]] = taps
    return packed


def stem(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor,
    problem: Stem,
    config: StemConfig,
    act: str | None,
) -> Launch:
    """Return the launch of one conv_bn_act_max_pool, x from :func:`launch.channels_last`."""
    kind, conv = precision(x.dtype), problem.conv
    run, dilation = problem.run(kind, config.block_k), conv.dilation[1]
    packed = derived(
        (weight,), ("triton stem", dilation, run), lambda: pack_stem(weight, dilation, run)
    )
    names = ("POOL", "POOL_STRIDE", "POOL_PAD")
    pool = zip(names, (problem.pool_size, problem.pool_stride, problem.pool_padding), strict=True)
    ph, pw = problem.out_size
    arguments = {
        "x_ptr": x, "w_ptr": packed, "y_ptr": y, "scale_ptr": vector(scale),
        "shift_ptr": vector(shift), **geometry(conv), "images": conv.n, "h": conv.h, "w": conv.w,
        "ph": ph, "pw": pw, "band": config.band, "IN": conv.c, "OUT": conv.o,
        "STRIDE_H": conv.stride[0], "STRIDE_W": conv.stride[1],
        **{f"{name}_{side}": pair[i] for name, pair in pool for i, side in enumerate("HW")},
        "ALIGN": run.align, "RUN": run.length, "RELU": act == "relu",
        "PRECISION": dot_precision(kind), "WIDE": is_wide(x.numel(), packed.numel(), y.numel()),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    tiles = (problem.pairs / config.block_m, ph / config.band, conv.o / config.block_n)
    grid = (math.ceil(tiles[0]), math.ceil(tiles[1]), math.ceil(tiles[2]))
    return Launch(stem_fwd_kernel, grid, arguments, config.num_warps, STAGES)


def head(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, capability: int
) -> list[Launch]:
    """Return the launches of one avg_pool_linear, x from :func:`launch.channels_last`.

    Two, as every block of classes needs all means: one kernel would read x again for each of them,
    at batch 256 sixteen times 50 MB, to save writing and reading 2 MB.
    """
    n, c, h, w = x.shape
    classes = weight.shape[0]
    means = torch.empty((n, c), dtype=torch.float32, device=x.device)
    averaged = {
        "x_ptr": x, "y_ptr": means, "pixels": h * w, "CHANNELS": c,
        "WIDE": is_wide(x.numel()), "BLOCK_P": _MEAN_PIXELS, "BLOCK_C": _MEAN_CHANNELS,
    }  # fmt: skip
    kind = _mean_precision(x.dtype)
    exact = kind == "ieee"
    config = head_config(n, classes, exact, capability)
    multiplied = {
        "x_ptr": means, "w_ptr": vector(weight), "bias_ptr": vector(bias), "y_ptr": y, "m": n,
        "IN": c, "OUT": classes, "PRECISION": kind,
        "WIDE": is_wide(means.numel(), weight.numel(), y.numel()), "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    grid = (math.ceil(classes / config.block_n), math.ceil(n / config.block_m), 1)
    return [
        Launch(mean_kernel, (n, math.ceil(c / _MEAN_CHANNELS), 1), averaged),
        Launch(
            linear_kernel, grid, multiplied, config.num_warps, config.num_stages,
            register_limit(config, exact),
        ),
    ]  # fmt: skip


def _mean_precision(dtype: torch.dtype) -> str:
    """Return how means are multiplied: TF32 holds 16-bit weights, and float32 as torch's flag says.

    That is the flag of matrix products, not of convolutions.
    """
    if dtype != torch.float32:
        return "tf32"
    flag: str = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if flag == "tf32" else "ieee"
