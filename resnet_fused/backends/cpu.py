"""The native CPU kernels of the extension, on channels_last float32 and bfloat16."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import native
from resnet_fused.backends._derived import derived
from resnet_fused.backends._outputs import empty_channels_last

ADVICE = "Build the extension with a C++17 compiler: pip install --no-binary :all: resnet_fused"

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
#: Window and stride of the native max pool, in pixels.
_LARGEST_POOL = 4096


#: A kernel call with everything bound.
Call = Callable[[], None]


def _extension() -> ModuleType:
    extension = native.extension()
    assert extension is not None, "available() is asked before"
    return extension


def available() -> str | None:
    """Return why the native CPU kernels cannot be used here, or None."""
    extension = native.extension()
    if extension is None:
        return f"the extension is not loaded: {native.load_error()}"
    if extension.cpu_isa() == "none":
        return "this processor has neither AVX2 nor AVX-512"
    return None


def supports(op: str, x: Tensor, *args: Any) -> str | None:
    """Return why the native kernels do not take this call, or None."""
    reason = declines(x)
    if reason is None and op == "conv_bn_act_max_pool":
        return _declines_pool(*args[-3:])
    return reason


def _declines_pool(*pool: Any) -> str | None:
    names = ("pool_size", "pool_stride", "pool_padding")
    for name, (first, second) in zip(names, pool, strict=True):
        if first != second:
            return f"pools with one {name} for both directions, got {(first, second)}"
        if first > _LARGEST_POOL:
            return f"pools with {name} of at most {_LARGEST_POOL}, got {first}"
    return None


def declines(x: Tensor) -> str | None:
    """Return why no native kernel takes ``x``, or None."""
    if x.device.type != "cpu":
        return f"runs on the CPU, x is on {x.device}"
    if x.dtype not in _NAMES:
        return f"takes float32 and bfloat16, x is {x.dtype}"
    if x.dtype == torch.bfloat16 and _extension().cpu_isa() != "avx512_bf16":
        return "bfloat16 needs a processor with AVX-512 BF16"
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
    scratch = _scratch(conv.scratch_bytes)
    conv.bind(x, as_vector(scale), as_vector(shift), residual, y, scratch, act)()
    return y


def conv_bn_act_max_pool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Tensor:
    """Run the op as two kernels; the map between them lives in memory that is used again."""
    y = conv_bn_act(x, weight, scale, shift, None, stride, padding, dilation, groups, act)
    (size, _), (step, _), (pad, _) = pool_size, pool_stride, pool_padding
    n, o, *spatial = y.shape
    shape = (n, o, *((length + 2 * pad - size) // step + 1 for length in spatial))
    pooled = empty_channels_last(shape, y.dtype)
    bind_max_pool(y, pooled, size, step, pad)()
    return pooled


def avg_pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run the op; the means stay in float32."""
    x = x.contiguous(memory_format=torch.channels_last)
    n, c = x.shape[:2]
    y = torch.empty(n, len(weight), dtype=x.dtype)
    bind_head(x, weight, bias, y, _scratch(4 * n * c))()
    return y


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
        self._dtype = _NAMES[weight.dtype]
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
            _extension().conv_bn_act,
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
        _extension().max_pool, x.data_ptr(), y.data_ptr(), _NAMES[x.dtype],
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
        _extension().head, x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
        y.data_ptr(), scratch.data_ptr(), scratch.nbytes, _NAMES[x.dtype], n, h * w, c, len(weight),
    )  # fmt: skip
    run.keeps = (weight, bias)  # type: ignore[attr-defined]
    return run


def as_vector(vector: Tensor | None) -> Tensor | None:
    """Return a scale or shift as the kernels read it: float32, contiguous."""
    return None if vector is None else vector.detach().float().contiguous()


@functools.lru_cache(maxsize=4096)
def _plan(
    dtype: str, geometry: tuple[int, ...], threads: int
) -> tuple[str, int, tuple[int, int, int, int]]:
    """Return algorithm, scratch size and output shape for one geometry."""
    extension = _extension()
    algorithm = extension.conv_bn_act_algorithms(dtype, *geometry)[0]
    scratch = extension.conv_bn_act_scratch_bytes(dtype, algorithm, *geometry, threads)
    n, h, w, _, o, kh, kw, sh, sw, ph, pw, dh, dw, _ = geometry
    oh = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    ow = (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    return algorithm, scratch, (n, o, oh, ow)


def _pack(weight: Tensor, groups: int, algorithm: str) -> Tensor:
    extension = _extension()
    dtype, (o, c, kh, kw) = _NAMES[weight.dtype], weight.shape
    layout = (dtype, algorithm, o, c, kh, kw, groups)
    packed = torch.empty(extension.conv_bn_act_packed_bytes(*layout), dtype=torch.uint8)
    source = weight.detach().contiguous()
    extension.conv_bn_act_pack(source.data_ptr(), packed.data_ptr(), *layout)
    return packed


_local = threading.local()


def _scratch(size: int) -> Tensor:
    """Return this thread's scratch memory, kept: touching fresh pages is slow."""
    kept: Tensor | None = getattr(_local, "scratch", None)
    if kept is None or kept.nbytes < size:
        kept = torch.empty(size, dtype=torch.uint8)
        _local.scratch = kept
    return kept
