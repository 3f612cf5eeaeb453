"""The stem's end in training: BatchNorm, ReLU and max pool in one pass, and the pool's gradient."""

import triton
import triton.language as tl

from resnet_fused.backends.triton.kernels.normalise import normalise, scale_and_shift
from resnet_fused.backends.triton.kernels.shared import rounded


@triton.jit(do_not_specialize=["m", "h", "w", "oh", "ow", "eps"])
def bn_act_max_pool_fwd_kernel(
    x_ptr, y_ptr, index_ptr, taken_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr,
    m, h, w, oh, ow, eps,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, RELU: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_M of the m outputs; of each the element of x taken, and its place in the window.

    As in torch, the first of equal values is taken, and the last NaN.
    """
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_in, channel_in = rows < m, channels < CHANNELS
    scale, shift = scale_and_shift(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channels, channel_in
    )
    top = rows // ow % oh * STRIDE_H - PAD_H
    left = rows % ow * STRIDE_W - PAD_W
    corner = (rows // (ow * oh) * h + top) * w + left
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), dtype=tl.float32)
    # Where all are -inf, torch takes the first element that is not padding.
    start = tl.maximum(-top, 0) * KW + tl.maximum(-left, 0)
    index = start.to(tl.int32)[:, None] + tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32)
    kept = tl.zeros((BLOCK_M, BLOCK_C), dtype=x_ptr.dtype.element_ty)
    for place in range(KH * KW):
        down, right = place // KW, place % KW
        y_in, x_in = top + down, left + right
        inside = row_in & (y_in >= 0) & (y_in < h) & (x_in >= 0) & (x_in < w)
        offsets = (corner + down * w + right)[:, None] * CHANNELS + channels[None, :]
        x = tl.load(x_ptr + offsets, mask=inside[:, None] & channel_in[None, :], other=0.0)
        # Compared as rounded: what is equal then is a tie.
        value = normalise(x, scale[None, :], shift[None, :], RELU)
        value = rounded(value, x.dtype).to(tl.float32)
        taken = inside[:, None] & ((value > best) | (value != value))
        best = tl.where(taken, value, best)
        index = tl.where(taken, place, index)
        if taken_ptr is not None:
            kept = tl.where(inside[:, None] & (index == place), x, kept)
    offsets = rows[:, None] * CHANNELS + channels[None, :]
    wanted = row_in[:, None] & channel_in[None, :]
    tl.store(y_ptr + offsets, best.to(y_ptr.dtype.element_ty), mask=wanted)
    tl.store(index_ptr + offsets, index.to(tl.uint8), mask=wanted)
    if taken_ptr is not None:
        tl.store(taken_ptr + offsets, kept, mask=wanted)


@triton.jit(do_not_specialize=["m", "h", "w", "oh", "ow"])
def max_pool_bwd_kernel(
    grad_ptr, index_ptr, grad_x_ptr, m, h, w, oh, ow,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_M of the m inputs: each adds up the outputs that took it, in one order."""
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_in, channel_in = rows < m, channels < CHANNELS
    y_in, x_in = rows // w % h + PAD_H, rows % w + PAD_W
    image = rows // (w * h) * oh
    # The last window over a pixel, and as many before it as may reach it.
    OVER_H: tl.constexpr = (KH + STRIDE_H - 1) // STRIDE_H
    OVER_W: tl.constexpr = (KW + STRIDE_W - 1) // STRIDE_W
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for window in range(OVER_H * OVER_W):
        out_y, out_x = y_in // STRIDE_H - window // OVER_W, x_in // STRIDE_W - window % OVER_W
        down, right = y_in - out_y * STRIDE_H, x_in - out_x * STRIDE_W
        inside = row_in & (out_y >= 0) & (out_y < oh) & (out_x >= 0) & (out_x < ow)
        inside &= (down < KH) & (right < KW)
        offsets = ((image + out_y) * ow + out_x)[:, None] * CHANNELS + channels[None, :]
        wanted = inside[:, None] & channel_in[None, :]
        index = tl.load(index_ptr + offsets, mask=wanted, other=0).to(tl.int32)
        # Loaded whether taken or not: a mask of single elements would make narrow loads of it.
        grad = tl.load(grad_ptr + offsets, mask=wanted, other=0.0).to(tl.float32)
        taken = wanted & (index == (down * KW + right).to(tl.int32)[:, None])
        acc += tl.where(taken, grad, 0.0)
    offsets = rows[:, None] * CHANNELS + channels[None, :]
    wanted = row_in[:, None] & channel_in[None, :]
    tl.store(grad_x_ptr + offsets, rounded(acc, grad_x_ptr.dtype.element_ty), mask=wanted)
