"""The maps and vectors of one call of a native kernel of training: checked, converted, made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math, native
from resnet_fused.backends._outputs import empty_channels_last, scratch
from resnet_fused.backends.native import ALIGNMENT, DTYPE_NAMES


class Maps:
    """The maps and vectors of one call."""

    def __init__(self, x: Tensor, *, whole: bool = False) -> None:
        """Take x's shape; ``whole``: what is read has to lie at addresses of whole accesses."""
        n, c, h, w = x.shape
        self._shape, self._dtype, self._device = x.shape, x.dtype, x.device
        #: What was converted, and scratch memory: alive until the kernel has run.
        self._kept: list[Tensor] = []
        self._alignment = ALIGNMENT if whole and x.is_cuda else 1
        self.sizes = (DTYPE_NAMES[x.dtype], n * h * w, c)

    def run(self, kernel: str, *args: Any) -> None:
        """Run a kernel, or put it on the current stream."""
        native.run(self._device, kernel, *args)

    def scratch(self, kernel: str) -> tuple[int, int]:
        """Return address and size of the scratch memory that a kernel needs."""
        kernels, _ = native.kernels_on(self._device)
        size = getattr(kernels, f"{kernel}_scratch_bytes")(*self.sizes[1:])
        self._kept.append(scratch(size, self._device))
        return self._kept[-1].data_ptr(), self._kept[-1].nbytes

    def map(self, name: str, t: Tensor | None) -> int:
        """Return the address of a map to read, 0 for None."""
        if t is None:
            return 0
        self._check(name, t)
        return self._dense(t)

    def relu_result(self, y: Tensor | None) -> tuple[int, int]:
        """Return the addresses of ReLU's result and of the bits in its place, 0 for what is not."""
        if y is None or y.dtype != torch.uint8:
            return self.map("y", y), 0
        self._check_bits(y)
        return 0, self._dense(y)

    def bits_to_write(self, t: Tensor | None) -> int:
        """Return the address of bits to write, 0 for None."""
        if t is None:
            return 0
        self._check_bits(t)
        if not t.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"bits: must be channels_last, got strides {t.stride()}")
        return t.data_ptr() or 1

    def _check_bits(self, t: Tensor) -> None:
        expected = _bn_math.bits_shape(self._shape, self._dtype)
        if expected is None:
            raise ValueError(
                f"bits: {_bn_math.NO_BITS}, got {self._dtype}, {self._shape[1]} channels"
            )
        if tuple(t.shape) != expected or t.dtype != torch.uint8 or t.device != self._device:
            raise ValueError(
                f"bits: must be {expected} of torch.uint8 on {self._device}, "
                f"got {tuple(t.shape)} of {t.dtype} on {t.device}"
            )

    def _dense(self, t: Tensor) -> int:
        if not t.is_contiguous(memory_format=torch.channels_last):
            t = t.detach().contiguous(memory_format=torch.channels_last)
            self._kept.append(t)
        if t.data_ptr() % self._alignment:
            t = t.detach().clone()
            self._kept.append(t)
        # 0 says that there is no such map; an empty one, never read, is still there.
        return t.data_ptr() or 1

    def vector(self, name: str, t: Tensor | None) -> int:
        """Return the address of a vector to read, 0 for None."""
        if t is None:
            return 0
        if t.shape != self._shape[1:2] or t.device != self._device:
            raise ValueError(
                f"{name}: must be a vector of {self._shape[1]} values on {self._device}, "
                f"got {tuple(t.shape)} on {t.device}"
            )
        if t.dtype != torch.float32 or not t.is_contiguous():
            t = t.detach().float().contiguous()
            self._kept.append(t)
        return t.data_ptr()

    def affine(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[int, ...]:
        """Return the addresses of a BatchNorm's vectors."""
        named = ("mean", mean), ("var", var), ("weight", weight), ("bias", bias)
        return tuple(self.vector(name, vector) for name, vector in named)

    def output(self, name: str, out: Tensor | None) -> Tensor:
        """Return the map to write: ``out``, checked, or a new one."""
        if out is None:
            return empty_channels_last(self._shape, self._dtype, self._device)
        self._check(name, out)
        if not out.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"{name}: must be channels_last, got strides {out.stride()}")
        return out

    def new_vectors(self, count: int) -> list[Tensor]:
        """Return vectors to write."""
        return [new_vector(self._shape[1], self._device) for _ in range(count)]

    def _check(self, name: str, t: Tensor) -> None:
        if t.shape != self._shape or t.dtype != self._dtype or t.device != self._device:
            raise ValueError(
                f"{name}: must be {tuple(self._shape)} of {self._dtype} on {self._device}, "
                f"got {tuple(t.shape)} of {t.dtype} on {t.device}"
            )


def new_vector(channels: int, device: torch.device) -> Tensor:
    """Return an empty float32 vector."""
    return torch.empty(channels, dtype=torch.float32, device=device)


def new_bits(x: Tensor, *, summed: bool, act: str | None) -> Tensor | None:
    """Return empty bits of ReLU for a map like ``x``, None where the op writes none."""
    shape = _bn_math.bits_for(x, summed, act)
    return None if shape is None else empty_channels_last(shape, torch.uint8, x.device)


def with_bits(y: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the two results of an op that writes bits, or writes none."""
    return y, _bn_math.no_bits(y) if bits is None else bits
