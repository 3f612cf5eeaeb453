"""dual_bn_act: a block's end with a projection shortcut: two BatchNorms, their sum, and ReLU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math
from resnet_fused.ops import _bn, _checks, _samples
from resnet_fused.ops._direct import call
from resnet_fused.ops._op import Op
from resnet_fused.ops._shared import shared

NAME = "dual_bn_act"


def check(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    eps: float,
    residual_eps: float,
    act: str | None,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    _checks.check_feature_map(NAME, x)
    _bn.check_statistics(NAME, mean, var, x)
    _bn.check_affine(NAME, weight, bias, x)
    _checks.check_residual(NAME, residual, x.shape, x)
    _bn.check_statistics(NAME, residual_mean, residual_var, x, "residual_")
    _bn.check_affine(NAME, residual_weight, residual_bias, x, "residual_")
    _bn.check_eps(NAME, eps)
    _bn.check_eps(NAME, residual_eps)
    _checks.check_act(NAME, act)


def reference(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    eps: float,
    residual_eps: float,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    """Compute the op in plain torch, in float32 (float64 for float64), rounded once.

    Its second result says which elements passed ReLU.
    """
    scale, shift = _bn_math.scale_shift(mean, var, weight, bias, eps)
    y = x.to(scale.dtype) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    scale, shift = _bn_math.scale_shift(
        residual_mean, residual_var, residual_weight, residual_bias, residual_eps
    )
    y = y + (residual.to(scale.dtype) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
    if act == "relu":
        y = torch.relu(y)
    y = _checks.channels_last(y.to(x.dtype))
    return y, _bn.bits_of(y, act=act)


def fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Return an empty channels_last tensor of x's shape, and empty bits."""
    return _checks.empty_channels_last(x, x.shape), _bn.empty_bits(x, act=args[-1])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save both inputs, all vectors but the biases, and what passed ReLU."""
    x, mean, var, weight, bias, *residual, residual_bias, ctx.eps, ctx.residual_eps, ctx.act = (
        inputs
    )
    ctx.shared = shared(mean)
    ctx.bias_dtypes = [None if b is None else b.dtype for b in (bias, residual_bias)]
    y = _bn.kept_result(*output) if ctx.act == "relu" else None
    ctx.save_for_backward(x, mean, var, weight, *residual, y)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
    """Gradients of both BatchNorms through their statistics; ReLU's mask is common to both."""
    if grad is None:
        return (None,) * 13
    x, mean, var, weight, r, r_mean, r_var, r_weight, y = ctx.saved_tensors
    wants = ctx.needs_input_grad
    sum_g, sum_gx, sum_gr = call(
        "dual_bn_act_backward_reduce", grad, x, mean, r, r_mean, y, ctx.act
    )
    grad_x = grad_r = None
    if wants[0] or wants[5]:
        sums, count = (sum_g, sum_gx, sum_gr), _bn.values_per_channel(x.shape)
        if ctx.shared is not None:
            sums, count = ctx.shared.means(*sums), 1
        grad_x, grad_r = call(
            "dual_bn_act_backward_apply",
            grad, x, mean, var, weight, r, r_mean, r_var, r_weight, y, *sums,
            ctx.eps, ctx.residual_eps, ctx.act, count,
        )  # fmt: skip
    grads: list[Tensor | None] = [None] * 13
    grads[0], grads[5] = grad_x, grad_r
    for place, own, sums, variance, eps in (
        (3, weight, sum_gx, var, ctx.eps),
        (8, r_weight, sum_gr, r_var, ctx.residual_eps),
    ):
        if own is not None and wants[place]:
            grads[place] = (sums * _bn_math.invstd(variance, eps)).to(own.dtype)
    for place, dtype in zip((4, 9), ctx.bias_dtypes, strict=True):
        if dtype is not None and wants[place]:
            grads[place] = sum_g.to(dtype)
    return tuple(grads)


def nbytes(x: Tensor, *args: Any) -> int:
    """Both inputs and the vectors read once, the output and its bits written once."""
    written = x.nbytes + _bn.bits_nbytes(x, act=args[-1])
    return written + sum(a.nbytes for a in (x, *args) if isinstance(a, Tensor))


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield with and without affine vectors and ReLU; odd channels, few values, none."""
    draw = _samples.normal(5, device, dtype)
    for i, shape in enumerate(((2, 16, 5, 3), (3, 7, 4, 4), (2, 4, 1, 1), (0, 4, 3, 3))):
        vector = dtype if i == 1 else _checks.accumulate_dtype(dtype)
        for act in _checks.ACTIVATIONS:
            sides = []
            for side in range(2):
                x = draw(*shape) * 2 - 1
                bare = i == 2 and side == 1
                affine = [None if bare else draw(shape[1], to=vector) for _ in range(2)]
                sides += [x, *_bn.statistics(x), *affine]
            yield (*sides, 1e-5, 1e-3, act)


OP = Op(
    name=NAME,
    schema=(
        "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor residual, "
        "Tensor residual_mean, Tensor residual_var, Tensor? residual_weight, "
        "Tensor? residual_bias, float eps, float residual_eps, str? act) -> (Tensor, Tensor)"
    ),
    check=check,
    reference=reference,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    autocast=(),
    nbytes=nbytes,
    samples=samples,
)
