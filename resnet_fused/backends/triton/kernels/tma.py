"""Convolution as an implicit GEMM whose tiles the tensor memory accelerator fetches (sm_90 on)."""

import triton
import triton.language as tl

from resnet_fused.backends.triton.kernels.moments import moments, store_moments
from resnet_fused.backends.triton.kernels.shared import (
    activate,
    affine,
    multiply,
    rounded,
    tile_of,
)


@triton.jit(do_not_specialize=["images", "oh", "ow"])
def conv_tma_fwd_kernel(
    x_desc, w_desc, y_desc, residual_desc, scale_ptr, shift_ptr, images, oh, ow,
    IN: tl.constexpr, OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr, ROUNDED: tl.constexpr, BOX_N: tl.constexpr,
    BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, moments_ptr=None,
):  # fmt: skip
    """Tiles of BOX_N · BOX_H · BOX_W output pixels and BLOCK_N channels, one after another.

    A tap of a box of output pixels is a box of the input, and what lies outside the map arrives as
    zeros: padding and edges cost nothing. Stride S reads x as (N, H / S, S, W / S, S · IN), where
    a tap's row and column remainders are fixed coordinates. A pointwise convolution has one image
    of one row. The grid is what fits on the device at once; with the loops flattened, the next
    tile's loads are under way while this one is finished.

    In training the moments of a tile's rounded output go to ``moments_ptr``, (tiles of pixels, 2,
    OUT), for ``merge_moments_kernel``; no box then reaches beyond the map.

    Tiles are held as (channels, pixels): only the second operand of wgmma may be reshaped in
    shared memory, and the pixels are what needs it.
    """
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    BLOCKS: tl.constexpr = (IN + BLOCK_K - 1) // BLOCK_K
    tiles_h, tiles_w = (oh + BOX_H - 1) // BOX_H, (ow + BOX_W - 1) // BOX_W
    tiles_m = (images + BOX_N - 1) // BOX_N * tiles_h * tiles_w
    tiles = tiles_m * ((OUT + BLOCK_N - 1) // BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles // tiles_m, GROUP_M)
        image = tile_m // (tiles_h * tiles_w) * BOX_N
        top, left = tile_m // tiles_w % tiles_h * BOX_H, tile_m % tiles_w * BOX_W
        first = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for step in range(KH * KW * BLOCKS):
            tap, k = step // BLOCKS, step % BLOCKS * BLOCK_K
            # Moved up by whole strides: // and % of a negative number round the other way here.
            down = tap // KW * DIL_H - PAD_H + STRIDE * PAD_H
            right = tap % KW * DIL_W - PAD_W + STRIDE * PAD_W
            a = x_desc.load(
                [
                    image,
                    top + down // STRIDE - PAD_H,
                    down % STRIDE,
                    left + right // STRIDE - PAD_W,
                    right % STRIDE * IN + k,
                ]
            )
            b = w_desc.load([first, tap * IN + k])
            acc = multiply(b, a.reshape(BLOCK_M, BLOCK_K).T, acc, PRECISION, ROUNDED)
        channels = first + tl.arange(0, BLOCK_N)
        if moments_ptr is not None:
            values = rounded(acc, y_desc.dtype).to(tl.float32)
            mean, squares = moments(values, None, BLOCK_M * 1.0, 1)
            store_moments(moments_ptr, tile_m, channels, channels < OUT, mean, squares, OUT)
        acc = affine(acc, scale_ptr, shift_ptr, channels, channels < OUT).T
        if residual_desc is not None:
            residual = residual_desc.load([image, top, left, first])
            acc += residual.reshape(BLOCK_M, BLOCK_N).to(tl.float32)
        acc = rounded(activate(acc, RELU), y_desc.dtype).reshape(BOX_N, BOX_H, BOX_W, BLOCK_N)
        y_desc.store([image, top, left, first], acc)
