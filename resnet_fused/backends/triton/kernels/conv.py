"""Convolution as an implicit GEMM over channels_last: any geometry, tiles gathered by pointer."""

import triton
import triton.language as tl

from resnet_fused.backends.triton.kernels.moments import moments, store_moments
from resnet_fused.backends.triton.kernels.normalise import normalise, vector
from resnet_fused.backends.triton.kernels.shared import (
    activate,
    affine,
    multiply,
    rounded,
    tile_of,
)


# Sizes stay ordinary arguments, so that another batch or image size compiles nothing.
@triton.jit(do_not_specialize=["m", "h", "w", "oh", "ow"])
def conv_fwd_kernel(
    x_ptr, w_ptr, y_ptr, scale_ptr, shift_ptr, residual_ptr, partial_ptr, m, h, w, oh, ow,
    IN: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, PITCH: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, in_scale_ptr=None, in_shift_ptr=None, moments_ptr=None,
    IN_RELU: tl.constexpr = False,
):  # fmt: skip
    """One tile of BLOCK_M output pixels and BLOCK_N output channels of one group.

    The tile is held transposed, (channels, pixels): scale and shift are then one value per row,
    which halves the epilogue's registers. K runs over taps and, inside, over blocks of channels;
    in a FLAT kernel, for fewer channels than a block, over (tap, channel) as one axis.

    IN and OUT count the channels of one group; a row of the weight, (GROUPS · OUT, PITCH), is
    (KH, KW, IN). With SPLIT_K > 1 each part's float32 sums go to ``partial_ptr``,
    (SPLIT_K, m, GROUPS · OUT), for ``affine_kernel`` to add in order.

    In training, with ``in_scale_ptr`` and ``in_shift_ptr``, the input is act(x · scale + shift),
    rounded, and padding is zero behind that; the moments of the tile's rounded output go to
    ``moments_ptr``, (tiles, 2, GROUPS · OUT), for ``merge_moments_kernel``.
    """
    tile_m, tile_n = tile_of(
        tl.program_id(0), (m - 1) // BLOCK_M + 1, (OUT + BLOCK_N - 1) // BLOCK_N, GROUP_M
    )
    part, group = tl.program_id(1), tl.program_id(2)
    if WIDE:
        tile_m, tile_n = tile_m.to(tl.int64), tile_n.to(tl.int64)
        part, group = part.to(tl.int64), group.to(tl.int64)
        w, oh = w.to(tl.int64), oh.to(tl.int64)  # products with them are offsets within an image
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    row_in, column_in = rows < m, columns < OUT

    PADDED: tl.constexpr = PAD_H + PAD_W > 0
    if KH * KW * STRIDE_H * STRIDE_W == 1 and not PADDED and not FLAT:
        pixels = rows
    else:
        top = rows // ow % oh * STRIDE_H - PAD_H
        left = rows % ow * STRIDE_W - PAD_W
        pixels = (rows // (ow * oh) * h + top) * w + left
    x_rows = x_ptr + pixels * (IN * GROUPS) + group * IN
    w_rows = w_ptr + (group * OUT + columns) * PITCH

    BLOCKS: tl.constexpr = (IN + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = (KH * KW * IN + BLOCK_K - 1) // BLOCK_K if FLAT else KH * KW * BLOCKS
    PART: tl.constexpr = (STEPS + SPLIT_K - 1) // SPLIT_K
    UNEVEN: tl.constexpr = STEPS % SPLIT_K > 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for index in range(PART):
        step = index
        if SPLIT_K > 1:
            step += tl.program_id(1) * PART
        if FLAT:
            k = step * BLOCK_K + ks
            down, right = k // IN // KW * DIL_H, k // IN % KW * DIL_W
            y_in, x_in = top[:, None] + down[None, :], left[:, None] + right[None, :]
            inside = row_in[:, None] & (k < KH * KW * IN)[None, :]
            inside &= (y_in >= 0) & (y_in < h) & (x_in >= 0) & (x_in < w)
            offsets = (down * w + right) * (IN * GROUPS) + k % IN
            a = tl.load(x_rows[:, None] + offsets[None, :], mask=inside, other=0.0)
            known = column_in[:, None] & (k < PITCH)[None, :]
            channel, channel_in = k % IN, k < KH * KW * IN
        else:
            # One loop over taps and blocks, as Triton pipelines the innermost loop only.
            tap, first = step // BLOCKS, step % BLOCKS * BLOCK_K
            down, right = tap // KW * DIL_H, tap % KW * DIL_W
            inside = row_in
            if PADDED:
                y_in, x_in = top + down, left + right
                inside &= (y_in >= 0) & (y_in < h) & (x_in >= 0) & (x_in < w)
            offsets = (down * w + right) * (IN * GROUPS) + first + ks
            k = tap * IN + first + ks
            inside, known = inside[:, None], column_in[:, None]
            if IN % BLOCK_K != 0:
                inside &= (first + ks < IN)[None, :]
                known &= (first + ks < IN)[None, :]
            if UNEVEN:  # the last part is shorter
                # Widened before it is compared: Triton 3.8's interpreter would widen a truth to
                # an integer, which is no mask.
                present = (step + tl.zeros_like(ks) < STEPS)[None, :]
                inside &= present
                known &= present
            a = tl.load(x_rows[:, None] + offsets[None, :], mask=inside, other=0.0)
            channel, channel_in = first + ks, first + ks < IN
        if in_scale_ptr is not None:
            scale = vector(in_scale_ptr + group * IN, channel, channel_in)
            shift = vector(in_shift_ptr + group * IN, channel, channel_in)
            a = rounded(normalise(a, scale[None, :], shift[None, :], IN_RELU), a.dtype)
            if PADDED:
                a = tl.where(inside, a, 0.0)
        b = tl.load(w_rows[:, None] + k[None, :], mask=known, other=0.0)
        acc = multiply(b, a.T, acc, PRECISION)

    channels = group * OUT + columns
    wanted = row_in[:, None] & column_in[None, :]
    if SPLIT_K > 1:
        offsets = (part * m + rows)[:, None] * (OUT * GROUPS) + channels[None, :]
        tl.store(partial_ptr + offsets, acc.T, mask=wanted)
    else:
        offsets = rows[:, None] * (OUT * GROUPS) + channels[None, :]
        if moments_ptr is not None:
            values = rounded(acc, y_ptr.dtype.element_ty).to(tl.float32)
            count = tl.minimum(m - tile_m * BLOCK_M, BLOCK_M).to(tl.float32)
            mean, squares = moments(values, row_in[None, :], count, 1)
            store_moments(
                moments_ptr, tile_m, channels, column_in, mean, squares, OUT * GROUPS
            )  # fmt: skip
        acc = affine(acc, scale_ptr, shift_ptr, channels, column_in).T
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + offsets, mask=wanted, other=0.0).to(tl.float32)
        acc = rounded(activate(acc, RELU), y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, acc, mask=wanted)
