"""bn_act_max_pool_backward: the gradients of bn_act_max_pool, where one process has the batch.

In 16 bits BatchNorm's sums are over the elements that the pool took, to which alone a gradient
comes. The pass that writes x's gradient may gather from the windows what comes to an element: the
gradient of the activation, the largest map of a network's training, is then neither written nor
read. Of a joined batch the sums must be joined between, by the ops that this one is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math
from resnet_fused.ops import (
    _bn,
    _checks,
    _samples,
    bn_act_backward,
    bn_act_backward_apply,
    bn_act_backward_reduce,
    bn_act_max_pool,
    max_pool_backward,
)
from resnet_fused.ops._direct import call
from resnet_fused.ops._op import Op

NAME = "bn_act_max_pool_backward"
Result = tuple[Tensor, Tensor, Tensor]


def check(
    grad: Tensor,
    index: Tensor,
    taken: Tensor,
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
    wanted: Sequence[bool],
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    _bn.check_wanted(NAME, wanted, {"x": x, "weight": weight, "bias": bias})
    _checks.check_feature_map(NAME, x)
    max_pool_backward.check_gradient(
        NAME, grad, index, x.shape, pool_size, pool_stride, pool_padding
    )
    _checks.check_same(NAME, "x", x, grad)
    _checks.check_same(NAME, "taken", taken, grad)
    expected = _bn_math.taken_shape(grad.shape, grad.dtype)
    if tuple(taken.shape) != expected:
        raise ValueError(f"{NAME}: taken must have shape {expected}, got {tuple(taken.shape)}")
    _bn.check_statistics(NAME, mean, var, x)
    _bn.check_affine(NAME, weight, bias, x)
    _bn.check_eps(NAME, eps)
    _checks.check_act(NAME, act)


def reference(
    grad: Tensor,
    index: Tensor,
    taken: Tensor,
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
    wanted: Sequence[bool],
) -> Result:
    """Compute the gradients of x, weight and bias in plain torch; empty where not wanted."""
    pool = (pool_size, pool_stride, pool_padding)
    saved = (index, taken, x, mean, var, weight, bias, eps, act, *pool, wanted)
    reduce, apply = bn_act_backward_reduce.reference, bn_act_backward_apply.reference
    parts = (reduce, max_pool_backward.reference, apply)
    return _bn_math.pooled_gradients(parts, grad, *saved)


def decomposition(
    grad: Tensor,
    index: Tensor,
    taken: Tensor,
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
    wanted: Sequence[bool],
) -> Result:
    """Run the op as three; the activation's gradient lives until BatchNorm's is computed."""
    pool = (pool_size, pool_stride, pool_padding)
    saved = (index, taken, x, mean, var, weight, bias, eps, act, *pool, wanted)
    return _bn_math.pooled_gradients(bn_act_max_pool.parts(call), grad, *saved)


def fake(
    grad: Tensor,
    index: Tensor,
    taken: Tensor,
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
    wanted: Sequence[bool],
) -> Result:
    """Return an empty map and two empty vectors, empty of elements where not wanted."""
    saved = (x, mean, var, weight, bias, None, eps, act)
    return bn_act_backward.fake(x, *saved, (*wanted, False, False))[:3]


def nbytes(
    grad: Tensor,
    index: Tensor,
    taken: Tensor,
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
    wanted: Sequence[bool],
) -> int:
    """What the sums are of read once, then grad, index and x for x's gradient, which is written."""
    summed = (grad, taken) if taken.numel() else (grad, index, x)
    read = sum(t.nbytes for t in (*summed, mean, var, weight, bias) if t is not None)
    return read + (grad.nbytes + index.nbytes + 2 * x.nbytes) * wanted[0]


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield for each sample of bn_act_max_pool, with several sets of what is wanted."""
    draw = _samples.normal(8, device, dtype)
    for i, args in enumerate(bn_act_max_pool.samples(device, dtype)):
        x, _, _, weight, bias, *_ = args
        y, *of_pool = bn_act_max_pool.reference(*args)
        grad = draw(*y.shape)
        # An empty batch's variance is NaN, and so would be its weight's gradient.
        some = weight is not None and i % 5 != 4 and x.numel() > 0
        yield grad, *of_pool, *args, [i % 7 != 6, some, bias is not None and i % 5 != 2]


OP = Op(
    name=NAME,
    schema=(
        "(Tensor grad, Tensor index, Tensor taken, Tensor x, Tensor mean, Tensor var, "
        "Tensor? weight, Tensor? bias, float eps, str? act, int[2] pool_size, int[2] pool_stride, "
        "int[2] pool_padding, bool[3] wanted) -> (Tensor, Tensor, Tensor)"
    ),
    check=check,
    reference=reference,
    decomposition=decomposition,
    fake=fake,
    autocast=(),
    nbytes=nbytes,
    samples=samples,
)
