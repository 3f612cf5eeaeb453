"""One pass over a map: bn_apply, add_relu, and the end of a convolution whose K was split."""

import triton
import triton.language as tl

from resnet_fused.backends.triton.kernels.shared import activate, rounded


# A number of elements that 16 divides, which Triton then knows, keeps loads 16 bytes wide.
@triton.jit
def affine_kernel(
    x_ptr, y_ptr, scale_ptr, shift_ptr, residual_ptr, elements,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of y = relu(Σ x · scale + shift + residual), in float32, rounded once.

    x is (PARTS, elements), added in order, so that every run gives the same bits; y and residual
    are (elements,), the channel running fastest.
    """
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    acc = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    for _ in tl.static_range(PARTS - 1):
        x_ptr += elements
        acc += tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    channels = offsets % CHANNELS
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    acc = rounded(activate(acc, RELU), y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, acc, mask=inside)
