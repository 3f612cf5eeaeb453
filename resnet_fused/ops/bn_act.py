"""bn_act: BatchNorm by the batch's own statistics, residual add and ReLU as one pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math
from resnet_fused.ops import _bn, _checks, _samples
from resnet_fused.ops._direct import call
from resnet_fused.ops._op import Op
from resnet_fused.ops._shared import Shared, shared

NAME = "bn_act"


def check(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    _checks.check_feature_map(NAME, x)
    _bn.check_statistics(NAME, mean, var, x)
    _bn.check_affine(NAME, weight, bias, x)
    _checks.check_residual(NAME, residual, x.shape, x)
    _bn.check_eps(NAME, eps)
    _checks.check_act(NAME, act)


def reference(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    """Compute the op in plain torch, in float32 (float64 for float64), rounded once.

    Its second result says which elements passed ReLU, where a residual decided too.
    """
    scale, shift = _bn_math.scale_shift(mean, var, weight, bias, eps)
    y = x.to(scale.dtype) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    if residual is not None:
        y = y + residual
    if act == "relu":
        y = torch.relu(y)
    y = _checks.channels_last(y.to(x.dtype))
    return y, _bn.bits_of(y, summed=residual is not None, act=act)


def fake(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    """Return an empty channels_last tensor of x's shape, and empty bits."""
    bits = _bn.empty_bits(x, summed=residual is not None, act=act)
    return _checks.empty_channels_last(x, x.shape), bits


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save x, the vectors, and for ReLU's mask bias, or what passed if a residual decided too."""
    x, mean, var, weight, bias, residual, eps, act = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    kept_bias = _bn.kept_bias(bias) if act == "relu" and residual is None else None
    kept = _bn.kept_result(*output) if act == "relu" and residual is not None else None
    ctx.save_for_backward(x, mean, var, weight, kept_bias, kept)
    ctx.eps, ctx.act, ctx.shared = eps, act, shared(mean)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
    """Gradients through the statistics too, as mean and var are x's own."""
    if grad is None:
        return (None,) * 8
    x, mean, var, weight, bias, y = ctx.saved_tensors
    if ctx.bias_dtype is not None and bias is None:
        bias = mean  # says that there is one; its values are not read
    wants = ctx.needs_input_grad
    needs = (wants[0], wants[3], wants[4], wants[5])
    *grads, grad_residual = gradients(
        grad, x, mean, var, weight, bias, y, ctx.eps, ctx.act, needs, ctx.shared
    )
    grad_x, grad_weight, grad_bias = grads
    if grad_bias is not None:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x, None, None, grad_weight, grad_bias, grad_residual, None, None


def gradients(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    eps: float,
    act: str | None,
    needs: Sequence[bool],
    batch: Shared | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and residual, each only if it is needed.

    Where ``batch`` is shared, x's gradient needs all of its sums; the others are this process's.
    """
    wanted = (
        needs[0],
        needs[1] and weight is not None,
        needs[2] and bias is not None,
        needs[3] and act is not None,
    )
    saved = (x, mean, var, weight, bias, y, eps, act)
    if batch is None:
        *found, _ = call("bn_act_backward", grad, *saved, (*wanted, False))
    else:
        reduce = functools.partial(call, "bn_act_backward_reduce")
        apply = functools.partial(call, "bn_act_backward_apply")
        found = _bn_math.gradients(reduce, apply, grad, *saved, wanted, batch.means)
    *grads, masked = _bn.only(found, wanted)
    # Without ReLU the residual's gradient is the output's.
    return *grads, grad if needs[3] and act is None else masked


def nbytes(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> int:
    """x, the vectors and the residual read once, the output and its bits written once."""
    read = sum(t.nbytes for t in (x, mean, var, weight, bias, residual) if t is not None)
    return read + x.nbytes + _bn.bits_nbytes(x, summed=residual is not None, act=act)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield with and without affine vectors, residual and ReLU; odd channels, few values."""
    draw = _samples.normal(0, device, dtype)
    for i, shape in enumerate(((2, 16, 5, 3), (3, 7, 4, 4), (2, 4, 1, 1), (0, 4, 3, 3))):
        for act in _checks.ACTIVATIONS:
            x = draw(*shape) * 2 + 1
            vector = dtype if i == 1 else _checks.accumulate_dtype(dtype)
            affine = [None if i == 2 else draw(shape[1], to=vector) for _ in range(2)]
            statistics = _bn.statistics(x)
            yield x, *statistics, *affine, None, 1e-5, act
            yield x, *statistics, *affine, draw(*shape), 1e-3, act


OP = Op(
    name=NAME,
    schema=(
        "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, "
        "float eps, str? act) -> (Tensor, Tensor)"
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
