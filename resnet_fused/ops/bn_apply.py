"""bn_apply: normalisation with given statistics, residual add and ReLU as one pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops import _checks, _samples
from resnet_fused.ops._op import Op

NAME = "bn_apply"


def check(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str | None
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    _checks.check_feature_map(NAME, x)
    _checks.check_channels(NAME, "scale", scale, x.shape[1], x)
    _checks.check_channels(NAME, "shift", shift, x.shape[1], x)
    _checks.check_residual(NAME, residual, x.shape, x)
    _checks.check_act(NAME, act)


def reference(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str | None
) -> Tensor:
    """Compute the op in plain torch, in float32 (float64 for float64)."""
    y = x.to(_checks.accumulate_dtype(x.dtype)) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    if residual is not None:
        y = y + residual
    if act == "relu":
        y = torch.relu(y)
    return _checks.channels_last(y.to(x.dtype))


def fake(x: Tensor, *_: Any) -> Tensor:
    """Return an empty channels_last tensor of x's shape."""
    return _checks.empty_channels_last(x, x.shape)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save x, the vectors, and the output where ReLU needs its sign."""
    x, scale, shift, _, act = inputs
    ctx.save_for_backward(x, scale, shift, output if act == "relu" else None)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With g behind the ReLU: grad_x = g · scale, grad_scale = Σ g · x, grad_shift = Σ g."""
    x, scale, shift, output = ctx.saved_tensors
    need_x, need_scale, need_shift, need_residual, _ = ctx.needs_input_grad
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    wide = _checks.accumulate_dtype(x.dtype)
    grad_x = (grad * scale.view(-1, 1, 1)).to(x.dtype) if need_x else None
    grad_scale = (grad.to(wide) * x).sum((0, 2, 3)).to(scale.dtype) if need_scale else None
    grad_shift = grad.sum((0, 2, 3), dtype=wide).to(shift.dtype) if need_shift else None
    return grad_x, grad_scale, grad_shift, grad if need_residual else None, None


def nbytes(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str | None
) -> int:
    """x, the vectors and the residual read once, the output written once."""
    read = sum(t.nbytes for t in (x, scale, shift, residual) if t is not None)
    return read + x.nbytes


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield arguments with and without residual and ReLU, an empty batch and one pixel."""
    draw = _samples.normal(0, device, dtype)
    for shape in ((2, 16, 5, 3), (1, 7, 1, 1), (0, 4, 3, 3)):
        for act in _checks.ACTIVATIONS:
            for vectors in dict.fromkeys((dtype, _checks.accumulate_dtype(dtype))):
                scale, shift = draw(shape[1], to=vectors), draw(shape[1], to=vectors)
                yield draw(*shape), scale, shift, None, act
                yield draw(*shape), scale, shift, draw(*shape), act


OP = Op(
    name=NAME,
    schema="(Tensor x, Tensor scale, Tensor shift, Tensor? residual, str? act) -> Tensor",
    check=check,
    reference=reference,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    autocast=("x", "residual"),
    nbytes=nbytes,
    samples=samples,
)
