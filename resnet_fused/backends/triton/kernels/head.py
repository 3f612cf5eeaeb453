"""Global average pool, and the linear layer behind it."""

import triton
import triton.language as tl

from resnet_fused.backends.triton.kernels.shared import affine, multiply


@triton.jit(do_not_specialize=["pixels"])
def mean_kernel(
    x_ptr, y_ptr, pixels, CHANNELS: tl.constexpr, WIDE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The means of BLOCK_C channels of one image; x is (N, pixels, CHANNELS), y float32."""
    image = tl.program_id(0)
    if WIDE:
        image, pixels = image.to(tl.int64), pixels.to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_in = channels < CHANNELS
    rows = tl.arange(0, BLOCK_P)
    x_ptrs = x_ptr + image * pixels * CHANNELS + channels[None, :]
    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for first in range(0, pixels, BLOCK_P):
        pixel = first + rows[:, None]
        inside = (pixel < pixels) & channel_in[None, :]
        acc += tl.load(x_ptrs + pixel * CHANNELS, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(acc, axis=0) / pixels
    tl.store(y_ptr + image * CHANNELS + channels, mean, mask=channel_in)


@triton.jit(do_not_specialize=["m"])
def linear_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, IN: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and BLOCK_N columns of y = x · wᵀ + bias; x is (m, IN) float32, w (OUT, IN)."""
    tile_m, tile_n = tl.program_id(1), tl.program_id(0)
    if WIDE:
        tile_m, tile_n = tile_m.to(tl.int64), tile_n.to(tl.int64)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, column_in = rows < m, columns < OUT
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for first in range(0, IN, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside, known = row_in[:, None], column_in[:, None]
        if IN % BLOCK_K != 0:
            inside &= (k < IN)[None, :]
            known &= (k < IN)[None, :]
        a = tl.load(x_ptr + rows[:, None] * IN + k[None, :], mask=inside, other=0.0)
        b = tl.load(w_ptr + columns[:, None] * IN + k[None, :], mask=known, other=0.0)
        acc = multiply(b.to(tl.float32), a.T, acc, PRECISION)
    acc = affine(acc, None, bias_ptr, columns, column_in).T
    wanted = row_in[:, None] & column_in[None, :]
    y_ptrs = y_ptr + rows[:, None] * OUT + columns[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=wanted)
