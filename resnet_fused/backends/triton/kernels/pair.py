"""A convolution and the 1x1 behind it in one kernel: the map between them stays on the chip."""

import triton
import triton.language as tl

from resnet_fused.backends.triton.kernels.shared import activate, affine, multiply


# Sizes stay ordinary arguments, so that another batch or image size compiles nothing.
@triton.jit(do_not_specialize=["m", "h", "w", "oh", "ow"])
def conv_pair_fwd_kernel(
    x_ptr, w_ptr, scale_ptr, shift_ptr, w2_ptr, scale2_ptr, shift2_ptr, residual_ptr, y_ptr,
    m, h, w, oh, ow,
    IN: tl.constexpr, BETWEEN: tl.constexpr, OUT: tl.constexpr, PITCH: tl.constexpr,
    PITCH2: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr,
    DIL_W: tl.constexpr, RELU: tl.constexpr, RELU2: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_BETWEEN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M output pixels: all BETWEEN channels of the first convolution, then all OUT.

    Tiles are held transposed, (channels, pixels), for scale and shift are then one value per row.
    The first tile, rounded, is the second operand of the 1x1, whose output channels are done in
    blocks of BLOCK_N; the next block's weights are on their way while one is finished. With the
    pixels as rows the first tile would be an operand in registers, of which a thread then needs 58
    more (64 → 256 channels, 128 pixels, 4 warps, Triton 3.7.1, sm_90).

    Rows of the weights are (KH, KW, IN) in PITCH and (BETWEEN,) in PITCH2.
    """
    tile = tl.program_id(0)
    between, ks = tl.arange(0, BLOCK_BETWEEN), tl.arange(0, BLOCK_K)
    if WIDE:
        tile, between = tile.to(tl.int64), between.to(tl.int64)
        w, oh = w.to(tl.int64), oh.to(tl.int64)  # products with them are offsets within an image
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in, between_in = rows < m, between < BETWEEN
    top = rows // ow % oh * STRIDE_H - PAD_H
    left = rows % ow * STRIDE_W - PAD_W
    x_rows = x_ptr + ((rows // (ow * oh) * h + top) * w + left) * IN
    w_rows = w_ptr + between * PITCH

    BLOCKS: tl.constexpr = (IN + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros((BLOCK_BETWEEN, BLOCK_M), dtype=tl.float32)
    for step in range(KH * KW * BLOCKS):
        tap, first = step // BLOCKS, step % BLOCKS * BLOCK_K
        down, right = tap // KW * DIL_H, tap % KW * DIL_W
        inside = row_in
        if PAD_H + PAD_W > 0:
            y_in, x_in = top + down, left + right
            inside &= (y_in >= 0) & (y_in < h) & (x_in >= 0) & (x_in < w)
        inside, known = inside[:, None], between_in[:, None]
        if IN % BLOCK_K != 0:
            inside &= (first + ks < IN)[None, :]
            known &= (first + ks < IN)[None, :]
        offsets = (down * w + right) * IN + first + ks
        a = tl.load(x_rows[:, None] + offsets[None, :], mask=inside, other=0.0)
        k = tap * IN + first + ks
        b = tl.load(w_rows[:, None] + k[None, :], mask=known, other=0.0)
        acc = multiply(b, a.T, acc, "ieee")

    acc = affine(acc, scale_ptr, shift_ptr, between, between_in)
    if BETWEEN != BLOCK_BETWEEN:  # 0 · inf: a channel that is not there must not become NaN
        acc = tl.where(between_in[:, None], acc, 0.0)
    z = activate(acc, RELU).to(x_ptr.dtype.element_ty)

    for first in tl.range(0, OUT, BLOCK_N, num_stages=2):
        columns = first + tl.arange(0, BLOCK_N)
        if WIDE:
            columns = columns.to(tl.int64)
        column_in = columns < OUT
        known = column_in[:, None] & between_in[None, :]
        b = tl.load(w2_ptr + columns[:, None] * PITCH2 + between[None, :], mask=known, other=0.0)
        offsets = rows[:, None] * OUT + columns[None, :]
        wanted = row_in[:, None] & column_in[None, :]
        if residual_ptr is not None:  # asked for before the product, which it does not wait for
            residual = tl.load(residual_ptr + offsets, mask=wanted, other=0.0)
        out = multiply(b, z, tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32), "ieee")
        out = affine(out, scale2_ptr, shift2_ptr, columns, column_in).T
        if residual_ptr is not None:
            out += residual.to(tl.float32)
        tl.store(y_ptr + offsets, activate(out, RELU2).to(y_ptr.dtype.element_ty), mask=wanted)
