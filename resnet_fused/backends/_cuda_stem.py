"""The stem of the extension's CUDA kernels: convolution, scale, shift, ReLU and pool in one pass.

It is for the stem of the paper's ImageNet networks alone: 7x7 of stride 2 over up to four channels,
then 3x3 of stride 2, in 16 bits; with the pool or without. A block walks down a band of the
output's rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from resnet_fused.backends import _device, native
from resnet_fused.backends._derived import derived
from resnet_fused.backends._outputs import empty_channels_last
from resnet_fused.backends._torch_conv import laid_out
from resnet_fused.backends.native import DTYPE_NAMES, as_map, as_vector

_DTYPES = (torch.bfloat16, torch.float16)
#: Stride, padding and dilation; size, stride and padding of the pool.
_GEOMETRY = ((2, 2), (3, 3), (1, 1))
_POOL = ((3, 3), (2, 2), (1, 1))
_KERNEL, _MOST_CHANNELS, _MOST_ELEMENTS = (7, 7), 4, 2**31
#: Columns of the convolution's map, and channels, that a block has at a time.
_COLUMNS, _CHANNELS = 112, 64
#: Blocks on a multiprocessor, as registers allow, and what one takes to begin, in rows of the map.
_TOGETHER, _BEGIN = 2, 4
BANDS = (1, 2, 4, 7, 8, 14, 28)


def declines(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
    *pool: Sequence[int],
) -> str | None:
    """Return why there is no kernel for a convolution with a pool behind it, or None."""
    if reason := declines_convolution(x, weight.shape, stride, padding, dilation, groups):
        return reason
    if tuple(map(tuple, pool)) != _POOL:
        return f"pools a stem by 3x3 of stride 2 and padding 1, got {pool}"
    return None


def declines_convolution(
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """Return why there is no kernel for a convolution, or None."""
    if x.dtype not in _DTYPES:
        return f"has a stem in bfloat16 and float16, x is {x.dtype}"
    o, c, *kernel = weight_size
    geometry = tuple(map(tuple, (stride, padding, dilation)))
    if (tuple(kernel), geometry, groups) != (_KERNEL, _GEOMETRY, 1):
        return f"has a stem of 7x7, stride 2 and padding 3, got {tuple(kernel)}, {geometry}"
    if math.prod(x.shape[1:]) >= _MOST_ELEMENTS:
        return f"has a stem for images of up to 2^31 elements, x is {tuple(x.shape)}"
    if c > _MOST_CHANNELS or o % _CHANNELS:
        return f"has a stem of up to 4 channels to a multiple of 64, got {c} to {o}"
    return None


@functools.lru_cache
def heuristic(n: int, o: int, h: int, w: int, pool: bool, processors: int) -> int:
    """Return the band for an output (N, O, H, W): the one by which the last block is done first.

    Each begins once, and with a pool computes two rows for each of the band and one more.
    """
    across = math.ceil(w / _COLUMNS)
    if pool:
        across = 1 + math.ceil(max(0, w - _COLUMNS // 2) / (_COLUMNS // 2 - 1))

    def rows(band: int) -> int:
        blocks = n * math.ceil(h / band) * across * o // _CHANNELS
        each = _BEGIN + (2 * band + 1 if pool else band)
        return math.ceil(blocks / (_TOGETHER * processors)) * each

    return min(BANDS, key=rows)


def candidates(
    run: Callable[..., Tensor], x: Tensor, *, pool: bool
) -> dict[str, Callable[..., Tensor]]:
    """Return the op with every band that is no higher than the output, by name."""
    height = math.ceil(x.shape[2] / (4 if pool else 2))
    return {
        f"band{band}": functools.partial(run, band=band)
        for band in BANDS
        if band == 1 or band <= height
    }


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
    band: int | None = None,
) -> Tensor:
    """Run the op, by default with the band of :func:`heuristic`."""
    return _run(x, weight, scale, shift, relu=act == "relu", pool=False, band=band)


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
    band: int | None = None,
) -> Tensor:
    """Run the op, by default with the band of :func:`heuristic`."""
    return _run(x, weight, scale, shift, relu=act == "relu", pool=True, band=band)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Return the convolution alone, as training wants it."""
    return _run(x, weight, None, None, relu=False, pool=False, band=None)


def backward_weight(
    grad: Tensor, x: Tensor, weight_size: Sequence[int], channels_last: bool
) -> Tensor:
    """Return the gradient of the weight of :func:`convolve`, channels_last or contiguous.

    Each block sums over bands of its own; torch adds their sums, the same way in each call.
    """
    (n, c, h, w), o, processors = x.shape, weight_size[0], _device.multiprocessors(x.device)
    rows, across = math.ceil(h / 2), math.ceil(math.ceil(w / 2) / _COLUMNS)

    def units(band: int) -> int:
        return n * math.ceil(rows / band) * across

    blocks = _TOGETHER * processors
    band = next((b for b in reversed(BANDS) if units(b) >= blocks), BANDS[0])
    parts = min(units(band), blocks)
    partial = torch.empty((parts, o, *_KERNEL, c), dtype=torch.float32, device=x.device)
    # Kept until the kernel is in the stream. An x may begin anywhere.
    maps = as_map(grad), x.detach().contiguous(memory_format=torch.channels_last)
    addresses = [t.data_ptr() for t in (*maps, partial)]
    sizes = (DTYPE_NAMES[x.dtype], n, h, w, c, o, band, parts)
    native.run(x.device, "stem_backward_weight", *addresses, *sizes)
    return laid_out(partial.sum(0).to(grad.dtype).permute(0, 3, 1, 2), channels_last)


def _run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    relu: bool,
    pool: bool,
    band: int | None,
) -> Tensor:
    (n, c, h, w), o = x.shape, weight.shape[0]
    by = 4 if pool else 2
    shape = (n, o, math.ceil(h / by), math.ceil(w / by))
    y = empty_channels_last(shape, x.dtype, x.device)
    if y.numel() == 0:
        return y
    if band is None:
        band = heuristic(*shape, pool, _device.multiprocessors(x.device))
    packed = derived((weight,), "cuda stem", lambda: pack(weight))
    # Kept until the kernel is in the stream.
    x = x.detach().contiguous(memory_format=torch.channels_last)
    vectors = as_vector(scale), as_vector(shift)
    addresses = [native.address(t) for t in (x, packed, *vectors, y)]
    dtype = DTYPE_NAMES[x.dtype]
    native.run(x.device, "stem", *addresses, dtype, n, h, w, c, o, band, relu, pool)
    return y


def pack(weight: Tensor) -> Tensor:
    """Return a weight (O, C, 7, 7) as the warps multiply it, (O / 32, 14, 4, 32, 4).

    K is (row, 8 pixels, 4 channels), zero where the weight has none, in 14 steps of 16. Of each
    step and 8 outputs a lane has one output's elements 2 i, 2 i + 1, 2 i + 8 and 2 i + 9.
    """
    o, c, rows, taps = weight.shape
    k = weight.new_zeros(o, rows, 8, _MOST_CHANNELS)
    k[:, :, :taps, :c] = weight.detach().permute(0, 2, 3, 1)
    parts = k.view(o // 32, 4, 8, 2 * rows, 2, 4, 2)
    return parts.permute(0, 3, 1, 2, 5, 4, 6).reshape(o // 32, 2 * rows, 4, 32, 4)
