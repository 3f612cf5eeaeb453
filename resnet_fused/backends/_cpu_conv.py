"""Native convolutions: the algorithm, packed weights and scratch memory of one input shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends._derived import derived
from resnet_fused.backends._outputs import empty_channels_last, scratch
from resnet_fused.backends._sizes import output_size
from resnet_fused.backends.native import DTYPE_NAMES, address, as_vector, loaded

#: A kernel call with everything bound.
Call = Callable[[], None]


def multiplies_tiles(dtype: torch.dtype) -> bool:
    """Return whether convolutions in ``dtype`` run on AMX here."""
    return dtype == torch.bfloat16 and bool(loaded().cpu_isa() == "amx_bf16")


class Convolution:
    """One convolution of one input shape; its packed weights are kept until the weight changes."""

    def __init__(
        self,
        shape: Sequence[int],
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self._plan = _plan_for(shape, weight.shape, weight.dtype, stride, padding, dilation, groups)
        self.scratch_bytes, self.output_shape = self._plan.scratch_bytes, self._plan.output_shape
        self._packed = derived(
            (weight,), ("cpu", self._plan.algorithm, groups), lambda: _pack(weight, self._plan)
        )

    def bind(
        self,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        y: Tensor,
        scratch: Tensor,
        act: str | None,
    ) -> Call:
        """Return a call that runs the convolution on these buffers.

        The caller keeps x, residual, y and scratch alive; the call keeps the rest.

        Args:
            x: the input, channels_last.
            scale: float32 vector (:func:`native.as_vector`) or None for ones.
            shift: float32 vector or None for zeros.
            residual: channels_last in the output's shape, or None; it may be ``y`` itself.
            y: receives the output, channels_last.
            scratch: at least ``scratch_bytes`` bytes, 64-byte aligned.
            act: None or "relu".
        """
        return _bind(self._plan, x, self._packed, scale, shift, residual, y, scratch, act)


class Norm(NamedTuple):
    """act(BN(x)) in a convolution's place of x, by the vectors of its channels."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    act: str | None


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
    shape = weight.shape
    if turned:
        shape = torch.Size((shape[1], shape[0], *shape[2:]))
    algorithm = _worth_packing(x, weight, shape, stride, padding, dilation, groups, turned)
    if algorithm is None:
        return None
    use = (norm is not None, with_stats)
    plan = _plan_for(x.shape, shape, x.dtype, stride, padding, dilation, groups, algorithm, use)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    y = empty_channels_last(plan.output_shape, x.dtype)
    moments = [torch.empty(shape[0], dtype=torch.float32) for _ in range(2)] if with_stats else []
    *vectors, eps, act = norm or (None,) * 6
    read = [as_vector(v) for v in vectors]
    weight, *layout = _as_it_lies(weight, plan, turned)
    work = scratch(plan.scratch_bytes)
    loaded().convolve_once(
        x.data_ptr(), weight.data_ptr(), address(residual), y.data_ptr(),
        work.data_ptr(), work.nbytes, plan.dtype, plan.algorithm, *plan.geometry, *layout,
        plan.threads, *map(address, read), eps or 0.0, act == "relu",
        *([t.data_ptr() for t in moments] or (0, 0)),
    )  # fmt: skip
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
    outer = [d * (k - 1) - p for k, p, d in zip(kernel, padding, dilation, strict=True)]
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
    if groups != 1:
        return None
    if multiplies_tiles(x.dtype):
        pays = _worth_packing_for_tiles(weight, weight_shape, dilation, turned)
        return "amx" if pays else None
    narrow = x.dtype == torch.bfloat16
    if weight_shape[1] < 16 and {*dilation} == {1} and weight_shape[0] >= 16:
        return "narrow" if narrow and weight_shape[1] % 2 else "direct"
    if tuple(weight_shape[2:]) == (1, 1) and not any(padding):
        return "direct"
    if is_winograds(weight_shape, stride, dilation, groups):
        n, _, *sides = x.shape
        oh, ow = output_size(sides, (3, 3), (1, 1), padding)
        tiles = n * -(-oh // 4) * -(-ow // 4)
        pays = tiles >= 256 and min(weight_shape[:2]) >= 64 if narrow else tiles >= 32
        if pays:
            return "winograd4"
    # Taps of a contiguous weight, and odd channels, take longer to pack than all that is gained.
    packs = weight.is_contiguous(memory_format=torch.channels_last) and weight_shape[1] % 2 == 0
    full = weight_shape[0] % 32 == 0 and weight_shape[1] >= 16
    return "direct" if narrow and packs and full else None


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


class _Plan(NamedTuple):
    dtype: str
    algorithm: str
    geometry: tuple[int, ...]
    #: What packing needs to know: output channels, channels per group, kernel, groups.
    layout: tuple[int, ...]
    packed_bytes: int
    #: Of one call by itself, or, packing and what stands around it counted in, of `convolve_once`.
    scratch_bytes: int
    output_shape: tuple[int, int, int, int]
    threads: int


def _plan_for(
    shape: Sequence[int],
    weight_shape: Sequence[int],
    dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    algorithm: str | None = None,
    once: tuple[bool, bool] | None = None,
) -> _Plan:
    n, c, h, w = shape
    geometry = (
        n, h, w, c, weight_shape[0], *weight_shape[2:], *stride, *padding, *dilation, groups,
    )  # fmt: skip
    isa = loaded().cpu_isa()
    return _plan(isa, DTYPE_NAMES[dtype], geometry, torch.get_num_threads(), algorithm, once)


@functools.lru_cache(maxsize=4096)
def _plan(
    isa: str,
    dtype: str,
    geometry: tuple[int, ...],
    threads: int,
    algorithm: str | None,
    once: tuple[bool, bool] | None,
) -> _Plan:
    """Return the plan; ``once``: whether the input is normalised, and moments are wanted."""
    extension = loaded()
    n, h, w, c, o, kh, kw, sh, sw, ph, pw, dh, dw, groups = geometry
    algorithm = algorithm or extension.conv_bn_act_algorithms(dtype, *geometry)[0]
    layout = (o, c // groups, kh, kw, groups)
    call = (dtype, algorithm, *geometry, threads)
    return _Plan(
        dtype,
        algorithm,
        geometry,
        layout,
        extension.conv_bn_act_packed_bytes(dtype, algorithm, *layout),
        extension.conv_bn_act_scratch_bytes(*call)
        if once is None
        else extension.convolve_once_scratch_bytes(*call, *once),
        (n, o, *output_size((h, w), (kh, kw), (sh, sw), (ph, pw), (dh, dw))),
        threads,
    )


def _pack(weight: Tensor, plan: _Plan) -> Tensor:
    packed = torch.empty(plan.packed_bytes, dtype=torch.uint8)
    weight, *along = _as_it_lies(weight, plan)
    loaded().conv_bn_act_pack(
        weight.data_ptr(), packed.data_ptr(), packed.nbytes, plan.dtype, plan.algorithm,
        *plan.layout, *along,
    )  # fmt: skip
    return packed


def _as_it_lies(
    weight: Tensor, plan: _Plan, turned: bool = False
) -> tuple[Tensor, int, int, int, bool, bool]:
    """Return a weight, its elements along O, C and the taps, ``turned``, and if it is wide."""
    if not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
        weight = weight.detach().contiguous()
    along_o, along_c, along_row, along_column = weight.stride()
    along_tap = along_column if weight.shape[3] > 1 else along_row
    if turned:
        along_o, along_c = along_c, along_o
    return weight, along_o, along_c, along_tap, turned, DTYPE_NAMES[weight.dtype] != plan.dtype


def _bind(
    plan: _Plan,
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    scratch: Tensor,
    act: str | None,
) -> Call:
    run = functools.partial(
        loaded().conv_bn_act,
        x.data_ptr(), packed.data_ptr(), packed.nbytes,
        *map(address, (scale, shift, residual)), y.data_ptr(),
        scratch.data_ptr(), scratch.nbytes, plan.dtype, plan.algorithm, *plan.geometry,
        act == "relu",
    )  # fmt: skip
    # The call holds addresses only; these are the ones nobody else need keep.
    run.keeps = (scale, shift, packed)  # type: ignore[attr-defined]
    return run
