"""bn_act_conv_backward_data: the gradient through a convolution, and BatchNorm and ReLU before it.

Where a kernel has it whole, the gradient of the activation passes ReLU's mask and is summed for
BatchNorm while it is in registers: neither pass reads it again. For a batch that one process has
all of; of a joined one the sums must be joined between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends._sizes import output_shape
from resnet_fused.ops import (
    _bn,
    _checks,
    _samples,
    bn_act_backward,
    bn_act_conv_bn_stats,
    conv_backward_data,
)
from resnet_fused.ops._direct import call
from resnet_fused.ops._op import Op

NAME = "bn_act_conv_backward_data"
Result = tuple[Tensor, Tensor, Tensor]


def check(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    vectors, geometry = (mean, var, bn_weight, bn_bias), (stride, padding, dilation, groups)
    check_call(NAME, grad, weight, x, vectors, eps, act, geometry, wanted)


def check_call(
    op: str,
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    vectors: Sequence[Any],
    eps: float,
    act: str | None,
    geometry: Sequence[Any],
    wanted: Sequence[bool],
) -> None:
    """Check what says which convolution's and which BatchNorm's gradients are wanted."""
    mean, var, bn_weight, bn_bias = vectors
    _bn.check_wanted(op, wanted, {"x": x, "bn_weight": bn_weight, "bn_bias": bn_bias})
    conv_backward_data.check_gradient(op, grad, weight, x.shape, *geometry)
    _checks.check_same(op, "x", x, grad)
    _bn.check_statistics(op, mean, var, x)
    _bn.check_affine(op, bn_weight, bn_bias, x, "bn_")
    _bn.check_eps(op, eps)
    _checks.check_act(op, act)


def reference(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Result:
    """Compute the gradients of x, bn_weight and bn_bias in plain torch; empty where not wanted."""
    geometry = (stride, padding, dilation, groups)
    grad_a = conv_backward_data.reference(grad, weight, x.shape, *geometry, None)
    saved = (x, mean, var, bn_weight, bn_bias, None, eps, act)
    return bn_act_backward.reference(grad_a, *saved, (*wanted, False, False))[:3]


def decomposition(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Result:
    """Run the op as two; the activation's gradient lives until BatchNorm's is computed."""
    geometry = (stride, padding, dilation, groups)
    grad_a = call("conv_backward_data", grad, weight, x.shape, *geometry, None)
    saved = (x, mean, var, bn_weight, bn_bias, None, eps, act)
    *found, _, _ = call("bn_act_backward", grad_a, *saved, (*wanted, False, False))
    grad_x, grad_weight, grad_bias = found
    return grad_x, grad_weight, grad_bias


def fake(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Result:
    """Return an empty map and two empty vectors, empty of elements where not wanted."""
    saved = (x, mean, var, bn_weight, bn_bias, None, eps, act)
    return bn_act_backward.fake(x, *saved, (*wanted, False, False))[:3]


def flops(
    grad_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[Any],
    **kwargs: Any,
) -> int:
    """As many as the convolution's own."""
    return conv_backward_data.flops(grad_shape, weight_shape, out_shape=out_shape[0])


def nbytes(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    act: str | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> int:
    """grad, weight, x and the vectors read once; for x's gradient the activation's is written, and
    read again with x once its sums are known.
    """
    given = (grad, weight, x, mean, var, bn_weight, bn_bias)
    read = sum(t.nbytes for t in given if t is not None)
    return read + 4 * x.nbytes * wanted[0]


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield over the calls of bn_act_conv_bn_stats, with several sets of what is wanted."""
    draw = _samples.normal(6, device, dtype)
    for i, (x, mean, var, bn_weight, bn_bias, weight, eps, act, *geometry) in enumerate(
        bn_act_conv_bn_stats.samples(device, dtype)
    ):
        grad = draw(*output_shape(x.shape, weight.shape, *geometry[:3]))
        vectors = (mean, var, bn_weight, bn_bias)
        wanted = [i % 7 != 4, bn_weight is not None, bn_bias is not None and i % 5 != 2]
        yield grad, weight, x, *vectors, eps, act, *geometry, wanted


OP = Op(
    name=NAME,
    schema=(
        "(Tensor grad, Tensor weight, Tensor x, Tensor mean, Tensor var, Tensor? bn_weight, "
        "Tensor? bn_bias, float eps, str? act, SymInt[2] stride, SymInt[2] padding, "
        "SymInt[2] dilation, SymInt groups, bool[3] wanted) -> (Tensor, Tensor, Tensor)"
    ),
    check=check,
    reference=reference,
    decomposition=decomposition,
    fake=fake,
    autocast=("grad", "weight"),
    wide=("weight",),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
)
