"""The gradients of a convolution as implicit GEMMs over channels_last maps."""

import triton
import triton.language as tl

from resnet_fused.backends.triton.kernels.normalise import before_relu, normalise, vector
from resnet_fused.backends.triton.kernels.shared import multiply, rounded, tile_of


@triton.jit(do_not_specialize=["m", "gh", "gw", "h", "w", "rows", "columns"])
def conv_bwd_data_kernel(
    grad_ptr, w_ptr, grad_x_ptr, m, gh, gw, h, w, rows, columns,
    IN: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, W_IN: tl.constexpr,
    W_OUT: tl.constexpr, W_TAP: tl.constexpr, W_GROUP: tl.constexpr,
    KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    FIRST_H: tl.constexpr, FIRST_W: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    TAP_H: tl.constexpr, TAP_W: tl.constexpr, EVERY_H: tl.constexpr, EVERY_W: tl.constexpr,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    LEAVES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    residual_ptr=None, x_ptr=None, mean_ptr=None, scale_ptr=None, shift_ptr=None, sums_ptr=None,
    y_ptr=None,
):  # fmt: skip
    """One tile of the input's gradient: BLOCK_M of a phase's m pixels, BLOCK_N channels of a group.

    A phase, see :class:`gradients.Phase`, is (rows, columns) pixels of each image. IN and OUT count
    the channels of one group of the convolution; K runs over its taps and, inside, over OUT.
    W_IN to W_GROUP are the weight's strides. What is at ``residual_ptr`` is added.

    With ``x_ptr`` the convolution's input was BN(x), and the tile's part of Σ g and Σ g · (x - μ)
    goes to ``sums_ptr``, (tiles, 2, GROUPS · IN); with ``scale_ptr`` and ``shift_ptr`` it was
    relu(x · scale + shift), and g is the gradient in front of that ReLU. With ``y_ptr`` it was the
    ReLU's result y, g is the gradient in front of that, and the part of Σ g alone goes to
    ``sums_ptr``, (tiles, 1, GROUPS · IN).
    """
    tile_m, tile_n = tile_of(
        tl.program_id(0), (m - 1) // BLOCK_M + 1, (IN + BLOCK_N - 1) // BLOCK_N, GROUP_M
    )
    group = tl.program_id(1)
    ks = tl.arange(0, BLOCK_K)
    if WIDE:
        tile_m, tile_n = tile_m.to(tl.int64), tile_n.to(tl.int64)
        group, ks = group.to(tl.int64), ks.to(tl.int64)
        # Products with them are offsets within an image.
        gw, columns = gw.to(tl.int64), columns.to(tl.int64)
    pixels = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel_in, channel_in = pixels < m, channels < IN
    image, row, column = pixels // (columns * rows), pixels // columns % rows, pixels % columns
    top, left = row + SHIFT_H, column + SHIFT_W
    grad_rows = grad_ptr + ((image * gh + top) * gw + left) * (OUT * GROUPS) + group * OUT
    w_rows = w_ptr + group * W_GROUP + channels * W_IN

    BLOCKS: tl.constexpr = (OUT + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if TAPS_H * TAPS_W > 0:
        for step in range(TAPS_H * TAPS_W * BLOCKS):
            tap, k = step // BLOCKS, step % BLOCKS * BLOCK_K + ks
            down, right = tap // TAPS_W, tap % TAPS_W
            inside = pixel_in
            if LEAVES:
                y_in, x_in = top - down * DIL_H, left - right * DIL_W
                inside &= (y_in >= 0) & (y_in < gh) & (x_in >= 0) & (x_in < gw)
            inside, known = inside[:, None], channel_in[:, None]
            if OUT % BLOCK_K != 0:
                inside &= (k < OUT)[None, :]
                known &= (k < OUT)[None, :]
            offsets = k - (down * DIL_H * gw + right * DIL_W) * (OUT * GROUPS)
            a = tl.load(grad_rows[:, None] + offsets[None, :], mask=inside, other=0.0)
            place = (TAP_H + down * EVERY_H) * KW + TAP_W + right * EVERY_W
            offsets = k * W_OUT + place * W_TAP
            b = tl.load(w_rows[:, None] + offsets[None, :], mask=known, other=0.0)
            acc = multiply(b, a.T, acc, PRECISION)

    out = (image * h + FIRST_H + row * STRIDE_H) * w + FIRST_W + column * STRIDE_W
    channels += group * IN
    offsets = out[:, None] * (IN * GROUPS) + channels[None, :]
    wanted = pixel_in[:, None] & channel_in[None, :]
    g = acc.T
    if residual_ptr is not None:
        g += tl.load(residual_ptr + offsets, mask=wanted, other=0.0).to(tl.float32)
    g = rounded(g, grad_x_ptr.dtype.element_ty)
    if y_ptr is not None:
        y = tl.load(y_ptr + offsets, mask=wanted, other=0.0)
        g = tl.where(y <= 0.0, 0.0, g)
        sums = sums_ptr + tile_m * (IN * GROUPS) + channels
        tl.store(sums, tl.sum(g.to(tl.float32), 0), mask=channel_in)
    if x_ptr is not None:
        x = tl.load(x_ptr + offsets, mask=wanted, other=0.0)
        if scale_ptr is not None:
            scale = vector(scale_ptr, channels, channel_in)[None, :]
            shift = vector(shift_ptr, channels, channel_in)[None, :]
            g = before_relu(g, x, scale, shift)
        mean = vector(mean_ptr, channels, channel_in)[None, :]
        sums = sums_ptr + tile_m * (2 * IN * GROUPS) + channels
        terms = g.to(tl.float32)
        tl.store(sums, tl.sum(terms, 0), mask=channel_in)
        # Outside the map g is zero, x - μ need not be finite.
        terms = tl.where(wanted, terms * (x.to(tl.float32) - mean), 0.0)
        tl.store(sums + IN * GROUPS, tl.sum(terms, 0), mask=channel_in)
    tl.store(grad_x_ptr + offsets, g, mask=wanted)


@triton.jit(do_not_specialize=["m", "h", "w", "oh", "ow", "steps"])
def conv_bwd_weight_kernel(
    grad_ptr, x_ptr, out_ptr, m, h, w, oh, ow, steps,
    IN: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    FLAT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    in_scale_ptr=None, in_shift_ptr=None, IN_RELU: tl.constexpr = False,
):  # fmt: skip
    """One tile of the weight's gradient: BLOCK_M output channels, BLOCK_N input channels of a tap.

    In a FLAT kernel the columns run over (tap, channel) as one axis. K runs over ``steps`` blocks
    of one part of the m output pixels; the result is a row (GROUPS · OUT) of (KH, KW, IN) for each
    part, to be added in order. With ``in_scale_ptr`` and ``in_shift_ptr`` the convolution's input
    is act(x · scale + shift), rounded, and padding is zero behind that.
    """
    WIDTH: tl.constexpr = KH * KW * IN
    COLUMNS: tl.constexpr = WIDTH if FLAT else IN
    TILES_M: tl.constexpr = (OUT + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    tile, part, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tap = tile // TILES_M // TILES_N
    rows = tile % TILES_M * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile // TILES_M % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, column_in = rows < OUT, columns < COLUMNS
    ks = tl.arange(0, BLOCK_K)
    if WIDE:
        part, group, rows = part.to(tl.int64), group.to(tl.int64), rows.to(tl.int64)
        oh = oh.to(tl.int64)  # its product with ow is the pixels of an image
    first = part * steps * BLOCK_K
    if FLAT:
        tap, channel = columns // IN, columns % IN
    else:
        channel = columns
    down, right = tap // KW * DIL_H - PAD_H, tap % KW * DIL_W - PAD_W
    if in_scale_ptr is not None:
        scale = vector(in_scale_ptr + group * IN, channel, column_in)[None, :]
        shift = vector(in_shift_ptr + group * IN, channel, column_in)[None, :]

    PLAIN: tl.constexpr = KH * KW * STRIDE_H * STRIDE_W == 1 and PAD_H + PAD_W == 0 and not FLAT
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(steps):
        pixels = first + step * BLOCK_K + ks
        pixel_in = pixels < m
        grad = tl.load(
            grad_ptr + pixels[:, None] * (OUT * GROUPS) + (group * OUT + rows)[None, :],
            mask=pixel_in[:, None] & row_in[None, :], other=0.0,
        )  # fmt: skip
        top, left = pixels // ow % oh * STRIDE_H, pixels % ow * STRIDE_W
        image = pixels // (ow * oh) * h
        if FLAT:
            y_in, x_in = top[:, None] + down[None, :], left[:, None] + right[None, :]
            inside = pixel_in[:, None] & (y_in >= 0) & (y_in < h) & (x_in >= 0) & (x_in < w)
            offsets = ((image[:, None] + y_in) * w + x_in) * (IN * GROUPS) + channel[None, :]
        elif PLAIN:
            inside = pixel_in[:, None]
            offsets = pixels[:, None] * (IN * GROUPS) + columns[None, :]
        else:
            y_in, x_in = top + down, left + right
            inside = pixel_in & (y_in >= 0) & (y_in < h) & (x_in >= 0) & (x_in < w)
            inside = inside[:, None]
            offsets = ((image + y_in) * w + x_in)[:, None] * (IN * GROUPS) + columns[None, :]
        inside &= column_in[None, :]
        x = tl.load(x_ptr + group * IN + offsets, mask=inside, other=0.0)
        if in_scale_ptr is not None:
            x = rounded(normalise(x, scale, shift, IN_RELU), x.dtype)
            # Where grad is zero, as behind the last pixel, x is to be finite; padding is zero.
            x = tl.where(inside, x, 0.0)
        acc = multiply(grad.T, x, acc, PRECISION)

    if not FLAT:
        columns += tap * IN
    offsets = (part * (OUT * GROUPS) + group * OUT + rows)[:, None] * WIDTH + columns[None, :]
    value = rounded(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, value, mask=row_in[:, None] & column_in[None, :])
