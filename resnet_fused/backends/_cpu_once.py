"""Native convolutions with weights that change with every call, as in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import _turned, onednn
from resnet_fused.backends._cpu_conv import (
    Plan,
    dense,
    layout_of,
    left_to_torch,
    multiplies_pairs,
    multiplies_tiles,
    plan_for,
)
from resnet_fused.backends._outputs import empty_channels_last, scratch
from resnet_fused.backends._sizes import output_size
from resnet_fused.backends.native import address, as_vector, loaded


class Norm(NamedTuple):
    """act(BN(x)) in a convolution's place of x, by the vectors of its channels."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    act: str | None


class Once(NamedTuple):
    """One kind of call of the extension's ``convolve_once``: all but the addresses."""

    plan: Plan
    #: Of the weight: elements along O, C and the taps, whether it is turned, and wide.
    layout: tuple[int, int, int, bool, bool]
    dtype: torch.dtype

    @staticmethod
    def of(
        x: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        *,
        turned: bool = False,
        normalised: bool = False,
        with_stats: bool = False,
    ) -> Once | None:
        """Return the call for a dense ``weight``, or None where packing it would not pay."""
        shape = weight.shape
        if turned:
            shape = torch.Size((shape[1], shape[0], *shape[2:]))
        algorithm = _worth_packing(x, weight, shape, stride, padding, dilation, groups, turned)
        if algorithm is None:
            return None
        use = (normalised, with_stats)
        plan = plan_for(x.shape, shape, x.dtype, stride, padding, dilation, groups, algorithm, use)
        return Once(plan, layout_of(weight, plan, turned), x.dtype)

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        norm: tuple[int, int, int, int],
        eps: float,
        act: str | None,
        mean: int,
        var: int,
    ) -> Tensor:
        """Return the convolution of dense channels_last maps; of the vectors come addresses."""
        plan = self.plan
        y = empty_channels_last(plan.output_shape, self.dtype)
        work = scratch(plan.scratch_bytes)
        loaded().convolve_once(
            x.data_ptr(), weight.data_ptr(), address(residual), y.data_ptr(),
            work.data_ptr(), work.nbytes, plan.dtype, plan.algorithm, *plan.geometry, *self.layout,
            plan.threads, *norm, eps, act == "relu", mean, var,
        )  # fmt: skip
        return y


#: No vectors of a BatchNorm.
NO_NORM = (0, 0, 0, 0)


def convolve_once(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    residual: Tensor | None = None,
    turned: bool = False,
    norm: Norm | None = None,
    with_stats: bool = False,
) -> tuple[Tensor, ...] | None:
    """Return the convolution, its weights packed into scratch memory and not kept.

    For weights that change with every call, as in training: packing then has to pay, and where it
    does not, the result is None. All is one call of the extension, as the kernels of a step leave
    nothing of Python in the caches.

    Args:
        x: the input, any layout.
        weight: (O, C / groups, KH, KW), x's dtype or float32.
        stride: two integers.
        padding: two integers.
        dilation: two integers.
        groups: one if turned.
        residual: added to the output; any layout.
        turned: read ``weight`` as (C, O, KH, KW) with each kernel turned by half a turn, which
            makes the convolution of an output's gradient the input's.
        norm: what x goes through first.
        with_stats: return the output's mean and biased variance, too.
    """
    weight = dense(weight)
    once = Once.of(
        x, weight, stride, padding, dilation, groups,
        turned=turned, normalised=norm is not None, with_stats=with_stats,
    )  # fmt: skip
    if once is None:
        return None
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    channels = once.plan.output_shape[1]
    moments = [torch.empty(channels, dtype=torch.float32) for _ in range(2)] if with_stats else []
    *vectors, eps, act = norm or (None,) * 6
    read = [as_vector(v) for v in vectors]
    m, v, w, b = map(address, read)
    mean, var = [t.data_ptr() for t in moments] or (0, 0)
    y = once.run(x, weight, residual, (m, v, w, b), eps or 0.0, act, mean, var)
    return y, *moments


def backward_data(
    grad: Tensor,
    weight: Tensor,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> Tensor | None:
    """Return the gradient of a convolution's input, or None where torch's own is as fast.

    It is a convolution of ``grad`` with turned kernels. With a stride, that of a 1x1 kernel lies
    between zeros, or between what is in ``residual``.

    Args:
        grad: the output's gradient, any layout.
        weight: (O, C / groups, KH, KW), grad's dtype or float32.
        x_size: of the input.
        stride: two integers.
        padding: two integers.
        dilation: two integers.
        groups: how many.
        residual: in the input's shape, any layout, added to its gradient; or None.
    """
    kernel = weight.shape[2:]
    outer = _turned.around(weight.shape, padding, dilation)
    strided = {*stride} != {1}
    if min(outer) < 0 or (strided and max(kernel) > 1):
        return None
    own = convolve_once(
        grad, weight, (1, 1), outer, dilation, groups,
        residual=None if strided else residual, turned=True,
    )  # fmt: skip
    if own is None:
        return None
    (made,) = own
    if not strided:
        return made
    grad_x = empty_channels_last(x_size, grad.dtype)
    met = grad_x[:, :, :: stride[0], :: stride[1]]
    if residual is None:
        grad_x.zero_()
        met.copy_(made)
    else:
        grad_x.copy_(residual)
        met.add_(made)
    return grad_x


def is_winograds(
    weight_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    """Return whether Winograd's transform runs the convolution, with channels enough to pay."""
    plain = groups == 1 and {*stride, *dilation} == {1} and tuple(weight_size[2:]) == (3, 3)
    return plain and min(weight_size[:2]) >= 24


def _worth_packing(
    x: Tensor,
    weight: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    turned: bool = False,
) -> str | None:
    """Return the algorithm that beats torch's oneDNN with the packing counted, or None.

    Packing for Winograd's transform costs as much as a number of tiles that does not depend on the
    channels. Measured on one thread of a Zen 5 at batch 8, in CPU time, packing included, against
    torch's own in memory that it need not fault in: float32, 3x3, 64 channels at 56x56 2.0x, 128 at
    28x28 2.2x, 256 at 14x14 1.8x, 512 at 7x7 1.3x; bfloat16 1.2x, 1.3x, 0.9x, 0.5x; 32 channels
    at 16x16 0.8x; ResNet-50's 1x1 0.9 to 1.3x. Directly in bfloat16, on two threads with a float32
    weight: 256 at 14x14 1.0x, 512 at 7x7 1.1 to 1.2x, the same with stride 2 1.05x, 1.2x, 16 to 64
    channels 1.0 to 1.4x, 48, which fill one and a half panels, 0.8x; float32 0.9 to 1.1x. Of 3
    channels, stem and CIFAR's first layer: bfloat16 1.2 to 1.3x, float32 1.1 to 1.3x.
    """
    if groups != 1 or left_to_torch(x.dtype):
        return None
    if multiplies_tiles(x.dtype):
        pays = _worth_packing_for_tiles(weight, weight_shape, dilation, turned)
        return "amx" if pays else None
    pairs = multiplies_pairs(x.dtype)
    if weight_shape[1] < 16 and {*dilation} == {1} and weight_shape[0] >= 16:
        return "narrow" if pairs and weight_shape[1] % 2 else "direct"
    if tuple(weight_shape[2:]) == (1, 1) and not any(padding):
        return "direct"
    if is_winograds(weight_shape, stride, dilation, groups):
        n, _, *sides = x.shape
        oh, ow = output_size(sides, (3, 3), (1, 1), padding)
        tiles = n * -(-oh // 4) * -(-ow // 4)
        pays = tiles >= 256 and min(weight_shape[:2]) >= 64 if pairs else tiles >= 32
        if pays:
            return "winograd4"
    if not onednn.computes_in(x.dtype):
        return "direct"
    # Taps of a contiguous weight, and odd channels, take longer to pack than all that is gained.
    packs = weight.is_contiguous(memory_format=torch.channels_last) and weight_shape[1] % 2 == 0
    full = weight_shape[0] % 32 == 0 and weight_shape[1] >= 16
    return "direct" if pairs and packs and full else None


def _worth_packing_for_tiles(
    weight: Tensor, weight_shape: Sequence[int], dilation: Sequence[int], turned: bool
) -> bool:
    """Return whether AMX beats oneDNN, which has it too, in a convolution in one group.

    Measured on two threads of an Emerald Rapids at batch 8 and 2, packing included: 1x1 0.9 to
    2.8x; 3x3 0.9 to 1.7x of a channels_last weight, of a contiguous one 0.7 to 0.9x but in data
    gradients, 1.1 to 1.4x; 16 channels 0.9 to 1.8x, 48 0.6 to 0.9x, the stem's three 0.7x.
    """
    c, *kernel = weight_shape[1:]
    if c % 32 and (c != 16 or dilation[1] > 1):
        return False
    last = weight.is_contiguous(memory_format=torch.channels_last)
    return kernel == [1, 1] or last or turned
