"""add_relu: the end of a residual block, relu(x + residual), as one pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops import _checks, _samples
from resnet_fused.ops._op import Op

NAME = "add_relu"


def check(x: Tensor, residual: Tensor) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    _checks.check_feature_map(NAME, x)
    _checks.check_residual(NAME, residual, x.shape, x)


def reference(x: Tensor, residual: Tensor) -> Tensor:
    """Compute the op in plain torch: the sum is rounded to x's dtype before the ReLU."""
    return _checks.channels_last(torch.relu(x + residual))


def fake(x: Tensor, residual: Tensor) -> Tensor:
    """Return an empty channels_last tensor of x's shape."""
    return _checks.empty_channels_last(x, x.shape)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the output: its sign is all that backward needs."""
    ctx.save_for_backward(output)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Pass the gradient to both where the output is positive."""
    (output,) = ctx.saved_tensors
    grad = torch.ops.aten.threshold_backward(grad, output, 0)
    need_x, need_residual = ctx.needs_input_grad
    return grad if need_x else None, grad if need_residual else None


def nbytes(x: Tensor, residual: Tensor) -> int:
    """Both read once, the output written once."""
    return 3 * x.nbytes


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield a full map, odd channels, one pixel and an empty batch."""
    draw = _samples.normal(0, device, dtype)
    for shape in ((2, 16, 5, 3), (1, 7, 3, 3), (1, 4, 1, 1), (0, 4, 3, 3)):
        x, residual = (draw(*shape) for _ in range(2))
        yield x, residual


OP = Op(
    name=NAME,
    schema="(Tensor x, Tensor residual) -> Tensor",
    check=check,
    reference=reference,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    autocast=("x", "residual"),
    nbytes=nbytes,
    samples=samples,
)
