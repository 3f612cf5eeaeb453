"""BatchNorm's arithmetic, one copy for forward and backward, so that ReLU's mask is the same."""

import triton
import triton.language as tl

from resnet_fused.backends.triton.kernels.shared import activate, rounded


@triton.jit
def vector(ptr, channels, inside):
    """Return a per-channel vector in float32."""
    return tl.load(ptr + channels, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def inverse_deviation(var_ptr, eps, channels, inside):
    """Return 1 / √(σ² + ε)."""
    return inverse_of(vector(var_ptr, channels, inside), eps)


@triton.jit
def inverse_of(var, eps):
    """Return the same of a variance in registers, each step correctly rounded."""
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def scale_and_shift(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channels, inside):
    """Return scale = γ / √(σ² + ε) and shift = β - μ · scale."""
    mean, var = vector(mean_ptr, channels, inside), vector(var_ptr, channels, inside)
    return affine_of(mean, var, weight_ptr, bias_ptr, eps, channels, inside)


@triton.jit
def affine_of(mean, var, weight_ptr, bias_ptr, eps, channels, inside):
    """Return the same by statistics that are in registers."""
    scale = inverse_of(var, eps)
    if weight_ptr is not None:
        scale *= vector(weight_ptr, channels, inside)
    if bias_ptr is not None:
        shift = tl.fma(-mean, scale, vector(bias_ptr, channels, inside))
    else:
        shift = -mean * scale
    return scale, shift


@triton.jit
def normalise(x, scale, shift, RELU: tl.constexpr):
    """Return act(x · scale + shift) in float32.

    The multiply-add is fused by name: left to the compiler, it could be fused in one kernel and not
    in the next, and a sign at ReLU's kink would differ.
    """
    return activate(tl.fma(x.to(tl.float32), scale, shift), RELU)


@triton.jit
def before_relu(g, x, scale, shift):
    """Return the gradient in front of relu(x · scale + shift), made again as the forward made it.

    It passes where the sum is not below or at zero, which NaN is not; a rounding to zero counts as
    zero.
    """
    y = rounded(normalise(x, scale, shift, False), x.dtype).to(tl.float32)
    return tl.where(y <= 0.0, 0.0, g)


@triton.jit(do_not_specialize=["eps"])
def scale_shift_kernel(
    mean_ptr, var_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, eps,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK channels' scale and shift, for a convolution that normalises what it reads."""
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < CHANNELS
    scale, shift = scale_and_shift(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, channels, inside
    )  # fmt: skip
    tl.store(scale_ptr + channels, scale, mask=inside)
    tl.store(shift_ptr + channels, shift, mask=inside)
