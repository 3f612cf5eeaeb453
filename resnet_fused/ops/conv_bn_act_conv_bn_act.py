"""conv_bn_act_conv_bn_act: a convolution and the 1x1 behind it, the end of a bottleneck."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _sizes
from resnet_fused.ops import _checks, _samples, conv_bn_act
from resnet_fused.ops._op import Op

NAME = "conv_bn_act_conv_bn_act"
#: Stride, padding, dilation and groups of the second convolution.
POINTWISE = ((1, 1), (0, 0), (1, 1), 1)


def output_shape(
    x: Sequence[int],
    weight: Sequence[int],
    weight2: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Return (N, O, OH, OW): the first convolution's pixels, the second one's channels."""
    n, _, oh, ow = _sizes.output_shape(x, weight, stride, padding, dilation)
    return n, weight2[0], oh, ow


def check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight2: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str | None,
    act2: str | None,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    between = conv_bn_act.check_convolution(NAME, x, weight, stride, padding, dilation, 1)
    _checks.check_same(NAME, "weight", weight, x)
    _checks.check_channels(NAME, "scale", scale, between[1], x)
    _checks.check_channels(NAME, "shift", shift, between[1], x)
    if tuple(weight2.shape[1:]) != (between[1], 1, 1) or not weight2.numel():
        raise ValueError(
            f"{NAME}: weight2 must have shape (O, {between[1]}, 1, 1), a pointwise convolution of "
            f"weight's {between[1]} output channels, got {tuple(weight2.shape)}"
        )
    _checks.check_same(NAME, "weight2", weight2, x)
    shape = output_shape(x.shape, weight.shape, weight2.shape, stride, padding, dilation)
    _checks.check_channels(NAME, "scale2", scale2, shape[1], x)
    _checks.check_channels(NAME, "shift2", shift2, shape[1], x)
    _checks.check_residual(NAME, residual, shape, x)
    _checks.check_act(NAME, act)
    _checks.check_act(NAME, act2, "act2")


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight2: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str | None,
    act2: str | None,
) -> Tensor:
    """Compute the op in plain torch; the map between the two is rounded to x's dtype."""
    y = conv_bn_act.reference(x, weight, scale, shift, None, stride, padding, dilation, 1, act)
    return conv_bn_act.reference(y, weight2, scale2, shift2, residual, *POINTWISE, act2)


def decomposition(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight2: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str | None,
    act2: str | None,
) -> Tensor:
    """Run the two convolutions one after the other, each on the backend of its choice."""
    run = torch.ops.resnet_fused.conv_bn_act
    y = run(x, weight, scale, shift, None, stride, padding, dilation, 1, act)
    out: Tensor = run(y, weight2, scale2, shift2, residual, *POINTWISE, act2)
    return out


def fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight2: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str | None,
    act2: str | None,
) -> Tensor:
    """Return an empty channels_last tensor of the output's shape."""
    geometry = (stride, padding, dilation)
    shape = output_shape(x.shape, weight.shape, weight2.shape, *geometry)
    return _checks.empty_channels_last(x, shape)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what goes in, and the output where ReLU needs its sign; not the map between."""
    x, weight, scale, shift, weight2, scale2, shift2, _, stride, padding, dilation, *acts = inputs
    ctx.act, act2 = acts
    saved = (x, weight, scale, shift, weight2, scale2, shift2)
    ctx.save_for_backward(*saved, output if act2 == "relu" else None)
    ctx.geometry = (list(stride), list(padding), list(dilation), 1)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of conv_bn_act twice; the map between the two is computed again."""
    x, weight, scale, shift, weight2, scale2, shift2, output = ctx.saved_tensors
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    need_first, need_second = ctx.needs_input_grad[:4], ctx.needs_input_grad[4:7]
    with _checks.without_autocast(x):
        y = torch.ops.resnet_fused.conv_bn_act(
            x, weight, scale, shift, None, *ctx.geometry, ctx.act
        )
    grad_y, *second = conv_bn_act.convolution_gradients(
        grad, y, weight2, scale2, shift2, POINTWISE, (any(need_first), *need_second)
    )
    first: tuple[Tensor | None, ...] = (None,) * 4
    if grad_y is not None:
        if ctx.act == "relu":
            grad_y = torch.ops.aten.threshold_backward(grad_y, y, 0)
        first = conv_bn_act.convolution_gradients(
            grad_y, x, weight, scale, shift, ctx.geometry, need_first
        )
    return (*first, *second, grad if ctx.needs_input_grad[7] else None, *[None] * 5)


def flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    scale_shape: Sequence[int] | None,
    shift_shape: Sequence[int] | None,
    weight2_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    """Those of both convolutions, two per multiply-add."""
    n, _, oh, ow = out_shape
    between = (n, weight_shape[0], oh, ow)
    first = conv_bn_act.flops(x_shape, weight_shape, out_shape=between)
    return first + conv_bn_act.flops(between, weight2_shape, out_shape=out_shape)


def nbytes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight2: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str | None,
    act2: str | None,
) -> int:
    """Inputs read once, the output written once; the map between the two never is."""
    n, o, oh, ow = output_shape(x.shape, weight.shape, weight2.shape, stride, padding, dilation)
    tensors = (x, weight, scale, shift, weight2, scale2, shift2, residual)
    read = sum(t.nbytes for t in tensors if t is not None)
    return read + n * o * oh * ow * x.element_size()


#: (N, C, H, W), channels between, O, kernel, stride, padding, dilation: each line one branch.
_Pair = int | tuple[int, int]
GEOMETRIES: tuple[tuple[tuple[int, ...], int, int, _Pair, _Pair, _Pair, _Pair], ...] = (
    ((2, 16, 6, 5), 16, 64, 3, 1, 1, 1),  # a bottleneck's
    ((2, 16, 9, 7), 32, 40, 3, 2, 1, 1),  # strided, odd map
    ((1, 20, 5, 6), 24, 9, 3, 1, 2, 2),  # channels of no whole tile, dilation
    ((1, 5, 7, 6), 7, 10, 3, 1, 1, 1),  # few channels
    ((1, 16, 5, 6), 8, 12, (3, 1), (1, 2), (1, 0), 1),  # rectangular
    ((1, 16, 1, 1), 16, 16, 3, 1, 1, 1),  # one pixel
    ((0, 16, 5, 5), 16, 16, 3, 1, 1, 1),  # empty batch
)
_ACTS = (("relu", "relu"), (None, "relu"), (None, None), ("relu", None))


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield arguments over :data:`GEOMETRIES`; each optional one is left out of two of them."""
    draw = _samples.normal(0, device, dtype)
    for i, (shape, between, o, k, s, p, d) in enumerate(GEOMETRIES):
        kernel, stride, padding, dilation = map(conv_bn_act.pair, (k, s, p, d))
        weight, weight2 = draw(between, shape[1], *kernel), draw(o, between, 1, 1)
        out = output_shape(shape, weight.shape, weight2.shape, stride, padding, dilation)
        wide = dtype if i % 3 == 1 else _checks.accumulate_dtype(dtype)
        scale = draw(between, to=wide) if i not in (2, 3) else None
        shift = draw(between, to=wide) if i not in (2, 4) else None
        scale2 = draw(o, to=wide) if i not in (2, 5) else None
        shift2 = draw(o, to=wide) if i not in (2, 3) else None
        residual = draw(*out) if i not in (2, 4) else None
        vectors = (scale, shift, weight2, scale2, shift2)
        for acts in _ACTS if i == 0 else _ACTS[i % 4 :][:1]:
            yield draw(*shape), weight, *vectors, residual, stride, padding, dilation, *acts


OP = Op(
    name=NAME,
    schema=(
        "(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, "
        "Tensor weight2, Tensor? scale2, Tensor? shift2, Tensor? residual, "
        "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, str? act, str? act2) -> Tensor"
    ),
    check=check,
    reference=reference,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    autocast=("x", "weight", "weight2", "residual"),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
    decomposition=decomposition,
)
