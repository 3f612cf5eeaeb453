"""The convolutions on torch's oneDNN: convolution, bias and add in one call.

The ops under ``torch.ops.mkldnn`` are private to torch, so this is the only file that names them,
and :func:`available` probes them once before the first use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends._derived import derived
from resnet_fused.backends._sizes import output_size

ADVICE = "Use a torch build with oneDNN (the official wheels for x86-64 and ARM have it)."

#: Packed copies kept of a weight, each for one shape of input: the one unused for longest goes.
MAX_PACKED = 4


@functools.cache
def _probe() -> str | None:
    """Run one small convolution with add and compare it with torch's own."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    try:
        x, weight, residual = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1), torch.ones(1, 2, 3, 3)
        y = _run(x, _pack(weight, None, (1, 1), (0, 0), (1, 1), 1, x.shape), None, residual,
                 (1, 1), (0, 0), (1, 1), 1)  # fmt: skip
    except (RuntimeError, AttributeError, TypeError) as error:
        return f"torch {torch.__version__} has other oneDNN ops than this package knows: {error}"
    if not torch.equal(y, torch.full_like(y, 3.0)):
        return f"torch {torch.__version__}'s oneDNN ops gave a wrong answer to the probe"
    return None


def available() -> str | None:
    """Return why oneDNN cannot be used here, or None."""
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.flags(enabled=False) is in force"
    return _probe()


@functools.cache
def computes_in(dtype: torch.dtype) -> bool:
    """Return whether oneDNN computes in ``dtype`` here; else torch's convolutions imitate it.

    Imitated ones took five to thirty times as long as in float32 on a Zen 3.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    short = "bf16" if dtype == torch.bfloat16 else "fp16"
    # Asked as the package is imported, which must not end where torch has no such op any more.
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported", None)
    return supported is not None and bool(supported())


def supports(op: str, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    """Return why oneDNN does not take this call, or None."""
    if x.device.type != "cpu":
        return f"runs on the CPU, x is on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, x is {x.dtype}"
    if not computes_in(x.dtype):
        return "this processor has no bfloat16 support in oneDNN (AVX-512 needed)"
    if x.numel() == 0:
        return "x is empty"
    _, _, *rest = args
    residual = rest.pop(0) if op == "conv_bn_act" else None
    if residual is not None and len(weight) == 1:
        return "its add fails on a single channel (torch 2.11)"
    return breaks_at(x, weight, *rest[:3])


def breaks_at(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> str | None:
    """Return why oneDNN has no right answer to a convolution that it takes, or None.

    Its process dies, or memory beyond the map is summed (torch 2.13 on an Emerald Rapids): seen
    where all rows or columns of the output lay in padding, under dilation, and in 16 bits, by AMX,
    where a stride and a kernel of several columns give one column. So torch's own too.
    """
    geometry = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    if any(_meets_padding_alone(*side) for side in geometry):
        return "some rows or columns of the output have all taps in padding, which ends the process"
    columns = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)[1]
    if x.dtype == torch.bfloat16 and columns == 1 and weight.shape[3] > 1 and stride[1] > 1:
        return "its bfloat16 is wrong where a stride leaves one column"
    return None


@functools.lru_cache(maxsize=4096)
def _meets_padding_alone(side: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    windows = (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    starts = range(-padding, windows * stride - padding, stride)
    return any(
        all(not 0 <= start + tap * dilation < side for tap in range(kernel)) for start in starts
    )


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
    """Run the op; the scale is folded into packed weights, kept until weight or scale change."""
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    packed = derived(
        (weight, scale), ("onednn", *geometry), lambda: _packer(weight, scale, geometry)
    )(tuple(x.shape))
    y = _run(x, packed, shift, residual, stride, padding, dilation, groups)
    # oneDNN's own ReLU turns NaN into 0; torch.relu keeps it.
    return torch.relu_(y) if act == "relu" else y


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
    """Run conv_bn_act, then torch's own max pool."""
    y = conv_bn_act(x, weight, scale, shift, None, stride, padding, dilation, groups, act)
    y = F.max_pool2d(y, list(pool_size), list(pool_stride), list(pool_padding))
    return y.contiguous(memory_format=torch.channels_last)


def _packer(
    weight: Tensor, scale: Tensor | None, geometry: tuple[Any, ...]
) -> Callable[[Sequence[int]], Tensor]:
    """Return a function from an input's shape to weights packed for it, of which it keeps a few."""
    # Not the tensors themselves: what is derived of a parameter must not keep it alive.
    weight, scale = weight.detach(), None if scale is None else scale.detach()
    return functools.lru_cache(maxsize=MAX_PACKED)(
        functools.partial(_pack, weight, scale, *geometry)
    )


def _pack(
    weight: Tensor,
    scale: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_shape: Sequence[int],
) -> Tensor:
    folded = weight.detach()
    if scale is not None:
        # In float32, cast last: scale alone may pass what 16 bits hold.
        folded = (folded.float() * scale.detach().float().view(-1, 1, 1, 1)).to(weight.dtype)
    folded = folded.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_weight(
        folded, list(padding), list(stride), list(dilation), groups, list(input_shape)
    )


def _run(
    x: Tensor,
    packed: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    bias = None if shift is None else shift.to(x.dtype).contiguous()
    geometry = (list(padding), list(stride), list(dilation), groups)
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *geometry, "none", [], None)
    else:
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual.contiguous(memory_format=torch.channels_last), packed, bias,
            *geometry, "add", 1.0, None, [], None,
        )  # fmt: skip
    return y.contiguous(memory_format=torch.channels_last)
