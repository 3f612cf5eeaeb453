"""max_pool_backward: gradients back to the elements that a max pool chose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends._sizes import pool_shape
from resnet_fused.ops import _checks, _samples, bn_act_max_pool
from resnet_fused.ops._op import Op
from resnet_fused.ops.bn_act_max_pool import check_window, corners
from resnet_fused.ops.conv_bn_act_max_pool import check_pool

NAME = "max_pool_backward"


def check(
    grad: Tensor,
    index: Tensor,
    x_size: Sequence[int],
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    check_gradient(NAME, grad, index, x_size, pool_size, pool_stride, pool_padding)


def check_gradient(
    op: str, grad: Tensor, index: Tensor, x_size: Sequence[int], *pool: Sequence[int]
) -> None:
    """Check that a gradient and its places belong to a pool of ``x_size``."""
    _checks.check_feature_map(op, grad, "grad")
    check_pool(op, x_size, *pool)
    check_window(op, pool[0])
    expected = pool_shape(x_size, *pool)
    for name, tensor in (("grad", grad), ("index", index)):
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{op}: {name} must have the pool's shape {expected}, got {tuple(tensor.shape)}"
            )
    if index.dtype != torch.uint8:
        raise TypeError(f"{op}: index must be torch.uint8, got {index.dtype}")
    _checks.check_device(op, "index", index, grad)


def reference(
    grad: Tensor,
    index: Tensor,
    x_size: Sequence[int],
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Tensor:
    """Compute the op in plain torch."""
    wide = grad.new_zeros(tuple(x_size), dtype=_checks.accumulate_dtype(grad.dtype))
    if grad.numel():
        top, left = corners(grad, pool_stride, pool_padding)
        chosen = index.long()
        flat = (chosen // pool_size[1] + top) * x_size[3] + chosen % pool_size[1] + left
        wide.flatten(2).scatter_add_(2, flat.flatten(2), grad.to(wide.dtype).flatten(2))
    return _checks.channels_last(wide.to(grad.dtype))


def fake(
    grad: Tensor,
    index: Tensor,
    x_size: Sequence[int],
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Tensor:
    """Return an empty channels_last tensor of the input's shape."""
    return _checks.empty_channels_last(grad, x_size)


def nbytes(grad: Tensor, index: Tensor, x_size: Sequence[int], *pool: Any) -> int:
    """Grad and index read once, the input's gradient written once."""
    return grad.nbytes + index.nbytes + torch.Size(x_size).numel() * grad.element_size()


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield for each sample of bn_act_max_pool."""
    draw = _samples.normal(7, device, dtype)
    for args in bn_act_max_pool.samples(device, dtype):
        y, index, _ = bn_act_max_pool.reference(*args)
        grad = draw(*y.shape)
        yield grad, index, list(args[0].shape), *args[-3:]


OP = Op(
    name=NAME,
    schema=(
        "(Tensor grad, Tensor index, SymInt[] x_size, int[2] pool_size, int[2] pool_stride, "
        "int[2] pool_padding) -> Tensor"
    ),
    check=check,
    reference=reference,
    fake=fake,
    autocast=(),
    nbytes=nbytes,
    samples=samples,
)
