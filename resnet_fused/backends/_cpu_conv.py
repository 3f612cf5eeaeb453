"""Native convolutions: the algorithm, packed weights and scratch memory of one input shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import onednn
from resnet_fused.backends._derived import derived
from resnet_fused.backends._sizes import output_size
from resnet_fused.backends.native import DTYPE_NAMES, address, loaded

#: A kernel call with everything bound.
Call = Callable[[], None]


def multiplies_tiles(dtype: torch.dtype) -> bool:
    """Return whether convolutions in ``dtype`` run on AMX here."""
    return dtype == torch.bfloat16 and bool(loaded().cpu_isa() == "amx_bf16")


def multiplies_pairs(dtype: torch.dtype) -> bool:
    """Return whether this processor has dot products of pairs in ``dtype``, or more than these.

    Without them a convolution in 16 bits multiplies float32.
    """
    return dtype == torch.bfloat16 and loaded().cpu_isa() in ("avx512_bf16", "amx_bf16")


def left_to_torch(dtype: torch.dtype) -> bool:
    """Return whether convolutions are torch's own unless `tune` measured ours to be faster.

    Where oneDNN computes in float16, by AVX-512 FP16 or AMX, these kernels, which multiply float32,
    have not been measured beside it.
    """
    return dtype == torch.float16 and onednn.computes_in(dtype)


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
        self._plan = plan_for(shape, weight.shape, weight.dtype, stride, padding, dilation, groups)
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


class Plan(NamedTuple):
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


def plan_for(
    shape: Sequence[int],
    weight_shape: Sequence[int],
    dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    algorithm: str | None = None,
    once: tuple[bool, bool] | None = None,
) -> Plan:
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
) -> Plan:
    """Return the plan; ``once``: whether the input is normalised, and moments are wanted."""
    extension = loaded()
    n, h, w, c, o, kh, kw, sh, sw, ph, pw, dh, dw, groups = geometry
    algorithm = algorithm or extension.conv_bn_act_algorithms(dtype, *geometry)[0]
    layout = (o, c // groups, kh, kw, groups)
    call = (dtype, algorithm, *geometry, threads)
    return Plan(
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


def _pack(weight: Tensor, plan: Plan) -> Tensor:
    packed = torch.empty(plan.packed_bytes, dtype=torch.uint8)
    weight = dense(weight)
    loaded().conv_bn_act_pack(
        weight.data_ptr(), packed.data_ptr(), packed.nbytes, plan.dtype, plan.algorithm,
        *plan.layout, *layout_of(weight, plan, False),
    )  # fmt: skip
    return packed


def is_dense(weight: Tensor) -> bool:
    """Return whether kernels read a weight as it lies: contiguous or channels_last."""
    return weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)


def dense(weight: Tensor) -> Tensor:
    """Return a weight as kernels read it."""
    return weight if is_dense(weight) else weight.detach().contiguous()


def layout_of(weight: Tensor, plan: Plan, turned: bool) -> tuple[int, int, int, bool, bool]:
    """Return a weight's elements along O, C and the taps, ``turned``, and if it is wide."""
    along_o, along_c, along_row, along_column = weight.stride()
    along_tap = along_column if weight.shape[3] > 1 else along_row
    if turned:
        along_o, along_c = along_c, along_o
    return along_o, along_c, along_tap, turned, DTYPE_NAMES[weight.dtype] != plan.dtype


def _bind(
    plan: Plan,
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
