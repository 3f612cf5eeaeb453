"""conv_bn_act: convolution, per-channel scale and shift, residual add and ReLU as one op."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends._sizes import output_shape
from resnet_fused.backends._torch_conv import maps_of_weight_gradient
from resnet_fused.ops import _checks, _samples
from resnet_fused.ops._op import Op

NAME = "conv_bn_act"


def check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    shape = check_convolution(NAME, x, weight, stride, padding, dilation, groups)
    _checks.check_same(NAME, "weight", weight, x)
    _checks.check_channels(NAME, "scale", scale, shape[1], x)
    _checks.check_channels(NAME, "shift", shift, shape[1], x)
    _checks.check_residual(NAME, residual, shape, x)
    _checks.check_act(NAME, act)


def check_convolution(
    op: str,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    """Check what every convolution takes, but the weight's dtype; return the output's shape."""
    _checks.check_feature_map(op, x)
    _checks.check_tensor(op, "weight", weight)
    if weight.dim() != 4:
        raise ValueError(
            f"{op}: weight must have 4 dimensions (O, C/groups, KH, KW), "
            f"got {weight.dim()}: {tuple(weight.shape)}"
        )
    _checks.check_device(op, "weight", weight, x)
    check_geometry(op, stride, padding, dilation)
    out_channels, per_group = weight.shape[0], weight.shape[1]
    if groups < 1 or out_channels % groups or x.shape[1] != per_group * groups:
        raise ValueError(
            f"{op}: groups={groups} does not fit x of {x.shape[1]} channels and weight of shape "
            f"{tuple(weight.shape)}: x must have weight.shape[1] * groups channels, "
            "and weight.shape[0] must be a multiple of groups"
        )
    if min(weight.shape) < 1:
        raise ValueError(
            f"{op}: weight {tuple(weight.shape)} has an empty dimension: each must be at least 1"
        )
    shape = output_shape(x.shape, weight.shape, stride, padding, dilation)
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(
            f"{op}: x of shape {tuple(x.shape)} with padding {tuple(padding)} is smaller than "
            f"the kernel of weight {tuple(weight.shape)} with dilation {tuple(dilation)}"
        )
    return shape


def check_geometry(
    op: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> None:
    """Check the three pairs."""
    _checks.check_pair(op, "stride", stride, 1)
    _checks.check_pair(op, "padding", padding, 0)
    _checks.check_pair(op, "dilation", dilation, 1)


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
) -> Tensor:
    """Compute the op in plain torch; scale, shift and add in float32 (float64 for float64)."""
    y = F.conv2d(x, weight, None, list(stride), list(padding), list(dilation), groups)
    y = y.to(_checks.accumulate_dtype(x.dtype))
    if scale is not None:
        y = y * scale.view(-1, 1, 1)
    if shift is not None:
        y = y + shift.view(-1, 1, 1)
    if residual is not None:
        y = y + residual
    if act == "relu":
        y = torch.relu(y)
    return _checks.channels_last(y.to(x.dtype))


def fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
) -> Tensor:
    """Return an empty channels_last tensor of the output's shape."""
    shape = output_shape(x.shape, weight.shape, stride, padding, dilation)
    return _checks.empty_channels_last(x, shape)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save x, weight, the vectors, and the output where ReLU needs its sign."""
    x, weight, scale, shift, _, stride, padding, dilation, groups, act = inputs
    ctx.save_for_backward(x, weight, scale, shift, output if act == "relu" else None)
    ctx.geometry = (list(stride), list(padding), list(dilation), groups)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the frozen-BN convolution.

    With g the gradient behind the ReLU and W' = scale · W: grad_x = dgrad(g, W'),
    grad_weight = scale · wgrad(x, g), grad_scale = Σ wgrad(x, g) · W, grad_shift = Σ g.
    The last but one needs no convolution output, so none is saved.
    """
    x, weight, scale, shift, output = ctx.saved_tensors
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    *needed, need_residual = ctx.needs_input_grad[:5]
    grads = convolution_gradients(grad, x, weight, scale, shift, ctx.geometry, needed)
    return (*grads, grad if need_residual else None, None, None, None, None, None)


def convolution_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    geometry: tuple[Any, ...],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, scale and shift, those that are needed.

    Args:
        grad: the gradient of conv(x, W) · scale + shift.
        x: as the op got it, like ``weight``, ``scale`` and ``shift``.
        weight: see above.
        scale: see above.
        shift: see above.
        geometry: stride, padding, dilation and groups.
        needed: whether each of the four is wanted.
    """
    need_x, need_weight, need_scale, need_shift = needed
    wide = _checks.accumulate_dtype(x.dtype)
    grad_x = grad_weight = grad_scale = grad_shift = None
    if need_x:
        folded = weight if scale is None else (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)
        grad_x = _convolution_gradient(grad, x, folded, geometry, which=0)
    if need_weight or need_scale:
        grad_weight = _convolution_gradient(grad, x, weight, geometry, which=1)
        if need_scale:
            assert scale is not None
            products = grad_weight.to(wide) * weight
            grad_scale = products.sum((1, 2, 3)).to(scale.dtype)
        if scale is not None:
            grad_weight = (grad_weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)
    if need_shift:
        assert shift is not None
        grad_shift = grad.sum((0, 2, 3), dtype=wide).to(shift.dtype)
    return grad_x, grad_weight if need_weight else None, grad_scale, grad_shift


def _convolution_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Any, ...], which: int
) -> Tensor:
    stride, padding, dilation, groups = geometry
    mask = [which == 0, which == 1, False]
    if which == 1:
        grad, x = maps_of_weight_gradient(grad, x, weight.shape, stride)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )[which]


def flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    """Two per multiply-add of the convolution: 2 · N · O · OH · OW · C/groups · KH · KW."""
    n, o, oh, ow = out_shape
    return 2 * n * o * oh * ow * weight_shape[1] * weight_shape[2] * weight_shape[3]


def nbytes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
) -> int:
    """x, weight, the vectors and the residual read once, the output written once."""
    n, o, oh, ow = output_shape(x.shape, weight.shape, stride, padding, dilation)
    read = sum(t.nbytes for t in (x, weight, scale, shift, residual) if t is not None)
    return read + n * o * oh * ow * x.element_size()


#: (N, C, H, W), O, kernel, stride, padding, dilation, groups: each line one branch of a kernel.
_Pair = int | tuple[int, int]
GEOMETRIES: tuple[tuple[tuple[int, ...], int, _Pair, _Pair, _Pair, _Pair, int], ...] = (
    ((2, 16, 9, 7), 32, 1, 1, 0, 1, 1),  # pointwise
    ((2, 16, 9, 7), 24, 1, 2, 0, 1, 1),  # strided pointwise: a projection shortcut
    ((1, 8, 8, 8), 16, 3, 1, 1, 1, 1),  # the basic block's convolution
    ((2, 16, 9, 7), 16, 3, 2, 1, 1, 1),  # strided, odd map
    ((1, 3, 19, 17), 8, 7, 2, 3, 1, 1),  # the stem
    ((1, 5, 9, 9), 7, 3, 1, 2, 2, 1),  # odd channels, dilation
    ((2, 8, 6, 6), 12, 3, 1, 1, 1, 4),  # groups, as ResNeXt
    ((1, 6, 5, 5), 6, 3, 1, 1, 1, 6),  # depthwise
    ((1, 4, 1, 1), 4, 3, 1, 1, 1, 1),  # one pixel: all but the centre is padding
    ((0, 4, 5, 5), 4, 3, 1, 1, 1, 1),  # empty batch
    ((1, 4, 5, 6), 3, (3, 1), (1, 2), (1, 0), (1, 1), 1),  # rectangular
)


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Return one integer as two."""
    return (value, value) if isinstance(value, int) else value


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield arguments over :data:`GEOMETRIES`, with and without vectors, residual and ReLU."""
    draw = _samples.normal(0, device, dtype)
    for i, (shape, o, k, s, p, d, groups) in enumerate(GEOMETRIES):
        kernel, stride, padding, dilation = map(pair, (k, s, p, d))
        weight = draw(o, shape[1] // groups, *kernel)
        out = output_shape(shape, weight.shape, stride, padding, dilation)
        vector_dtype = dtype if i % 3 == 2 else _checks.accumulate_dtype(dtype)
        scale = draw(o, to=vector_dtype) if i % 4 != 3 else None
        shift = draw(o, to=vector_dtype) if i % 5 != 4 else None
        residual = draw(*out) if i % 2 else None
        for act in _checks.ACTIVATIONS:
            x = draw(*shape)
            yield x, weight, scale, shift, residual, stride, padding, dilation, groups, act


OP = Op(
    name=NAME,
    schema=(
        "(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, "
        "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, str? act) "
        "-> Tensor"
    ),
    check=check,
    reference=reference,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    autocast=("x", "weight", "residual"),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
)
