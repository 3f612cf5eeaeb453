"""The Hopper convolution of the extension: which kernels take a call, and which one runs it.

A kernel is a tile: so many output pixels times output channels to a block. All run 1x1 convolutions
of stride 1 too; the ``pointwise`` ones run nothing else. CUTLASS's own ``can_implement``, asked
through the extension, decides on a shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import _device, _training_kernels, native
from resnet_fused.backends._derived import derived
from resnet_fused.backends._outputs import empty_channels_last, scratch
from resnet_fused.backends._sizes import output_size
from resnet_fused.backends.native import CUDA_DTYPE_NAMES, as_vector

CAPABILITY = (9, 0)
ADVICE = (
    "pip install --no-deps nvidia-cutlass, or set CUTLASS_PATH, and build the extension again with "
    "9.0a in TORCH_CUDA_ARCH_LIST, with other installers than pip without build isolation; other "
    "backends convolve without it"
)
_DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16
#: Channels that a kernel multiplies between two waits.
_STEP = 64


class Kernel(NamedTuple):
    """One compiled tile, as the extension lists it."""

    name: str
    #: Output pixels and output channels of a block.
    tile_m: int
    tile_n: int
    #: Blocks along the pixels that fetch a tile of the weight together.
    cluster: int
    #: Whether it is for 1x1 convolutions of stride 1 alone.
    pointwise: bool


class Geometry(NamedTuple):
    """A convolution as the extension takes it, in its order."""

    n: int
    h: int
    w: int
    c: int
    o: int
    kh: int
    kw: int
    sh: int
    sw: int
    ph: int
    pw: int
    dh: int
    dw: int
    groups: int

    @staticmethod
    def of(
        x: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Geometry:
        """Return the convolution of a map (N, C, H, W) with a weight (O, C/groups, KH, KW)."""
        n, c, h, w = x.shape
        o, _, kh, kw = weight.shape
        (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
        return Geometry(n, h, w, c, o, kh, kw, sh, sw, ph, pw, dh, dw, groups)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """The output's (N, O, OH, OW)."""
        n, h, w, _, o, kh, kw, sh, sw, ph, pw, dh, dw, _ = self
        return n, o, *output_size((h, w), (kh, kw), (sh, sw), (ph, pw), (dh, dw))


def missing() -> str | None:
    """Return why the extension, which has CUDA kernels, has no convolution, or None."""
    if hasattr(native.cuda_kernels(), "conv_bn_act"):
        return None
    return "the extension was built without CUTLASS's headers, or not for sm_90a"


def declines(
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
) -> str | None:
    """Return why no kernel takes this call, or None."""
    if reason := missing():
        return f"has no convolution: {reason}"
    if x.dtype not in _DTYPES:
        return f"convolves bfloat16 and float16, x is {x.dtype}"
    if reason := _declines_capability(x.device.index):
        return reason
    geometry = Geometry.of(x, weight, stride, padding, dilation, groups)
    return _verdict(CUDA_DTYPE_NAMES[x.dtype], geometry)[1]


@functools.cache
def _declines_capability(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability == CAPABILITY:
        return None
    number = "".join(map(str, capability))
    return f"convolves on sm_90 alone; cuda:{device} is a GPU of sm_{number}"


@functools.lru_cache(maxsize=4096)
def _verdict(dtype: str, geometry: Geometry) -> tuple[tuple[Kernel, ...], str | None]:
    """Return the kernels that take a convolution, and if there are none, the first one's reason."""
    extension = native.cuda_kernels()
    reasons = {
        kernel: extension.conv_bn_act_declines(dtype, kernel.name, *geometry)
        for kernel in (Kernel(*k) for k in extension.conv_bn_act_kernels())
    }
    taking = tuple(kernel for kernel, reason in reasons.items() if reason is None)
    return taking, None if taking else next(iter(reasons.values()))


def heuristic(geometry: Geometry, kernels: Sequence[Kernel], multiprocessors: int) -> Kernel:
    """Return the kernel to use where none was measured.

    The one whose slowest multiprocessor is done first, if a step of a tile takes as long as its
    products (2048 multiply-adds a clock) or its operands (64 bytes a clock from L2, what a cluster
    shares counted once), whatever is longer. That is a guess by the device's peaks, not measured.
    Of equals, the larger tile; of those, the one of more channels, which reads less shared memory
    for a product; of those, the one for matrix products.
    """
    n, o, oh, ow = geometry.output_shape
    steps = geometry.kh * geometry.kw * math.ceil(geometry.c / _STEP)

    def clocks(kernel: Kernel) -> int:
        rows = math.ceil(n * oh * ow / (kernel.tile_m * kernel.cluster)) * kernel.cluster
        tiles = rows * math.ceil(o / kernel.tile_n)
        products = kernel.tile_m * kernel.tile_n * _STEP // 2048
        operands = (kernel.tile_m + kernel.tile_n // kernel.cluster) * _STEP * 2 // 64
        return math.ceil(tiles / multiprocessors) * steps * max(products, operands)

    def order(kernel: Kernel) -> tuple[int, int, int, bool]:
        area = kernel.tile_m * kernel.tile_n
        return clocks(kernel), -area, -kernel.tile_n, not kernel.pointwise

    return min(kernels, key=order)


def candidates(
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
) -> dict[str, Callable[..., Tensor]]:
    """Return the op with every kernel that takes the call, by the kernel's name."""
    geometry = Geometry.of(x, weight, stride, padding, dilation, groups)
    kernels, _ = _verdict(CUDA_DTYPE_NAMES[x.dtype], geometry)
    return {k.name: functools.partial(conv_bn_act, kernel=k.name) for k in kernels}


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
    kernel: str | None = None,
) -> Tensor:
    """Run the op with a kernel, by default that of :func:`heuristic`.

    The weight in the kernels' layout is kept until it changes.
    """
    geometry = Geometry.of(x, weight, stride, padding, dilation, groups)
    dtype = CUDA_DTYPE_NAMES[x.dtype]
    if kernel is None:
        taking, _ = _verdict(dtype, geometry)
        kernel = heuristic(geometry, taking, _device.multiprocessors(x.device)).name
    packed = derived((weight,), "cuda", lambda: _map(weight))
    # Kept until the kernel is in the stream; the allocator then keeps their memory for it.
    maps = [_map(x), packed, as_vector(scale), as_vector(shift), _map(residual)]
    y = empty_channels_last(geometry.output_shape, x.dtype, x.device)
    size = native.cuda_kernels().conv_bn_act_workspace_bytes(dtype, kernel, *geometry)
    workspace = scratch(size, x.device) if size else None
    addresses = [0 if t is None else t.data_ptr() for t in (*maps, y, workspace)]
    _training_kernels.run(
        x.device, "conv_bn_act", *addresses, size, dtype, kernel, *geometry, act == "relu"
    )
    return y


def _map(t: Tensor | None) -> Tensor | None:
    """Return ``t`` dense in channels_last order at an aligned address; an alias if it is."""
    if t is None:
        return None
    t = t.detach().contiguous(memory_format=torch.channels_last)
    return t.clone() if t.data_ptr() % _ALIGNMENT else t
