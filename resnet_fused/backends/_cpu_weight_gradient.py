"""The gradient of a convolution's weight by the native kernels of the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends._cpu_conv import left_to_torch, multiplies_tiles
from resnet_fused.backends._cpu_once import is_winograds
from resnet_fused.backends._outputs import empty_weight, scratch
from resnet_fused.backends.native import DTYPE_NAMES, loaded

#: Output pixels of a batch from which on a weight's gradient by Winograd's transform holds the 2x
#: rule. Measured with 24 to 200 channels, its error is at most 0.5 of what is allowed at 98 pixels,
#: 1.2 at 25, and 3 at one, where the rule allows for the rounding of a single product.
FEWEST_TERMS = 96


def backward_weight(
    grad: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return the gradient of a convolution's weight, by Winograd's transform or directly, or None.

    None where it would be slower than torch's oneDNN or less exact, and where the transform's
    result is not finite: it spreads NaN and infinity over taps that torch keeps clean. Measured on
    one thread of a Zen 5, in CPU time against torch's oneDNN. Winograd at batch 8: float32, 64
    channels at 56x56 2.1x, 128 at 28x28 2.1x, 256 at 14x14 2.0x, 512 at 7x7 5.1x; bfloat16 1.6x,
    1.5x, 1.1x, 1.7x; 24 at 28x28 1.9x, 8 to 64 0.9x, 16 at 32x32 0.5 to 1.3x. Directly at batch
    16, ResNet-50's 1x1: float32 1.0 to 1.5x, bfloat16 0.9 to 1.8x; strided 3x3 1.3 to 1.6x, 1.1 to
    1.7x; 16 channels in 3x3 0.5 to 0.8x, 3 in 7x7 0.1x.

    Args:
        grad: the output's gradient, any layout.
        x: the convolution's input, any layout.
        weight_size: (O, C / groups, KH, KW).
        stride: two integers.
        padding: two integers.
        dilation: two integers.
        groups: how many.
        channels_last: the layout of the result, else contiguous.
        dtype: of the result: x's, or float32, to which nothing is rounded.
    """
    geometry = (stride, padding, dilation, groups)
    kind = Kind.of(grad, x, weight_size, *geometry, channels_last, dtype)
    if kind is None:
        return None
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    return kind.run(grad, x)


class Kind(NamedTuple):
    """One kind of call of the extension's ``conv_backward_weight``: all but the addresses."""

    weight_size: Sequence[int]
    dtype: torch.dtype
    channels_last: bool
    arguments: tuple[Any, ...]
    scratch_bytes: int

    @staticmethod
    def of(
        grad: Tensor,
        x: Tensor,
        weight_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        channels_last: bool,
        dtype: torch.dtype,
    ) -> Kind | None:
        """Return the call, or None where torch's own is faster or more exact."""
        algorithm = _gradient_algorithm(grad, weight_size, stride, dilation, groups)
        if algorithm is None:
            return None
        o, _, *kernel = weight_size
        n, c, h, w = x.shape
        sizes = (
            DTYPE_NAMES[x.dtype], algorithm,
            n, h, w, c, o, *kernel, *stride, *padding, *dilation, groups,
        )  # fmt: skip
        threads = torch.get_num_threads()
        nbytes = loaded().conv_backward_weight_scratch_bytes(*sizes, threads)
        arguments = (*sizes, channels_last, dtype != x.dtype, threads)
        return Kind(weight_size, dtype, channels_last, arguments, nbytes)

    def run(self, grad: Tensor, x: Tensor) -> Tensor | None:
        """Return the gradient by dense channels_last maps, None where it may not be finite."""
        work = scratch(self.scratch_bytes)
        made = empty_weight(self.weight_size, self.dtype, channels_last=self.channels_last)
        finite = loaded().conv_backward_weight(
            grad.data_ptr(), x.data_ptr(), made.data_ptr(), work.data_ptr(), work.nbytes,
            *self.arguments,
        )  # fmt: skip
        return made if finite else None


def _gradient_algorithm(
    grad: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """Return how a weight's gradient is summed faster than by torch's oneDNN, or None."""
    if left_to_torch(grad.dtype):
        return None
    _, c, *kernel = weight_size
    # A tap's channels fill the kernel's registers.
    full = groups == 1 and (kernel == [1, 1] or c >= 32)
    if multiplies_tiles(grad.dtype):
        return "amx" if full else None
    terms = grad.numel() // weight_size[0]
    if terms >= FEWEST_TERMS and is_winograds(weight_size, stride, dilation, groups):
        return "winograd4"
    return "direct" if full else None
