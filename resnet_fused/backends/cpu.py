"""The native CPU kernels of the extension, on channels_last float32 and bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from resnet_fused.backends import _cpu_training, native
from resnet_fused.backends._derived import derived
from resnet_fused.backends._outputs import empty_channels_last, scratch
from resnet_fused.backends.native import DTYPE_NAMES, as_vector

ADVICE = "Build the extension with a C++17 compiler: pip install --no-binary :all: resnet_fused"

#: Ops that take bfloat16 on any processor with kernels.
_ANY_BF16 = ("bn_apply", "add_relu")

#: A kernel call with everything bound.
Call = Callable[[], None]


def available() -> str | None:
    """Return why the native CPU kernels cannot be used here, or None."""
    extension = native.extension()
    if extension is None:
        return f"the extension is not loaded: {native.load_error()}"
    if extension.cpu_isa() == "none":
        return "this processor has neither AVX2 nor AVX-512"
    return None


def supports(op: str, x: Tensor, *args: object) -> str | None:
    """Return why the native kernels do not take this call, or None."""
    return _declines_type(x) if op in _ANY_BF16 else declines(x)


def declines(x: Tensor) -> str | None:
    """Return why the convolutions, the max pool and the head do not take ``x``, or None."""
    reason = _declines_type(x)
    if reason is None and x.dtype == torch.bfloat16 and native.loaded().cpu_isa() != "avx512_bf16":
        return "bfloat16 needs a processor with AVX-512 BF16"
    return reason


def _declines_type(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"runs on the CPU, x is on {x.device}"
    if x.dtype not in DTYPE_NAMES:
        return f"takes float32 and bfloat16, x is {x.dtype}"
    return None


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
) -> Tensor:
    """Run the op; the packed weights are kept until the weight changes."""
    conv = Convolution(x.shape, weight, stride, padding, dilation, groups)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    y = empty_channels_last(conv.output_shape, x.dtype)
    work = scratch(conv.scratch_bytes)
    conv.bind(x, as_vector(scale), as_vector(shift), residual, y, work, act)()
    return y


def bn_apply(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str | None
) -> Tensor:
    """Run the op."""
    return _cpu_training.bn_act(x, scale, shift, residual, relu=act == "relu")


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """Run the op."""
    return _cpu_training.add_relu(x, residual)


class Convolution:
    """One convolution of one input shape: its algorithm, packed weights and scratch size."""

    def __init__(
        self,
        shape: Sequence[int],
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        n, c, h, w = shape
        self._dtype = DTYPE_NAMES[weight.dtype]
        self._geometry = (
            n, h, w, c, weight.shape[0], *weight.shape[2:], *stride, *padding, *dilation, groups,
        )  # fmt: skip
        self.algorithm, self.scratch_bytes, self.output_shape = _plan(
            self._dtype, self._geometry, torch.get_num_threads()
        )
        key = ("cpu", self.algorithm, groups)
        self._packed = derived((weight,), key, lambda: _pack(weight, groups, self.algorithm))

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
            scale: float32 vector (:func:`as_vector`) or None for ones.
            shift: float32 vector or None for zeros.
            residual: channels_last in the output's shape, or None; it may be ``y`` itself.
            y: receives the output, channels_last.
            scratch: at least ``scratch_bytes`` bytes, 64-byte aligned.
            act: None or "relu".
        """
        addresses = (0 if t is None else t.data_ptr() for t in (scale, shift, residual))
        run = functools.partial(
            native.loaded().conv_bn_act,
            x.data_ptr(), self._packed.data_ptr(), *addresses, y.data_ptr(), scratch.data_ptr(),
            scratch.nbytes, self._dtype, self.algorithm, *self._geometry,
            act == "relu",
        )  # fmt: skip
        # The call holds addresses only; these two are the ones nobody else need keep.
        run.keeps = (scale, shift, self._packed)  # type: ignore[attr-defined]
        return run


def bind_max_pool(x: Tensor, y: Tensor, kernel: int, stride: int, padding: int) -> Call:
    """Return a call that pools ``x`` into ``y``, both channels_last and kept by the caller."""
    n, c, h, w = x.shape
    run: Call = functools.partial(
        native.loaded().max_pool, x.data_ptr(), y.data_ptr(), DTYPE_NAMES[x.dtype],
        n, h, w, c, kernel, stride, padding,
    )  # fmt: skip
    return run


def bind_head(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, scratch: Tensor) -> Call:
    """Return a call of global average pool and linear layer; the caller keeps all but weight alive.

    Args:
        x: (N, C, H, W), channels_last.
        weight: (K, C), contiguous, x's dtype.
        bias: (K,) or None, x's dtype.
        y: receives (N, K).
        scratch: at least 4 · N · C bytes.
    """
    n, c, h, w = x.shape
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    run = functools.partial(
        native.loaded().head, x.data_ptr(), weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), scratch.data_ptr(), scratch.nbytes,
        DTYPE_NAMES[x.dtype], n, h * w, c, len(weight),
    )  # fmt: skip
    run.keeps = (weight, bias)  # type: ignore[attr-defined]
    return run


@functools.lru_cache(maxsize=4096)
def _plan(
    dtype: str, geometry: tuple[int, ...], threads: int
) -> tuple[str, int, tuple[int, int, int, int]]:
    """Return algorithm, scratch size and output shape for one geometry."""
    extension = native.loaded()
    algorithm = extension.conv_bn_act_algorithms(dtype, *geometry)[0]
    scratch = extension.conv_bn_act_scratch_bytes(dtype, algorithm, *geometry, threads)
    n, h, w, _, o, kh, kw, sh, sw, ph, pw, dh, dw, _ = geometry
    oh = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    ow = (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    return algorithm, scratch, (n, o, oh, ow)


def _pack(weight: Tensor, groups: int, algorithm: str) -> Tensor:
    extension = native.loaded()
    dtype, (o, c, kh, kw) = DTYPE_NAMES[weight.dtype], weight.shape
    layout = (dtype, algorithm, o, c, kh, kw, groups)
    packed = torch.empty(extension.conv_bn_act_packed_bytes(*layout), dtype=torch.uint8)
    source = weight.detach().contiguous()
    extension.conv_bn_act_pack(source.data_ptr(), packed.data_ptr(), *layout)
    return packed
