"""Depthwise convolution: no tensor cores, one multiply-add per channel and tap."""

import triton
import triton.language as tl

from resnet_fused.backends.triton.kernels.shared import activate, rounded


@triton.jit(do_not_specialize=["m", "h", "w", "oh", "ow"])
def depthwise_fwd_kernel(
    x_ptr, w_ptr, y_ptr, scale_ptr, shift_ptr, residual_ptr, m, h, w, oh, ow,
    OUT: tl.constexpr, GROUPS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    RELU: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M output pixels and BLOCK_N of the GROUPS · OUT output channels.

    Each group has one input channel and OUT output channels. The weight is (KH · KW, GROUPS · OUT).
    """
    TOTAL: tl.constexpr = GROUPS * OUT
    tiles_n: tl.constexpr = (TOTAL + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    total = TOTAL
    if WIDE:
        tile_m, total = tile_m.to(tl.int64), tl.full((), TOTAL, tl.int64)
        w, oh = w.to(tl.int64), oh.to(tl.int64)  # products with them are offsets within an image
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, channel_in = rows < m, channels < TOTAL
    top = rows // ow % oh * STRIDE_H - PAD_H
    left = rows % ow * STRIDE_W - PAD_W
    pixels = (rows // (ow * oh) * h + top) * w + left
    x_ptrs = x_ptr + pixels[:, None] * GROUPS + (channels // OUT)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tap in range(KH * KW):
        down, right = tap // KW * DIL_H, tap % KW * DIL_W
        y_in, x_in = top + down, left + right
        inside = row_in & (y_in >= 0) & (y_in < h) & (x_in >= 0) & (x_in < w)
        mask = inside[:, None] & channel_in[None, :]
        x = tl.load(x_ptrs + (down * w + right) * GROUPS, mask=mask, other=0.0)
        weight = tl.load(w_ptr + tap * total + channels, mask=channel_in, other=0.0)
        acc += x.to(tl.float32) * weight.to(tl.float32)[None, :]

    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + channels, mask=channel_in, other=0.0).to(tl.float32)[None, :]
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + channels, mask=channel_in, other=0.0).to(tl.float32)[None, :]
    offsets = rows[:, None] * TOTAL + channels[None, :]
    wanted = row_in[:, None] & channel_in[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=wanted, other=0.0).to(tl.float32)
    acc = rounded(activate(acc, RELU), y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, acc, mask=wanted)
