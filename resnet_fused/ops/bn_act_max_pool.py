"""bn_act_max_pool: the end of the stem in training: BatchNorm, ReLU and max pool in one pass.

The normalised map is not kept. Of the pool a byte per output is, where torch keeps an int64, and in
16 bits the element of x that it took: a gradient comes to these alone, so that the sums of
BatchNorm's backward are over a quarter of the stem's map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends import _bn_math
from resnet_fused.backends._sizes import pool_shape
from resnet_fused.ops import _bn, _checks, bn_act
from resnet_fused.ops._direct import call
from resnet_fused.ops._op import Op
from resnet_fused.ops._shared import shared
from resnet_fused.ops.conv_bn_act_max_pool import check_pool

NAME = "bn_act_max_pool"
Result = tuple[Tensor, Tensor, Tensor]
Run = Callable[..., Any]


def check_window(op: str, pool_size: Sequence[int]) -> None:
    """Check that a byte can name each element of the window."""
    if pool_size[0] * pool_size[1] > 256:
        raise ValueError(f"{op}: pool_size must have at most 256 elements, got {tuple(pool_size)}")


def check(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    _checks.check_feature_map(NAME, x)
    _bn.check_statistics(NAME, mean, var, x)
    _bn.check_affine(NAME, weight, bias, x)
    _bn.check_eps(NAME, eps)
    _checks.check_act(NAME, act)
    check_pool(NAME, x.shape, pool_size, pool_stride, pool_padding)
    check_window(NAME, pool_size)


def reference(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Result:
    """Compute the op in plain torch; the index is row-major within the window, padding included."""
    a, _ = bn_act.reference(x, mean, var, weight, bias, None, eps, act)
    if not a.numel():
        y = _checks.channels_last(
            a.new_empty(pool_shape(x.shape, pool_size, pool_stride, pool_padding))
        )
        return y, torch.empty_like(y, dtype=torch.uint8), _new_taken(y)
    y, flat = F.max_pool2d(
        a, list(pool_size), list(pool_stride), list(pool_padding), return_indices=True
    )
    top, left = corners(y, pool_stride, pool_padding)
    index = (flat // x.shape[3] - top) * pool_size[1] + (flat % x.shape[3] - left)
    y, index = _checks.channels_last(y), _checks.channels_last(index.to(torch.uint8))
    taken = _new_taken(y)
    if taken.numel():
        taken.copy_(x.flatten(2).gather(2, flat.flatten(2)).view(y.shape))
    return y, index, taken


def _new_taken(y: Tensor) -> Tensor:
    """Return memory for what a pool that gives ``y`` took of its input, where it says so."""
    return _checks.empty_channels_last(y, _bn_math.taken_shape(y.shape, y.dtype))


def corners(y: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the first row and the first column of each output's window, to broadcast."""
    rows, columns = (
        torch.arange(n, device=y.device) * s - p
        for n, s, p in zip(y.shape[2:], stride, padding, strict=True)
    )
    return rows.view(-1, 1), columns


def fake(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Result:
    """Return an empty channels_last output, its indices and what they name."""
    shape = pool_shape(x.shape, pool_size, pool_stride, pool_padding)
    y = _checks.empty_channels_last(x, shape)
    return y, torch.empty_like(y, dtype=torch.uint8), _new_taken(y)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    """Save x, the vectors, the indices and what they name."""
    x, mean, var, weight, bias, ctx.eps, ctx.act, size, stride, padding = inputs
    ctx.shared = shared(mean)
    ctx.pool = (list(size), list(stride), list(padding))
    ctx.save_for_backward(x, mean, var, weight, _bn.kept_bias(bias), *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    """Each output's gradient goes to the element it came from, then through BatchNorm.

    Where the batch is shared, x's gradient needs all of its sums; the others are this process's.
    """
    x, mean, var, weight, bias, index, taken = ctx.saved_tensors
    size, stride, padding = ctx.pool
    wanted = _bn.asked_for([ctx.needs_input_grad[i] for i in (0, 3, 4)], (x, weight, bias))
    saved = (index, taken, x, mean, var, weight, bias)
    rest = (ctx.eps, ctx.act, size, stride, padding, wanted)
    if ctx.shared is None:
        found = call("bn_act_max_pool_backward", grad, *saved, *rest)
    else:
        found = _bn_math.pooled_gradients(parts(call), grad, *saved, *rest, ctx.shared.means)
    grads = _bn.only(found, wanted)
    return (grads[0], None, None, grads[1], grads[2], *(None,) * 5)


def parts(run: Callable[..., Any]) -> tuple[Run, Run, Run]:
    """Return the ops that the backward is made of, by a function that runs an op of a name."""
    of = functools.partial(functools.partial, run)
    return of("bn_act_backward_reduce"), of("max_pool_backward"), of("bn_act_backward_apply")


def nbytes(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> int:
    """X and the vectors read once, the output, its indices and what they name written once."""
    read = sum(t.nbytes for t in (x, mean, var, weight, bias) if t is not None)
    shape = pool_shape(x.shape, pool_size, pool_stride, pool_padding)
    taken = torch.Size(_bn_math.taken_shape(shape, x.dtype)).numel()
    return read + torch.Size(shape).numel() * (x.element_size() + 1) + taken * x.element_size()


#: Window, stride and padding: the stem's, one that tiles, a wide one, a rectangular one.
POOLS = (
    ((3, 3), (2, 2), (1, 1)),
    ((2, 2), (2, 2), (0, 0)),
    ((5, 5), (1, 1), (2, 2)),
    ((3, 2), (2, 1), (0, 1)),
)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield the samples of bn_act without a residual that are large enough, over all windows."""
    for x, mean, var, weight, bias, residual, eps, act in bn_act.samples(device, dtype):
        if residual is None and min(x.shape[2:]) >= 3:
            for pool in POOLS:
                yield x, mean, var, weight, bias, eps, act, *pool


OP = Op(
    name=NAME,
    schema=(
        "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, str? act, "
        "int[2] pool_size, int[2] pool_stride, int[2] pool_padding) -> (Tensor, Tensor, Tensor)"
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
