"""A map's channel covariance, and a 1x1 convolution's BatchNorm by it: `pointwise_bn_act`."""

import triton
import triton.language as tl

from resnet_fused.backends.triton.kernels.normalise import affine_of, inverse_deviation, vector
from resnet_fused.backends.triton.kernels.shared import multiply, rounded


@triton.jit(do_not_specialize=["m", "steps"])
def covariance_kernel(
    x_ptr, parts_ptr, m, steps, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of Σ x xᵀ, on or right of the diagonal, over ``steps`` blocks of the m pixels.

    A part of ``parts_ptr`` is (CHANNELS + 1, CHANNELS): the sums of products, and in its last row
    those of x.

    Tensor cores cut off what a sum has no digits for, always towards zero, and the sums of a
    channel far from zero are large beside its variance. So they sum one block alone, and blocks are
    added to each other as float32 rounds: what is lost of Σ x xᵀ is some 2^-23 of it however many
    pixels there are, and of a variance 1 + (mean / deviation)² times as much.
    """
    TILES: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    part, tile = tl.program_id(1), tl.program_id(0)
    tile_m, tile_n = tile // TILES, tile % TILES
    if WIDE:
        part = part.to(tl.int64)
    if tile_m <= tile_n:
        rows = tile_m * BLOCK_C + tl.arange(0, BLOCK_C)
        columns = tile_n * BLOCK_C + tl.arange(0, BLOCK_C)
        row_in, column_in = rows < CHANNELS, columns < CHANNELS
        ks = tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32)
        sums = tl.zeros((BLOCK_C,), dtype=tl.float32)
        for step in range(steps):
            pixels = (part * steps + step) * BLOCK_K + ks
            pixel_in, offsets = (pixels < m)[:, None], pixels[:, None] * CHANNELS
            b = tl.load(
                x_ptr + offsets + columns[None, :], mask=pixel_in & column_in[None, :], other=0.0
            )
            a = b
            if TILES > 1:
                inside = pixel_in & row_in[None, :]
                a = tl.load(x_ptr + offsets + rows[None, :], mask=inside, other=0.0)
            block = multiply(a.T, b, tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32), PRECISION)
            # Triton would make one accumulator of a product and a plus. That this waits for the
            # product also keeps the copies of later blocks, of which b has no more buffers than
            # fly, from what the product still reads.
            acc = tl.fma(block, 1.0, acc)
            sums += tl.sum(b.to(tl.float32), 0)
        out = parts_ptr + part * ((CHANNELS + 1) * CHANNELS)
        offsets = rows[:, None] * CHANNELS + columns[None, :]
        tl.store(out + offsets, acc, mask=row_in[:, None] & column_in[None, :])
        if tile_m == tile_n:
            tl.store(out + CHANNELS * CHANNELS + columns, sums, mask=column_in)


@triton.jit(do_not_specialize=["m", "parts"])
def merge_covariance_kernel(
    parts_ptr, mean_ptr, cov_ptr, m, parts, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_M x BLOCK_N of the covariance, and what mirrors it, from all parts, BLOCK_P at a time.

    In double precision, as little may be left of Σ x xᵀ once the product of the means is taken out.
    Only what is on or right of the diagonal is read: the rest is its mirror image, bit for bit,
    whatever order a product of a tile on the diagonal has summed in.
    """
    block_m, block_n = tl.program_id(0), tl.program_id(1)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if block_m * BLOCK_M < (block_n + 1) * BLOCK_N:
        row_in, column_in = rows < CHANNELS, columns < CHANNELS
        inside = column_in[None, :] & (rows[:, None] <= columns[None, :])
        offsets = rows[:, None] * CHANNELS + columns[None, :]
        PART: tl.constexpr = (CHANNELS + 1) * CHANNELS
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float64)
        row_sums = tl.zeros((BLOCK_M,), dtype=tl.float64)
        column_sums = tl.zeros((BLOCK_N,), dtype=tl.float64)
        for first in range(0, parts, BLOCK_P):
            part = first + tl.arange(0, BLOCK_P)
            part_in, starts = part < parts, part.to(tl.int64) * PART
            source = parts_ptr + starts[:, None, None] + offsets[None, :, :]
            total += _sum(source, part_in[:, None, None] & inside[None, :, :])
            sums = parts_ptr + CHANNELS * CHANNELS + starts[:, None]
            row_sums += _sum(sums + rows[None, :], part_in[:, None] & row_in[None, :])
            column_sums += _sum(sums + columns[None, :], part_in[:, None] & column_in[None, :])
        row_means, column_means = row_sums / m, column_sums / m
        cov = (total / m - row_means[:, None] * column_means[None, :]).to(tl.float32)
        tl.store(cov_ptr + offsets, cov, mask=inside)
        mirrored = columns[None, :] * CHANNELS + rows[:, None]
        tl.store(cov_ptr + mirrored, cov, mask=inside & (rows[:, None] < columns[None, :]))
        if block_m == 0:
            tl.store(mean_ptr + columns, column_means.to(tl.float32), mask=column_in)


@triton.jit
def _sum(ptr, inside):
    """Return sums over the first axis in double precision."""
    return tl.sum(tl.load(ptr, mask=inside, other=0.0).to(tl.float64), 0)


@triton.jit
def _block(w_ptr, rows, columns, row_in, column_in, WIDTH: tl.constexpr):
    """Return a block of a matrix of so many columns in float32, zero outside of it."""
    offsets = rows[:, None] * WIDTH + columns[None, :]
    inside = row_in[:, None] & column_in[None, :]
    return tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _with_covariance(
    w_ptr, cov_ptr, rows, row_in, columns, column_in, CHANNELS: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return rows of W times columns of the covariance, as exact as float32."""
    acc = tl.zeros((BLOCK_O, BLOCK_C), dtype=tl.float32)
    for first in range(0, CHANNELS, BLOCK_K):
        ks = first + tl.arange(0, BLOCK_K)
        k_in = ks < CHANNELS
        a = _block(w_ptr, rows, ks, row_in, k_in, CHANNELS)
        b = _block(cov_ptr, ks, columns, k_in, column_in, CHANNELS)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    return acc


@triton.jit(do_not_specialize=["eps"])
def pointwise_stats_kernel(
    w_ptr, x_mean_ptr, cov_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, eps,
    OUT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean, variance, scale and shift of BLOCK_O output channels of W x."""
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_in = rows < OUT
    mean = tl.zeros((BLOCK_O,), dtype=tl.float32)
    var = tl.zeros((BLOCK_O,), dtype=tl.float32)
    for first in range(0, CHANNELS, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        column_in = columns < CHANNELS
        w = _block(w_ptr, rows, columns, row_in, column_in, CHANNELS)
        mean += tl.sum(w * vector(x_mean_ptr, columns, column_in)[None, :], 1)
        spread = _with_covariance(
            w_ptr, cov_ptr, rows, row_in, columns, column_in, CHANNELS, BLOCK_O, BLOCK_C, BLOCK_K
        )
        var += tl.sum(spread * w, 1)
    var = tl.maximum(var, 0.0, propagate_nan=tl.PropagateNan.ALL)
    scale, shift = affine_of(mean, var, weight_ptr, bias_ptr, eps, rows, row_in)
    tl.store(mean_ptr + rows, mean, mask=row_in)
    tl.store(var_ptr + rows, var, mask=row_in)
    tl.store(scale_ptr + rows, scale, mask=row_in)
    tl.store(shift_ptr + rows, shift, mask=row_in)


@triton.jit(do_not_specialize=["eps", "count"])
def pointwise_gradients_kernel(
    w_ptr, product_ptr, sum_g_ptr, mean_ptr, var_ptr, x_mean_ptr, cov_ptr, weight_ptr,
    grad_w_ptr, grad_weight_ptr, of_g_ptr, slope_ptr, eps, count,
    OUT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_O rows of the weight's gradient and of what turns g, see `pointwise_bn_gradients`.

    ``slope_ptr`` receives what W is to be multiplied by, between its two turns in what turns x.
    """
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_in = rows < OUT
    sum_g = vector(sum_g_ptr, rows, row_in)
    sum_gz = -vector(mean_ptr, rows, row_in) * sum_g
    for first in range(0, CHANNELS, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        column_in = columns < CHANNELS
        w = _block(w_ptr, rows, columns, row_in, column_in, CHANNELS)
        product = _block(product_ptr, rows, columns, row_in, column_in, CHANNELS)
        sum_gz += tl.sum(product * w, 1)
    rstd = inverse_deviation(var_ptr, eps, rows, row_in)
    scale, slope = rstd, rstd * rstd * sum_gz
    if weight_ptr is not None:
        scale *= vector(weight_ptr, rows, row_in)
    tl.store(grad_weight_ptr + rows, rstd * sum_gz, mask=row_in)
    tl.store(slope_ptr + rows, -scale * slope / count, mask=row_in)
    for first in range(0, CHANNELS, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        column_in = columns < CHANNELS
        w = _block(w_ptr, rows, columns, row_in, column_in, CHANNELS)
        product = _block(product_ptr, rows, columns, row_in, column_in, CHANNELS)
        spread = _with_covariance(
            w_ptr, cov_ptr, rows, row_in, columns, column_in, CHANNELS, BLOCK_O, BLOCK_C, BLOCK_K
        )
        means = sum_g[:, None] * vector(x_mean_ptr, columns, column_in)[None, :]
        grad_w = scale[:, None] * (product - means - slope[:, None] * spread)
        offsets = rows[:, None] * CHANNELS + columns[None, :]
        inside = row_in[:, None] & column_in[None, :]
        tl.store(grad_w_ptr + offsets, rounded(grad_w, grad_w_ptr.dtype.element_ty), mask=inside)
        of_g = rounded(scale[:, None] * w, of_g_ptr.dtype.element_ty)
        tl.store(of_g_ptr + offsets, of_g, mask=inside)


@triton.jit
def pointwise_turn_kernel(
    w_ptr, slope_ptr, of_x_ptr, scale_ptr, OUT: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C x BLOCK_C of what turns x, Wᵀ slope W over a power of two, and that as its scale."""
    power = _power_below(slope_ptr, OUT, BLOCK_O)
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_in, column_in = rows < CHANNELS, columns < CHANNELS
    acc = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32)
    for first in range(0, OUT, BLOCK_O):
        outputs = first + tl.arange(0, BLOCK_O)
        output_in = outputs < OUT
        a = _block(w_ptr, outputs, rows, output_in, row_in, CHANNELS)
        b = _block(w_ptr, outputs, columns, output_in, column_in, CHANNELS)
        b *= tl.div_rn(vector(slope_ptr, outputs, output_in), power)[:, None]
        acc = tl.dot(a.T, b, acc, input_precision="tf32x3")
    offsets = rows[:, None] * CHANNELS + columns[None, :]
    value = rounded(acc, of_x_ptr.dtype.element_ty)
    tl.store(of_x_ptr + offsets, value, mask=row_in[:, None] & column_in[None, :])
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + columns, power + tl.zeros((BLOCK_C,), tl.float32), mask=column_in)


@triton.jit
def _power_below(ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest power of two that is not above the largest of a vector's sizes.

    One where that is zero or not finite.
    """
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, SIZE, BLOCK):
        places = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(vector(ptr, places, places < SIZE)))
    bits = tl.max(largest, 0).to(tl.int32, bitcast=True)
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)  # as it is without its mantissa
    return tl.where((power > 0.0) & (power < float("inf")), power, 1.0)


@triton.jit(do_not_specialize=["count"])
def pointwise_shift_kernel(
    of_g_ptr, of_x_ptr, scale_ptr, sum_g_ptr, x_mean_ptr, shift_ptr, count,
    OUT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of the shift that takes the mean out of what both turns, rounded, give."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_in = columns < CHANNELS
    shift = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first in range(0, OUT, BLOCK_O):
        rows = first + tl.arange(0, BLOCK_O)
        row_in = rows < OUT
        mean = vector(sum_g_ptr, rows, row_in) / count
        shift -= tl.sum(
            _block(of_g_ptr, rows, columns, row_in, column_in, CHANNELS) * mean[:, None], 0
        )
    for first in range(0, CHANNELS, BLOCK_O):
        rows = first + tl.arange(0, BLOCK_O)
        row_in = rows < CHANNELS
        mean = vector(x_mean_ptr, rows, row_in) * vector(scale_ptr, rows, row_in)
        shift -= tl.sum(
            _block(of_x_ptr, rows, columns, row_in, column_in, CHANNELS) * mean[:, None], 0
        )
    tl.store(shift_ptr + columns, shift, mask=column_in)
