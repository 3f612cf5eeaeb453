"""conv_bn_stats: a convolution that also gives its output's mean and variance per channel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends._sizes import output_shape
from resnet_fused.ops import _bn, _checks, _past_relu, _samples
from resnet_fused.ops._direct import call
from resnet_fused.ops._op import Op
from resnet_fused.ops.conv_bn_act import GEOMETRIES, check_convolution, pair
from resnet_fused.ops.conv_bn_act import flops as convolution_flops

NAME = "conv_bn_stats"
Result = tuple[Tensor, Tensor, Tensor]


def check(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    check_convolution(NAME, x, weight, stride, padding, dilation, groups)
    _checks.check_weight(NAME, weight, x)


def reference(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Result:
    """Compute the op in plain torch; the statistics are those of the rounded output.

    A wide weight is rounded to x's dtype, as autocast would.
    """
    y = F.conv2d(x, weight.to(x.dtype), None, list(stride), list(padding), list(dilation), groups)
    y = _checks.channels_last(y)
    return y, *_bn.statistics(y)


def fake(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Result:
    """Return an empty channels_last output and two empty vectors."""
    shape = output_shape(x.shape, weight.shape, stride, padding, dilation)
    y = _checks.empty_channels_last(x, shape)
    return y, _bn.vector_like(y), _bn.vector_like(y)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    """Save x and weight. The statistics carry no gradient: what normalises with them adds it."""
    x, weight, *geometry = inputs
    ctx.save_for_backward(x, weight)
    ctx.geometry, ctx.past_relu = geometry, _past_relu.wanted(x)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(
    ctx: Any, grad: Tensor | None, mean: None, var: None, others: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Gradients of the convolution, each only if it is wanted; ``others`` is added to x's."""
    if grad is None:
        return others, *(None,) * 5
    x, weight = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    grad_x = grad_weight = None
    if need_x:
        grad_x = _of_input(ctx, grad, weight, x, others)
    if need_weight:
        # In the weight's own layout, or the accumulation would copy it.
        channels_last = not weight.is_contiguous()
        grad_weight = call(
            "conv_backward_weight", grad, x, weight.shape, *ctx.geometry, channels_last,
            weight.dtype,
        )  # fmt: skip
    return grad_x, grad_weight, None, None, None, None


def _of_input(ctx: Any, grad: Tensor, weight: Tensor, x: Tensor, others: Tensor | None) -> Tensor:
    """Return x's gradient, past the ReLU that x comes from if that is wanted."""
    token = ctx.past_relu
    if token is None or not _past_relu.may_pass(ctx, x, token, weight=1):
        made: Tensor = call("conv_backward_data", grad, weight, x.shape, *ctx.geometry, others)
        return made
    g: Tensor
    g, sums = call("relu_conv_backward_data", grad, weight, x, *ctx.geometry, others)
    _past_relu.leave(g, token, sums)
    return g


def flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[Any],
    **kwargs: Any,
) -> int:
    """Two per multiply-add of the convolution."""
    return convolution_flops(x_shape, weight_shape, out_shape=out_shape[0])


def nbytes(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> int:
    """X and weight read once, the output and two vectors written once."""
    shape = output_shape(x.shape, weight.shape, stride, padding, dilation)
    written = torch.Size(shape).numel() * x.element_size()
    return x.nbytes + weight.nbytes + written + 2 * 4 * shape[1]


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield arguments over the geometries of conv_bn_act that leave more than one value."""
    draw = _samples.normal(0, device, dtype)
    wide = _checks.accumulate_dtype(dtype)
    for i, (shape, o, k, s, p, d, groups) in enumerate(GEOMETRIES):
        if shape[0] * shape[2] * shape[3] > 1:
            kernel, stride, padding, dilation = map(pair, (k, s, p, d))
            weight = draw(o, shape[1] // groups, *kernel)
            weight = weight.to(wide) if i % 3 == 1 else weight
            yield draw(*shape), weight, stride, padding, dilation, groups


OP = Op(
    name=NAME,
    schema=(
        "(Tensor x, Tensor weight, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
        "SymInt groups) -> (Tensor, Tensor, Tensor)"
    ),
    check=check,
    reference=reference,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    autocast=("x", "weight"),
    wide=("weight",),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
    hands_on=True,
)
