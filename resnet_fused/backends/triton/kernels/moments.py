"""Statistics of a map's channels: per tile, then merged in one order, so that runs agree bitwise.

A tile's mean and sum of squared deviations come from its values in registers by the corrected
two-pass algorithm, so that a mean far larger than the deviation costs no digits; tiles are merged
pairwise as sums are (Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983).
"""

import triton
import triton.language as tl

from resnet_fused.backends.triton.kernels.shared import rounded


@triton.jit
def moments(values, inside, count, AXIS: tl.constexpr):
    """Return the mean and the sum of squared deviations of the ``count`` values inside.

    With None for ``inside``, of all.
    """
    if inside is None:
        mean = tl.sum(values, AXIS) / count
        deviations = values - tl.expand_dims(mean, AXIS)
    else:
        mean = tl.sum(tl.where(inside, values, 0.0), AXIS) / count
        deviations = tl.where(inside, values - tl.expand_dims(mean, AXIS), 0.0)
    error = tl.sum(deviations, AXIS) / count
    return corrected(mean, tl.sum(deviations * deviations, AXIS), error, count)


@triton.jit
def corrected(mean, squares, error, count):
    """Take the mean's rounding, ``error``, out of both; as in torch, infinity leaves NaN."""
    squares = tl.maximum(squares - count * error * error, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return mean + error, squares


@triton.jit
def store_moments(ptr, part, channels, inside, mean, squares, CHANNELS: tl.constexpr):
    """Write one part of a (parts, 2, CHANNELS) buffer."""
    ptr += part * (2 * CHANNELS) + channels
    tl.store(ptr, mean, mask=inside)
    tl.store(ptr + CHANNELS, squares, mask=inside)


@triton.jit(do_not_specialize=["m"])
def bn_stats_kernel(
    x_ptr, moments_ptr, m, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Moments of BLOCK_M pixels and BLOCK_C channels of a map (m, CHANNELS)."""
    part = tl.program_id(0)
    if WIDE:
        part = part.to(tl.int64)
    rows = part * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_in, channel_in = rows < m, channels < CHANNELS
    offsets = rows[:, None] * CHANNELS + channels[None, :]
    values = tl.load(x_ptr + offsets, mask=row_in[:, None] & channel_in[None, :], other=0.0)
    count = tl.minimum(m - part * BLOCK_M, BLOCK_M).to(tl.float32)
    mean, squares = moments(values.to(tl.float32), row_in[:, None], count, 0)
    store_moments(moments_ptr, part, channels, channel_in, mean, squares, CHANNELS)


@triton.jit(do_not_specialize=["m", "parts", "part_rows"])
def merge_moments_kernel(
    parts_ptr, out_ptr, mean_ptr, var_ptr, m, parts, part_rows,
    CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge BLOCK_P parts into one of ``out_ptr``, or all there are into mean and variance.

    Every part is of ``part_rows`` of the ``m`` pixels, the last one of what is left.
    """
    indices = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_in = channels < CHANNELS
    wanted = (indices < parts)[:, None] & channel_in[None, :]
    source = parts_ptr + indices.to(tl.int64)[:, None] * (2 * CHANNELS) + channels[None, :]
    means = tl.load(source, mask=wanted, other=0.0)
    squares = tl.load(source + CHANNELS, mask=wanted, other=0.0)
    left = tl.maximum(m - indices.to(tl.int64) * part_rows, 0)
    counts = tl.minimum(left, part_rows).to(tl.float32)
    total = tl.sum(counts, 0)
    mean = tl.sum(means * (counts / total)[:, None], 0)
    deviations = tl.where(wanted, means - mean[None, :], 0.0)
    weighted = counts[:, None] * deviations
    error = tl.sum(weighted, 0) / total
    mean, square = corrected(mean, tl.sum(squares + weighted * deviations, 0), error, total)
    if out_ptr is not None:
        store_moments(out_ptr, tl.program_id(0), channels, channel_in, mean, square, CHANNELS)
    else:
        tl.store(mean_ptr + channels, mean, mask=channel_in)
        tl.store(var_ptr + channels, square / total, mask=channel_in)


@triton.jit(do_not_specialize=["parts"])
def merge_sums_kernel(
    parts_ptr, out_ptr, sum_g_ptr, sum_gx_ptr, sum_gr_ptr, parts,
    CHANNELS: tl.constexpr, SUMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add BLOCK_P parts to one of ``out_ptr``, or all there are to the SUMS vectors."""
    indices = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_in = channels < CHANNELS
    wanted = (indices < parts)[:, None] & channel_in[None, :]
    for place in tl.static_range(SUMS):
        starts = indices.to(tl.int64)[:, None] * (SUMS * CHANNELS) + place * CHANNELS
        rows = starts + channels[None, :]
        total = tl.sum(tl.load(parts_ptr + rows, mask=wanted, other=0.0), 0)
        if out_ptr is not None:
            out = out_ptr + (tl.program_id(0).to(tl.int64) * SUMS + place) * CHANNELS
        elif place == 0:
            out = sum_g_ptr
        elif place == 1:
            out = sum_gx_ptr
        else:
            out = sum_gr_ptr
        tl.store(out + channels, rounded(total, out.dtype.element_ty), mask=channel_in)
