"""Convolution, scale, shift, ReLU and max pool: the map between them stays on chip."""

import triton
import triton.language as tl

from resnet_fused.backends.triton.kernels.shared import activate, affine, multiply

NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _larger(a, b):
    """Return the larger of two tiles, NaN where one has it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _convolve(
    x_rows, w_rows, row_in, channel_in, y_first, x_first, lead, h, pitch,
    IN: tl.constexpr, KH: tl.constexpr, SPAN: tl.constexpr, DIL_H: tl.constexpr,
    DIL_W: tl.constexpr, RUN: tl.constexpr, COPY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the sums (BLOCK_N, BLOCK_M) of pixels whose taps lie behind (y_first, x_first).

    K runs over kernel rows and, inside, over blocks of the RUN elements read of each, of which the
    taps are SPAN behind the first ``lead``. The others meet zeros of the weight, yet may be NaN.
    Kernel rows outside the image are passed by.
    """
    BLOCKS: tl.constexpr = RUN // BLOCK_K
    ks = tl.arange(0, BLOCK_K)
    above = (max(-y_first, 0) + DIL_H - 1) // DIL_H
    below = min((max(h - y_first, 0) + DIL_H - 1) // DIL_H, KH)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(above * BLOCKS, below * BLOCKS):
        along = step % BLOCKS * BLOCK_K + ks
        x_in = x_first[:, None] + along[None, :]
        inside = row_in[:, None] & (x_in >= 0) & (x_in < pitch)
        y_in = y_first + step // BLOCKS * DIL_H
        a = tl.load(x_rows[:, None] + y_in * pitch + x_in, mask=inside, other=0.0)
        if RUN > SPAN or DIL_W > 1:
            is_tap = (along >= lead) & (along < lead + SPAN)
            if DIL_W > 1:
                is_tap &= (along - lead) // IN % DIL_W == 0
            a = tl.where(is_tap[None, :], a, 0.0)
        k = lead * COPY + step * BLOCK_K + ks
        b = tl.load(w_rows[:, None] + k[None, :], mask=channel_in[:, None], other=0.0)
        acc = multiply(b, a.T, acc, PRECISION)
    return acc


# Sizes stay ordinary arguments, so that another batch or image size compiles nothing.
@triton.jit(do_not_specialize=["images", "h", "w", "oh", "ow", "ph", "pw", "band"])
def stem_fwd_kernel(
    x_ptr, w_ptr, y_ptr, scale_ptr, shift_ptr, images, h, w, oh, ow, ph, pw, band, IN: tl.constexpr,
    OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr,
    DIL_W: tl.constexpr, POOL_H: tl.constexpr, POOL_W: tl.constexpr, POOL_STRIDE_H: tl.constexpr,
    POOL_STRIDE_W: tl.constexpr, POOL_PAD_H: tl.constexpr, POOL_PAD_W: tl.constexpr,
    ALIGN: tl.constexpr, RUN: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``band`` pooled rows of BLOCK_M pairs of columns, for BLOCK_N channels.

    Two neighbouring windows are taken together, so that what they share is computed once; down a
    band a window hands the rows it shares with the next one on. A row of taps is contiguous in x,
    (KW, IN), and is read from an aligned element on: the weight, (ALIGN, OUT, KH, RUN), is
    there once for each distance of the taps from that element.
    """
    SHARED: tl.constexpr = POOL_H - POOL_STRIDE_H
    # Rows handed on: none where windows share more than is new, which would take more tiles.
    HANDED: tl.constexpr = SHARED if SHARED > 0 and SHARED <= POOL_STRIDE_H else 0
    PARTS: tl.constexpr = 2 if HANDED > 0 else 1
    WIDTH: tl.constexpr = POOL_STRIDE_W + POOL_W
    SPAN: tl.constexpr = ((KW - 1) * DIL_W + 1) * IN
    BEFORE: tl.constexpr = (POOL_PAD_W * STRIDE_W + PAD_W) * IN
    pairs = (pw + 1) // 2
    tile, first, block = tl.program_id(0), tl.program_id(1) * band, tl.program_id(2)
    if WIDE:
        tile, first, block = tile.to(tl.int64), first.to(tl.int64), block.to(tl.int64)
        w = w.to(tl.int64)
    pitch = tl.multiple_of(w * IN, ALIGN)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image, column = rows // pairs, rows % pairs * 2
    channels = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, channel_in = image < images, channels < OUT
    x_rows, w_rows = x_ptr + image * h * pitch, w_ptr + channels * (KH * RUN)
    y_rows = y_ptr + (image * ph * pw + column) * OUT
    wanted = row_in[:, None] & channel_in[None, :]

    nothing = tl.full((BLOCK_N, BLOCK_M), NOTHING, dtype=tl.float32)
    left, right = nothing, nothing
    for y in range(first, min(first + band, ph)):
        top = y * POOL_STRIDE_H - POOL_PAD_H
        for part in tl.static_range(PARTS):
            begin, end = top + part * POOL_STRIDE_H, top + POOL_H
            if part == 0:
                if y > first:
                    begin += HANDED
                if PARTS == 2:
                    end = top + POOL_STRIDE_H
            else:  # the rows that the next window shares
                whole_left, whole_right = left, right
                left, right = nothing, nothing
            for pixel in range(max(begin, 0) * WIDTH, min(end, oh) * WIDTH):
                j = pixel % WIDTH
                x_out = column * POOL_STRIDE_W - POOL_PAD_W + j
                pixel_in = row_in & (x_out >= 0) & (x_out < ow)
                # The remainder of a sum that is not negative: % rounds the other way below zero.
                start = j * (STRIDE_W * IN) - BEFORE
                lead = (start + BEFORE * ALIGN) % ALIGN
                aligned = tl.multiple_of(start - lead, ALIGN)
                acc = _convolve(
                    x_rows, w_rows, pixel_in, channel_in, pixel // WIDTH * STRIDE_H - PAD_H,
                    column * (POOL_STRIDE_W * STRIDE_W * IN) + aligned, lead, h, pitch,
                    IN, KH, SPAN, DIL_H, DIL_W, RUN, OUT * KH * RUN, PRECISION,
                    BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                acc = affine(acc, scale_ptr, shift_ptr, channels, channel_in)
                in_left, in_right = pixel_in & (j < POOL_W), pixel_in & (j >= POOL_STRIDE_W)
                left = _larger(left, tl.where(in_left[None, :], acc, NOTHING))
                right = _larger(right, tl.where(in_right[None, :], acc, NOTHING))
        if PARTS == 2:
            whole_left, whole_right = _larger(whole_left, left), _larger(whole_right, right)
        else:
            whole_left, whole_right = left, right
            left, right = nothing, nothing
        y_ptrs = y_rows[:, None] + y * pw * OUT + channels[None, :]
        element = y_ptr.dtype.element_ty
        tl.store(y_ptrs, activate(whole_left, RELU).T.to(element), mask=wanted)
        both = wanted & (column + 1 < pw)[:, None]
        tl.store(y_ptrs + OUT, activate(whole_right, RELU).T.to(element), mask=both)
