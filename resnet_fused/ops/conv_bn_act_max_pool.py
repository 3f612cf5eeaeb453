"""conv_bn_act_max_pool: the stem of a ResNet, convolution to max pooling as one op."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends._sizes import output_shape, pool_shape
from resnet_fused.ops import _checks, _samples, conv_bn_act
from resnet_fused.ops._op import Op

NAME = "conv_bn_act_max_pool"


def check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    shape = conv_bn_act.check_convolution(NAME, x, weight, stride, padding, dilation, groups)
    _checks.check_same(NAME, "weight", weight, x)
    _checks.check_channels(NAME, "scale", scale, shape[1], x)
    _checks.check_channels(NAME, "shift", shift, shape[1], x)
    _checks.check_act(NAME, act)
    check_pool(NAME, shape, pool_size, pool_stride, pool_padding)


def check_pool(
    op: str,
    map_shape: Sequence[int],
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> None:
    """Check a max pool of a map of ``map_shape``."""
    _checks.check_pair(op, "pool_size", pool_size, 1)
    _checks.check_pair(op, "pool_stride", pool_stride, 1)
    _checks.check_pair(op, "pool_padding", pool_padding, 0)
    # A window all in the padding would have no maximum.
    if any(2 * p > k for p, k in zip(pool_padding, pool_size, strict=True)):
        raise ValueError(
            f"{op}: pool_padding must be at most half of pool_size {tuple(pool_size)}, "
            f"got {tuple(pool_padding)}"
        )
    pooled = pool_shape(map_shape, pool_size, pool_stride, pool_padding)
    if pooled[2] < 1 or pooled[3] < 1:
        raise ValueError(
            f"{op}: the map {tuple(map_shape)} with pool_padding {tuple(pool_padding)} is smaller "
            f"than pool_size {tuple(pool_size)}"
        )


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Tensor:
    """Compute the op in plain torch; rounding keeps order, so it may come before the maximum."""
    y = conv_bn_act.reference(x, weight, scale, shift, None, stride, padding, dilation, groups, act)
    y = F.max_pool2d(y, list(pool_size), list(pool_stride), list(pool_padding))
    return _checks.channels_last(y)


def decomposition(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Tensor:
    """Run the convolution on the backend of its choice, then torch's pool."""
    y = torch.ops.resnet_fused.conv_bn_act(
        x, weight, scale, shift, None, stride, padding, dilation, groups, act
    )
    y = F.max_pool2d(y, list(pool_size), list(pool_stride), list(pool_padding))
    return _checks.channels_last(y)


def fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Tensor:
    """Return an empty channels_last tensor of the pooled shape."""
    pool = (pool_size, pool_stride, pool_padding)
    shape = output_shape(x.shape, weight.shape, stride, padding, dilation)
    return _checks.empty_channels_last(x, pool_shape(shape, *pool))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save x, weight and the vectors; the map before the pool is the op's to leave out."""
    x, weight, scale, shift, stride, padding, dilation, groups, act, *pool = inputs
    ctx.save_for_backward(x, weight, scale, shift)
    ctx.geometry = (list(stride), list(padding), list(dilation), groups)
    ctx.act, ctx.pool = act, [list(pair) for pair in pool]


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Pass the gradient to each window's first maximum, then as conv_bn_act does.

    The map before the pool, four times the result in a ResNet, is not saved but computed again.
    """
    x, weight, scale, shift = ctx.saved_tensors
    with _checks.without_autocast(x):
        y = torch.ops.resnet_fused.conv_bn_act(
            x, weight, scale, shift, None, *ctx.geometry, ctx.act
        )
    _, indices = torch.ops.aten.max_pool2d_with_indices(y, *ctx.pool)
    grad = torch.ops.aten.max_pool2d_with_indices_backward(
        grad, y, *ctx.pool, [1, 1], False, indices
    )
    if ctx.act == "relu":
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    needed = ctx.needs_input_grad[:4]
    grads = conv_bn_act.convolution_gradients(grad, x, weight, scale, shift, ctx.geometry, needed)
    return (*grads, *[None] * 8)


def flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    scale_shape: Sequence[int] | None,
    shift_shape: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    """Those of the convolution, two per multiply-add; the pool costs none."""
    shape = output_shape(x_shape, weight_shape, stride, padding, dilation)
    return conv_bn_act.flops(x_shape, weight_shape, out_shape=shape)


def nbytes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> int:
    """x, weight and the vectors read once, the pooled output written once, the map never."""
    shape = output_shape(x.shape, weight.shape, stride, padding, dilation)
    n, o, ph, pw = pool_shape(shape, pool_size, pool_stride, pool_padding)
    read = sum(t.nbytes for t in (x, weight, scale, shift) if t is not None)
    return read + n * o * ph * pw * x.element_size()


#: (N, C, H, W), O, kernel, stride, padding, dilation, groups, then the pool's size, stride,
#: padding: each line one branch of a kernel.
_Pair = tuple[int, int]
GEOMETRIES: tuple[tuple[tuple[int, ...], int, int, int, int, int, int, _Pair, _Pair, _Pair], ...]
GEOMETRIES = (
    ((1, 3, 19, 17), 8, 7, 2, 3, 1, 1, (3, 3), (2, 2), (1, 1)),  # the stem
    ((2, 3, 13, 18), 64, 7, 2, 3, 1, 1, (3, 3), (2, 2), (1, 1)),  # with as many outputs
    ((2, 4, 9, 8), 6, 3, 1, 1, 1, 1, (2, 2), (2, 2), (0, 0)),  # windows side by side, a row left
    ((1, 5, 9, 9), 7, 3, 1, 2, 2, 1, (3, 3), (1, 1), (1, 1)),  # odd channels, windows overlap
    ((2, 8, 6, 7), 12, 3, 1, 1, 1, 4, (3, 2), (2, 1), (1, 0)),  # groups, rectangular windows
    ((2, 4, 3, 3), 4, 3, 1, 0, 1, 1, (2, 2), (2, 2), (1, 1)),  # one pixel: the rest is padding
    ((1, 16, 7, 6), 16, 1, 1, 0, 1, 1, (3, 3), (4, 4), (0, 0)),  # pixels that no window reads
    ((0, 3, 9, 9), 4, 3, 2, 1, 1, 1, (3, 3), (2, 2), (1, 1)),  # empty batch
)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield arguments over :data:`GEOMETRIES`, with and without vectors and ReLU."""
    draw = _samples.normal(0, device, dtype)
    for i, (shape, o, k, s, p, d, groups, *pool) in enumerate(GEOMETRIES):
        weight = draw(o, shape[1] // groups, k, k)
        vector_dtype = dtype if i % 3 == 2 else _checks.accumulate_dtype(dtype)
        scale = draw(o, to=vector_dtype) if i % 4 != 3 else None
        shift = draw(o, to=vector_dtype) if i % 5 != 4 else None
        for act in _checks.ACTIVATIONS:
            x = draw(*shape)
            yield x, weight, scale, shift, (s, s), (p, p), (d, d), groups, act, *pool


OP = Op(
    name=NAME,
    schema=(
        "(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, "
        "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, str? act, "
        "SymInt[2] pool_size, SymInt[2] pool_stride, SymInt[2] pool_padding) -> Tensor"
    ),
    check=check,
    reference=reference,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    autocast=("x", "weight"),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
    decomposition=decomposition,
)
