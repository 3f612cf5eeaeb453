"""Where a step of an implicit GEMM reads: arithmetic that the host's tests run on numbers too."""

import triton
import triton.language as tl


@triton.jit
def window_of(
    pixel, oh, ow, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
):  # fmt: skip
    """Return image, row and column of the first tap of an output pixel's window."""
    top, left = pixel // ow % oh * STRIDE_H - PAD_H, pixel % ow * STRIDE_W - PAD_W
    return pixel // (oh * ow), top, left


@triton.jit
def tap_of(
    step, BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr, KW: tl.constexpr, DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
):  # fmt: skip
    """Return tap, its distance from the window's first one down and right, and first channel."""
    tap = step // BLOCKS
    return tap, tap // KW * DIL_H, tap % KW * DIL_W, step % BLOCKS * BLOCK_K
