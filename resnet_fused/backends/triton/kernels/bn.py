"""BatchNorm in training, over channels_last maps as matrices (pixels, channels).

A program takes BLOCK_C channels of STEPS blocks of BLOCK_M pixels: what belongs to a channel is
computed once for all of them.
"""

import triton
import triton.language as tl

from resnet_fused.backends.triton.kernels.normalise import (
    before_relu,
    inverse_deviation,
    normalise,
    scale_and_shift,
    vector,
)
from resnet_fused.backends.triton.kernels.shared import activate, rounded


@triton.jit
def first_row(STEPS: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    """Return the first pixel of this program."""
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    return block * STEPS * BLOCK_M


@triton.jit
def bytes_of(rows, m, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the places of a block's bits, a byte for 8 channels, and which there are."""
    columns = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    wanted = (rows < m)[:, None] & (columns < CHANNELS // 8)[None, :]
    return rows[:, None] * (CHANNELS // 8) + columns[None, :], wanted


@triton.jit
def store_bits(ptr, y, rows, m, CHANNELS: tl.constexpr):
    """Write which values of a block, (rows, channels), are not below or at zero."""
    places, wanted = bytes_of(rows, m, CHANNELS, y.shape[1])
    bits = tl.where(y.to(tl.float32) <= 0.0, 0, 1).reshape(y.shape[0], y.shape[1] // 8, 8)
    found = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
    tl.store(ptr + places, found.to(tl.uint8), mask=wanted)


@triton.jit
def where_bits(ptr, g, rows, m, CHANNELS: tl.constexpr):
    """Return a block, zeros where the bit is not set."""
    places, wanted = bytes_of(rows, m, CHANNELS, g.shape[1])
    found = tl.load(ptr + places, mask=wanted, other=0).to(tl.int32)
    bits = found[:, :, None] >> tl.arange(0, 8)[None, None, :] & 1
    return tl.where(bits.reshape(g.shape[0], g.shape[1]) == 0, 0.0, g)


@triton.jit
def gradient(
    grad_ptr, y_ptr, x, rows, m, offsets, wanted, scale, shift,
    CHANNELS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Return the gradient in front of ReLU, which let pass what is not below or at zero.

    ReLU's result, or its bits, is read from ``y_ptr``, or it is made again as the forward made it.
    """
    g = tl.load(grad_ptr + offsets, mask=wanted, other=0.0)
    if RELU:
        if y_ptr is None:
            g = before_relu(g, x, scale, shift)
        elif y_ptr.dtype.element_ty == tl.uint8:
            g = where_bits(y_ptr, g, rows, m, CHANNELS)
        else:
            y = tl.load(y_ptr + offsets, mask=wanted, other=0.0).to(tl.float32)
            g = tl.where(y <= 0.0, 0.0, g)
    return g


@triton.jit(do_not_specialize=["m", "eps", "residual_eps"])
def bn_act_fwd_kernel(
    x_ptr, y_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr,
    residual_ptr, residual_mean_ptr, residual_var_ptr, residual_weight_ptr, residual_bias_ptr,
    m, eps, residual_eps, CHANNELS: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
    bits_ptr=None,
):  # fmt: skip
    """act(BN(x) + r), where r is nothing, the residual, or the residual's own BatchNorm.

    Which of it passed ReLU goes to ``bits_ptr``, a byte for 8 channels.
    """
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_in = channels < CHANNELS
    scale, shift = scale_and_shift(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channels, channel_in
    )
    if residual_mean_ptr is not None:
        residual_scale, residual_shift = scale_and_shift(
            residual_mean_ptr, residual_var_ptr, residual_weight_ptr, residual_bias_ptr,
            residual_eps, channels, channel_in,
        )  # fmt: skip
    first = first_row(STEPS, BLOCK_M, WIDE) + tl.arange(0, BLOCK_M)
    for step in range(STEPS):
        rows = first + step * BLOCK_M
        offsets = rows[:, None] * CHANNELS + channels[None, :]
        wanted = (rows < m)[:, None] & channel_in[None, :]
        x = tl.load(x_ptr + offsets, mask=wanted, other=0.0)
        y = normalise(x, scale[None, :], shift[None, :], False)
        if residual_ptr is not None:
            r = tl.load(residual_ptr + offsets, mask=wanted, other=0.0)
            if residual_mean_ptr is not None:
                y += normalise(r, residual_scale[None, :], residual_shift[None, :], False)
            else:
                y += r.to(tl.float32)
        y = rounded(activate(y, RELU), y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, y, mask=wanted)
        if bits_ptr is not None:
            store_bits(bits_ptr, y, rows, m, CHANNELS)


@triton.jit(do_not_specialize=["m", "eps"])
def bn_act_bwd_reduce_kernel(
    grad_ptr, x_ptr, y_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr,
    residual_mean_ptr, masked_ptr, sums_ptr, m, eps,
    CHANNELS: tl.constexpr, SUMS: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One part of Σ g, Σ g · (x - μ) and, with a residual, Σ g · (r - μ_r).

    Parts go to ``sums_ptr``, (programs, SUMS, CHANNELS); g itself, if asked for, to
    ``masked_ptr``.
    """
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_in = channels < CHANNELS
    mean = vector(mean_ptr, channels, channel_in)
    scale, shift = mean, mean
    if RELU and y_ptr is None:
        scale, shift = scale_and_shift(
            mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channels, channel_in
        )
    if residual_ptr is not None:
        residual_mean = vector(residual_mean_ptr, channels, channel_in)
    sum_g = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    sum_gx, sum_gr = sum_g, sum_g
    first = first_row(STEPS, BLOCK_M, WIDE) + tl.arange(0, BLOCK_M)
    for step in range(STEPS):
        rows = first + step * BLOCK_M
        offsets = rows[:, None] * CHANNELS + channels[None, :]
        wanted = (rows < m)[:, None] & channel_in[None, :]
        x = tl.load(x_ptr + offsets, mask=wanted, other=0.0)
        g = gradient(
            grad_ptr, y_ptr, x, rows, m, offsets, wanted, scale[None, :], shift[None, :],
            CHANNELS, RELU,
        )  # fmt: skip
        if masked_ptr is not None:
            tl.store(masked_ptr + offsets, g, mask=wanted)
        g = g.to(tl.float32)
        sum_g += g
        # Outside the map g is zero, x - μ need not be finite.
        sum_gx += tl.where(wanted, g * (x.to(tl.float32) - mean[None, :]), 0.0)
        if residual_ptr is not None:
            r = tl.load(residual_ptr + offsets, mask=wanted, other=0.0).to(tl.float32)
            sum_gr += tl.where(wanted, g * (r - residual_mean[None, :]), 0.0)
    sums = sums_ptr + tl.program_id(0) * (SUMS * CHANNELS) + channels
    tl.store(sums, tl.sum(sum_g, 0), mask=channel_in)
    tl.store(sums + CHANNELS, tl.sum(sum_gx, 0), mask=channel_in)
    if residual_ptr is not None:
        tl.store(sums + 2 * CHANNELS, tl.sum(sum_gr, 0), mask=channel_in)


@triton.jit
def gradient_vectors(
    mean_ptr, var_ptr, weight_ptr, sum_g_ptr, sum_gx_ptr, eps, count, channels, inside
):  # fmt: skip
    """Return a, μ, b, d with grad_x = a · (g - (x - μ) · b - d)."""
    inverse = inverse_deviation(var_ptr, eps, channels, inside)
    a = inverse
    if weight_ptr is not None:
        a *= vector(weight_ptr, channels, inside)
    b = inverse * inverse * (vector(sum_gx_ptr, channels, inside) / count)
    d = vector(sum_g_ptr, channels, inside) / count
    return a[None, :], vector(mean_ptr, channels, inside)[None, :], b[None, :], d[None, :]


@triton.jit(do_not_specialize=["m", "eps", "residual_eps", "count"])
def bn_act_bwd_apply_kernel(
    grad_ptr, x_ptr, y_ptr, residual_ptr, grad_x_ptr, grad_residual_ptr,
    mean_ptr, var_ptr, weight_ptr, bias_ptr, sum_g_ptr, sum_gx_ptr,
    residual_mean_ptr, residual_var_ptr, residual_weight_ptr, sum_gr_ptr,
    m, count, eps, residual_eps, CHANNELS: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """grad_x = γ/σ · (g - Σg / M - x̂ · Σ(g x̂) / M), and the same for the residual's BatchNorm."""
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_in = channels < CHANNELS
    a, mean, b, d = gradient_vectors(
        mean_ptr, var_ptr, weight_ptr, sum_g_ptr, sum_gx_ptr, eps, count, channels, channel_in
    )
    scale, shift = mean, mean
    if RELU and y_ptr is None:
        scale, shift = scale_and_shift(
            mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channels, channel_in
        )
        scale, shift = scale[None, :], shift[None, :]
    if residual_ptr is not None:
        a_r, mean_r, b_r, d_r = gradient_vectors(
            residual_mean_ptr, residual_var_ptr, residual_weight_ptr, sum_g_ptr, sum_gr_ptr,
            residual_eps, count, channels, channel_in,
        )  # fmt: skip
    first = first_row(STEPS, BLOCK_M, WIDE) + tl.arange(0, BLOCK_M)
    for step in range(STEPS):
        rows = first + step * BLOCK_M
        offsets = rows[:, None] * CHANNELS + channels[None, :]
        wanted = (rows < m)[:, None] & channel_in[None, :]
        x = tl.load(x_ptr + offsets, mask=wanted, other=0.0)
        g = gradient(
            grad_ptr, y_ptr, x, rows, m, offsets, wanted, scale, shift, CHANNELS, RELU
        ).to(tl.float32)  # fmt: skip
        grad_x = rounded(a * (g - (x.to(tl.float32) - mean) * b - d), x.dtype)
        tl.store(grad_x_ptr + offsets, grad_x, mask=wanted)
        if residual_ptr is not None:
            r = tl.load(residual_ptr + offsets, mask=wanted, other=0.0).to(tl.float32)
            grad_r = rounded(a_r * (g - (r - mean_r) * b_r - d_r), x.dtype)
            tl.store(grad_residual_ptr + offsets, grad_r, mask=wanted)
