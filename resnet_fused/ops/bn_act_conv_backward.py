"""bn_act_conv_backward: the gradients of bn_act_conv_bn_stats, where both of its sides want one.

The weight's gradient reads the activation that was not kept. BatchNorm's backward makes it anyway,
to see what passed ReLU: in one call it is written there, and x is read once less. For a batch that
one process has all of; of a joined one the sums must be joined between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops import bn_act_conv_backward_data as data
from resnet_fused.ops import bn_act_conv_backward_weight as weights
from resnet_fused.ops import conv_backward_weight
from resnet_fused.ops._direct import call
from resnet_fused.ops._op import Op

NAME = "bn_act_conv_backward"
Result = tuple[Tensor, Tensor, Tensor, Tensor]


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
    channels_last: bool,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    vectors, geometry = (mean, var, bn_weight, bn_bias), (stride, padding, dilation, groups)
    data.check_call(NAME, grad, weight, x, vectors, eps, act, geometry, wanted)
    conv_backward_weight.check_gradient(NAME, grad, x, weight.shape, *geometry, dtype)
    if not wanted[0]:
        raise ValueError(f"{NAME}: wanted must be True for x, which the op is for")


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
    channels_last: bool,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> Result:
    """Compute the gradients of x, bn_weight, bn_bias and weight; empty where not wanted."""
    vectors, geometry = (mean, var, bn_weight, bn_bias), (stride, padding, dilation, groups)
    found = data.reference(grad, weight, x, *vectors, eps, act, *geometry, wanted)
    rest: tuple[Any, ...] = (list(weight.shape), eps, act, *geometry, channels_last, dtype)
    return *found, weights.reference(grad, x, *vectors, *rest)


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
    channels_last: bool,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> Result:
    """Run the op as three; the activation lives until the weight's gradient is computed."""
    geometry = (stride, padding, dilation, groups)
    grad_a = call("conv_backward_data", grad, weight, x.shape, *geometry, None)
    saved = (x, mean, var, bn_weight, bn_bias, None, eps, act)
    *found, _, a = call("bn_act_backward", grad_a, *saved, (*wanted, False, True))
    del grad_a
    rest = (list(weight.shape), *geometry, channels_last, dtype)
    grad_x, grad_bn_weight, grad_bn_bias = found
    return grad_x, grad_bn_weight, grad_bn_bias, call("conv_backward_weight", grad, a, *rest)


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
    channels_last: bool,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> Result:
    """Return an empty map, two empty vectors, empty of elements where not wanted, and a weight."""
    vectors, geometry = (mean, var, bn_weight, bn_bias), (stride, padding, dilation, groups)
    found = data.fake(grad, weight, x, *vectors, eps, act, *geometry, wanted)
    sizes: tuple[Any, ...] = (list(weight.shape), eps, act, *geometry, channels_last, dtype)
    return *found, weights.fake(grad, x, *vectors, *sizes)


def flops(
    grad_shape: Sequence[int],
    weight_shape: Sequence[int],
    x_shape: Sequence[int],
    *args: Any,
    out_shape: Sequence[Any],
    **kwargs: Any,
) -> int:
    """As many as the convolution's own, twice."""
    return 2 * data.flops(grad_shape, weight_shape, out_shape=out_shape[:3])


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
    channels_last: bool,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> int:
    """Those of the gradient of x; then the activation written, and read with grad for the weight's.

    The weight's gradient is written once.
    """
    vectors, geometry = (mean, var, bn_weight, bn_bias), (stride, padding, dilation, groups)
    first = data.nbytes(grad, weight, x, *vectors, eps, act, *geometry, wanted)
    return first + 2 * x.nbytes + grad.nbytes + weight.numel() * dtype.itemsize


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield over the calls of bn_act_conv_backward_data."""
    for i, (*args, wanted) in enumerate(data.samples(device, dtype)):
        yield *args, bool(i % 2), args[1].dtype, [True, *wanted[1:]]


OP = Op(
    name=NAME,
    schema=(
        "(Tensor grad, Tensor weight, Tensor x, Tensor mean, Tensor var, Tensor? bn_weight, "
        "Tensor? bn_bias, float eps, str? act, SymInt[2] stride, SymInt[2] padding, "
        "SymInt[2] dilation, SymInt groups, bool channels_last, ScalarType dtype, bool[3] wanted) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
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
