"""The 1x1 convolution of Hopper: which kernels of the extension take a call, and which runs it.

A kernel is a matrix product, with more memory for what is read or with some of its own for what is
written. CUTLASS's own ``can_implement``, asked through the extension, decides on the sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import native
from resnet_fused.backends._device import multiprocessors
from resnet_fused.backends._outputs import empty_channels_last, scratch
from resnet_fused.backends._sizes import is_product
from resnet_fused.backends.native import DTYPE_NAMES, as_map, as_vector

CAPABILITY = (9, 0)
ADVICE = (
    "pip install --no-deps nvidia-cutlass, or set CUTLASS_PATH, and build the extension again with "
    "9.0a in TORCH_CUDA_ARCH_LIST, with other installers than pip without build isolation; other "
    "backends convolve without it"
)
_DTYPES = (torch.bfloat16, torch.float16)
#: Blocks of 128x128 for each multiprocessor; the smallest product measured has 2.97 on an H200.
_LEAST_BLOCKS = 2.9


class Product(NamedTuple):
    """A 1x1 convolution as the extension takes it: (pixels, c) times (c, o)."""

    pixels: int
    c: int
    o: int

    @staticmethod
    def of(x: Tensor, weight: Tensor) -> Product:
        """Return the convolution of a map (N, C, H, W) with a weight (O, C, 1, 1)."""
        n, c, h, w = x.shape
        return Product(n * h * w, c, weight.shape[0])


def missing() -> str | None:
    """Return why the extension, which has CUDA kernels, has no 1x1 convolution, or None."""
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
    if not is_product(weight.shape, stride, padding, groups):
        kernel = tuple(weight.shape[2:])
        return (
            "convolves 1x1 of stride 1 without padding or groups, beside stems; got "
            f"{kernel}, stride {tuple(stride)}, padding {tuple(padding)}, groups {groups}"
        )
    if reason := missing():
        return f"has no 1x1 convolution: {reason}"
    if x.dtype not in _DTYPES:
        return f"convolves 1x1 in bfloat16 and float16, x is {x.dtype}"
    if reason := _declines_capability(x.device.index):
        return reason
    return _verdict(DTYPE_NAMES[x.dtype], Product.of(x, weight))[1]


@functools.cache
def _declines_capability(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability == CAPABILITY:
        return None
    number = "".join(map(str, capability))
    return f"convolves 1x1 on sm_90 alone; cuda:{device} is a GPU of sm_{number}"


@functools.lru_cache(maxsize=4096)
def _verdict(dtype: str, product: Product) -> tuple[tuple[str, ...], str | None]:
    """Return the kernels that take a product, and if there are none, the first one's reason."""
    extension = native.cuda_kernels()
    reasons = {
        kernel: extension.conv_bn_act_declines(dtype, kernel, *product)
        for kernel in extension.conv_bn_act_kernels()
    }
    taking = tuple(kernel for kernel, reason in reasons.items() if reason is None)
    return taking, None if taking else next(iter(reasons.values()))


def heuristic(residual: Tensor | None) -> str:
    """Return the kernel to use where none was measured. Both take the same sizes.

    On an H200, at batch 256 in bfloat16, it was the faster of the two in all products of ResNet-50
    with something to add, by 0.4 to 8 %, and with nothing in four of the five that auto gives to
    them, by 3 to 9 %; in the fifth it took 0.4 % longer.
    """
    return "gemm" if residual is None else "gemm-add"


def beats_triton(x: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    """Return whether a kernel is faster than the tile that Triton takes where none was measured.

    On an H200 in bfloat16 it was for all products of ResNet-50 at batch 256 with something to add
    (15 to 24 %, by a kernel since replaced by a faster one) or from 512 input channels on (3 to
    23 %), and for no other. Fewer blocks were not measured; float16 is taken to be the same.
    """
    product = Product.of(x, weight)
    blocks = math.ceil(product.pixels / 128) * math.ceil(product.o / 128)
    many = blocks >= _LEAST_BLOCKS * multiprocessors(x.device)
    return many and (residual is not None or product.c >= 512)


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
    kernels, _ = _verdict(DTYPE_NAMES[x.dtype], Product.of(x, weight))
    return {kernel: functools.partial(conv_bn_act, kernel=kernel) for kernel in kernels}


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
    """Run the op with a kernel, by default that of :func:`heuristic`."""
    product = Product.of(x, weight)
    dtype = DTYPE_NAMES[x.dtype]
    if kernel is None:
        kernel = heuristic(residual)
    # Kept until the kernel is in the stream; the allocator then keeps their memory for it.
    added = None if residual is None else as_map(residual)
    kept = as_map(x), as_map(weight), as_vector(scale), as_vector(shift), added
    n, _, h, w = x.shape
    y = empty_channels_last((n, product.o, h, w), x.dtype, x.device)
    size = native.cuda_kernels().conv_bn_act_workspace_bytes(dtype, kernel, *product)
    workspace = scratch(size, x.device) if size else None
    addresses = [native.address(t) for t in (*kept, y, workspace)]
    native.run(x.device, "conv_bn_act", *addresses, size, dtype, kernel, *product, act == "relu")
    return y
