"""What the kernels share: the order of tiles, the multiply-accumulate, the epilogue."""

import triton
import triton.language as tl

#: Whether kernels are interpreted: Triton decides when it decorates them.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return row and column of a tile: in turn through bands of GROUP_M rows, which stay in L2."""
    band = GROUP_M * tiles_n
    first = index // band * GROUP_M
    rows = min(tiles_m - first, GROUP_M)
    return first + index % band % rows, index % band // rows


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, ROUNDED: tl.constexpr = False):
    """Return acc + a · b, summed in float32; in TF32 both are rounded unless they are ROUNDED.

    Tensor cores do not: they cut the last 13 bits of the mantissa off, always towards zero.
    """
    if INTERPRETED:  # The interpreter would multiply the bits of bfloat16 as integers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    elif PRECISION == "tf32" and not ROUNDED:
        a, b = _nearest_tf32(a), _nearest_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _nearest_tf32(value):
    """Return float32 values with 10 bits of mantissa, of two the larger; NaN stays NaN."""
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def affine(acc, scale_ptr, shift_ptr, channels, inside):
    """Return acc · scale + shift; row i of ``acc`` is channel ``channels[i]``."""
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + channels, mask=inside, other=0.0).to(tl.float32)[:, None]
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + channels, mask=inside, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit
def activate(value, RELU: tl.constexpr):
    """Return relu(value), which keeps NaN, or value."""
    if RELU:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """Return a float32 value in DTYPE, the nearest, of two the even one."""
    # The interpreter would cut the digits off.
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = value.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, nearest, bits).to(tl.float32, bitcast=True)
    return value.to(DTYPE)
