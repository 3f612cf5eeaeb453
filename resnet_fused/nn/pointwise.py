"""A block's end whose convolution is 1x1, as one op that never has the convolution's output.

And its projection, whose BatchNorm nothing follows but the add.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import faster_together
from resnet_fused.backends._sizes import is_product
from resnet_fused.nn.bn import sharing_group

OP = "pointwise_bn_act"


class _OnMeta(threading.local):
    taken = False


_on_meta = _OnMeta()


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Have this thread's meta tensors take the op wherever it fits, for `tune` to see its calls."""
    _on_meta.taken = True
    try:
        yield
    finally:
        _on_meta.taken = False


def takes(
    conv: Any,
    bn: Any,
    x: Tensor,
    geometry: tuple[Any, ...],
    residual: object,
    dtype: torch.dtype,
    act: str | None,
) -> bool:
    """Return whether convolution, BatchNorm, add and act of what is like ``x`` are the one op.

    In 16 bits alone, where a covariance in float32 is as exact as the maps are; and where `tune`
    measured forward and backward to be faster so.

    Args:
        conv: a convolution.
        bn: its BatchNorm, in training.
        x: its input, or what that is made of.
        geometry: its stride, padding, dilation and groups, as numbers.
        residual: what is added; a projection has None, and no ``act``.
        dtype: of the convolution's result.
        act: behind the sum.
    """
    weight = conv.weight
    ends = type(residual) is Tensor or (residual is None and act is None)
    if not ends or dtype not in (torch.bfloat16, torch.float16):
        return False
    stride, padding, _, groups = geometry
    if not is_product(weight.shape, stride, padding, groups) or conv.bias is not None:
        return False
    if sharing_group(bn) is not None or torch.compiler.is_compiling():
        return False
    if x.is_meta:
        return _on_meta.taken
    if weight.dtype != dtype and not x.is_cpu:  # as autocast will have it, without the cast
        weight = torch.empty(weight.shape, dtype=dtype, device="meta")
    return faster_together(OP, x, weight, bn.weight, bn.bias, residual, bn.eps, act)
