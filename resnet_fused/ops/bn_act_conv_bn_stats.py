"""bn_act_conv_bn_stats: a convolution that normalises its input as it reads it.

The activation between two convolutions of a block, relu(BN(x)), is never kept: forward and backward
make it from ``x``, the raw output of the convolution before, where they need it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops import _bn, _checks, bn_act, conv_bn_stats
from resnet_fused.ops._direct import call
from resnet_fused.ops._op import Op
from resnet_fused.ops._shared import shared
from resnet_fused.ops.conv_bn_act import check_convolution

NAME = "bn_act_conv_bn_stats"


def check(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight: Tensor,
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    check_convolution(NAME, x, weight, stride, padding, dilation, groups)
    _checks.check_weight(NAME, weight, x)
    _bn.check_statistics(NAME, mean, var, x)
    _bn.check_affine(NAME, bn_weight, bn_bias, x, "bn_")
    _bn.check_eps(NAME, eps)
    _checks.check_act(NAME, act)


def reference(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight: Tensor,
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> conv_bn_stats.Result:
    """Compute the op in plain torch; the activation is rounded to x's dtype."""
    a, _ = bn_act.reference(x, mean, var, bn_weight, bn_bias, None, eps, act)
    return conv_bn_stats.reference(a, weight, stride, padding, dilation, groups)


def decomposition(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight: Tensor,
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> conv_bn_stats.Result:
    """Run the op as two; the activation lives until the convolution has read it."""
    a, _ = call("bn_act", x, mean, var, bn_weight, bn_bias, None, eps, act)
    made: conv_bn_stats.Result = call(
        "conv_bn_stats", a, weight, stride, padding, dilation, groups
    )  # fmt: skip
    return made


def fake(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight: Tensor,
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> conv_bn_stats.Result:
    """Return an empty channels_last output and two empty vectors."""
    return conv_bn_stats.fake(x, weight, stride, padding, dilation, groups)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: conv_bn_stats.Result) -> None:
    """Save x, the vectors and weight; the activation is made again in backward."""
    x, mean, var, bn_weight, bn_bias, weight, ctx.eps, ctx.act, *ctx.geometry = inputs
    ctx.save_for_backward(x, mean, var, bn_weight, _bn.kept_bias(bn_bias), weight)
    ctx.shared = shared(mean)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Gradients of the convolution, and those of BatchNorm before it."""
    if grad is None:
        return (None,) * 12
    x, *vectors, weight = ctx.saved_tensors
    wants = ctx.needs_input_grad
    needs = (wants[0], wants[3], wants[4])
    # In the weight's own layout, or the accumulation would copy it.
    layout = (not weight.is_contiguous(), weight.dtype)
    if wants[5] and wants[0] and ctx.shared is None:
        wanted = _bn.asked_for(needs, (x, *vectors[2:]))
        *found, grad_weight = call(
            "bn_act_conv_backward", grad, weight, x, *vectors, ctx.eps, ctx.act, *ctx.geometry,
            *layout, wanted,
        )  # fmt: skip
        grads: Sequence[Tensor | None] = _bn.only(found, wanted)
    else:
        grad_weight = None
        if wants[5]:
            grad_weight = call(
                "bn_act_conv_backward_weight", grad, x, *vectors, weight.shape, ctx.eps, ctx.act,
                *ctx.geometry, *layout,
            )  # fmt: skip
        grads = _before(ctx, grad, x, vectors, weight, needs)
    return (grads[0], None, None, grads[1], grads[2], grad_weight, *(None,) * 6)


def _before(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    vectors: Sequence[Any],
    weight: Tensor,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Return the gradients of x and of BatchNorm's weight and bias, each only if it is needed."""
    if not any(needs):
        return (None,) * 3
    if ctx.shared is not None:
        grad_a = call("conv_backward_data", grad, weight, x.shape, *ctx.geometry, None)
        rest: tuple[Any, ...] = (None, ctx.eps, ctx.act, (*needs, False), ctx.shared)
        return bn_act.gradients(grad_a, x, *vectors, *rest)[:3]
    wanted = _bn.asked_for(needs, (x, *vectors[2:]))
    found = call(
        "bn_act_conv_backward_data", grad, weight, x, *vectors, ctx.eps, ctx.act, *ctx.geometry,
        wanted,
    )  # fmt: skip
    return _bn.only(found, wanted)


def flops(
    x_shape: Sequence[int],
    mean_shape: Sequence[int],
    var_shape: Sequence[int],
    bn_weight_shape: Sequence[int] | None,
    bn_bias_shape: Sequence[int] | None,
    weight_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[Any],
    **kwargs: Any,
) -> int:
    """Two per multiply-add of the convolution."""
    return conv_bn_stats.flops(x_shape, weight_shape, out_shape=out_shape)


def nbytes(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight: Tensor,
    eps: float,
    act: str | None,
    *geometry: Any,
) -> int:
    """x, the vectors and weight read once, the output and two vectors written once."""
    vectors = sum(t.nbytes for t in (mean, var, bn_weight, bn_bias) if t is not None)
    return vectors + conv_bn_stats.nbytes(x, weight, *geometry)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield over the convolutions of conv_bn_stats, with and without affine vectors and ReLU."""
    generator = torch.Generator().manual_seed(4)
    for i, (x, weight, *geometry) in enumerate(conv_bn_stats.samples(device, dtype)):
        vectors: Sequence[Tensor | None] = (None, None)
        if i % 3:
            drawn = (torch.randn(x.shape[1], generator=generator) for _ in range(2))
            vectors = [v.to(device, _checks.accumulate_dtype(dtype)) for v in drawn]
        act = "relu" if i % 4 else None
        yield x, *_bn.statistics(x), *vectors, weight, 1e-5, act, *geometry


OP = Op(
    name=NAME,
    schema=(
        "(Tensor x, Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, Tensor weight, "
        "float eps, str? act, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
        "SymInt groups) -> (Tensor, Tensor, Tensor)"
    ),
    check=check,
    reference=reference,
    decomposition=decomposition,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    autocast=("weight",),
    wide=("weight",),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
)
