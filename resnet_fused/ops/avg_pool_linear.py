"""avg_pool_linear: the head of a ResNet, global average pool and classifier as one op."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.ops import _checks, _samples
from resnet_fused.ops._op import Op

NAME = "avg_pool_linear"


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    _checks.check_feature_map(NAME, x)
    c, h, w = x.shape[1:]
    if h < 1 or w < 1:
        raise ValueError(f"{NAME}: x must have at least one pixel to average, got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != c or min(weight.shape) < 1:
        raise ValueError(
            f"{NAME}: weight must have shape (K, {c}), one row per class and one column per "
            f"channel of x, got {tuple(weight.shape)}"
        )
    _checks.check_same(NAME, "weight", weight, x)
    if bias is None:
        return
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{NAME}: bias must have shape ({weight.shape[0]},), one value per class, "
            f"got {tuple(bias.shape)}"
        )
    _checks.check_same(NAME, "bias", bias, x)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the op in plain torch: the mean is rounded to x's dtype before the product."""
    return F.linear(x.mean((2, 3)), weight, bias)


def fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return an empty (N, K) tensor."""
    return x.new_empty(x.shape[0], weight.shape[0])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save x and weight: the block before has x saved already."""
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad_x = grad · W / (H · W) at every pixel, grad_weight = gradᵀ · mean(x), grad_bias = Σ."""
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    grad_x = grad_weight = grad_bias = None
    with _checks.without_autocast(x):
        if need_x:
            n, c, h, w = x.shape
            grad_x = (grad.mm(weight) / (h * w)).view(n, c, 1, 1).expand(n, c, h, w)
        if need_weight:
            grad_weight = grad.t().mm(x.mean((2, 3)))
    if need_bias:
        grad_bias = grad.sum(0)
    return grad_x, grad_weight, grad_bias


def flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    """Two per multiply-add of the linear layer, 2 · N · K · C; the mean costs none."""
    n, k = out_shape
    return 2 * n * k * weight_shape[1]


def nbytes(x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """x, weight and bias read once, the result written once."""
    read = sum(t.nbytes for t in (x, weight, bias) if t is not None)
    return read + x.shape[0] * weight.shape[0] * x.element_size()


#: (N, C, H, W) and K: each line one branch of a kernel.
GEOMETRIES = (
    ((2, 16, 7, 7), 10),
    ((5, 7, 3, 2), 6),  # odd channels, a rest of images and of classes
    ((1, 70, 1, 1), 3),  # one pixel
    ((4, 8, 5, 5), 1),  # one class
    ((0, 4, 3, 3), 5),  # empty batch
)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield arguments over :data:`GEOMETRIES`, with and without bias."""
    draw = _samples.normal(0, device, dtype)
    for shape, k in GEOMETRIES:
        weight = draw(k, shape[1])
        yield draw(*shape), weight, draw(k)
        yield draw(*shape), weight, None


OP = Op(
    name=NAME,
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    check=check,
    reference=reference,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    autocast=("x", "weight", "bias"),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
)
