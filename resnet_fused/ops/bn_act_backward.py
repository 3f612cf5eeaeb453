"""bn_act_backward: the gradients of bn_act, for a batch that one process has all of.

And what bn_act gave, for who needs it again beside: the pass that makes x's gradient has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math
from resnet_fused.ops import _bn, _checks, bn_act
from resnet_fused.ops import bn_act_backward_apply as apply
from resnet_fused.ops import bn_act_backward_reduce as reduce
from resnet_fused.ops._op import Op

NAME = "bn_act_backward"
Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def check(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    eps: float,
    act: str | None,
    wanted: Sequence[bool],
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    given = {"x": x, "weight": weight, "bias": bias, "residual": grad, "activation": x}
    _bn.check_wanted(NAME, wanted, given)
    if wanted[4] and y is not None:
        raise ValueError(f"{NAME}: wanted must be False for activation with y: a residual made it")
    if wanted[3] and act is None:
        raise ValueError(f"{NAME}: wanted must be False for residual with act=None: it is grad")
    reduce.check_maps(NAME, grad, x, y)
    _bn.check_statistics(NAME, mean, var, x)
    _bn.check_affine(NAME, weight, bias, x)
    _bn.check_eps(NAME, eps)
    _checks.check_act(NAME, act)


def reference(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    eps: float,
    act: str | None,
    wanted: Sequence[bool],
) -> Result:
    """Compute the gradients and act(BN(x)) in plain torch; empty of elements where not wanted."""
    vectors, (*gradients, activation) = (mean, var, weight, bias), wanted
    saved = (x, *vectors, y, eps, act)
    found = _bn_math.gradients(reduce.reference, apply.reference, grad, *saved, gradients)
    if not activation:
        return *found, x.new_empty(0)
    return *found, bn_act.reference(x, *vectors, None, eps, act)[0]


def fake(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    eps: float,
    act: str | None,
    wanted: Sequence[bool],
) -> Result:
    """Return three empty maps and two empty vectors, empty of elements where not wanted."""

    def empty(like: Tensor | None, want: bool) -> Tensor:
        if like is None or not want:
            return x.new_empty(0)
        return (
            torch.empty_like(like) if like.dim() == 1 else _checks.empty_channels_last(x, x.shape)
        )

    given = (x, weight, bias, x, x)
    grad_x, grad_weight, grad_bias, masked, activation = map(empty, given, wanted)
    return grad_x, grad_weight, grad_bias, masked, activation


def nbytes(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    eps: float,
    act: str | None,
    wanted: Sequence[bool],
) -> int:
    """grad, x and y read once for the sums and once for x's gradient, what is wanted written."""
    read = sum(t.nbytes for t in (grad, x, mean, var, weight, bias, y) if t is not None)
    again = grad.nbytes + x.nbytes if wanted[0] else 0
    return read + again + x.nbytes * (wanted[0] + wanted[3] + wanted[4])


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield for each sample of the reduction, with several sets of what is wanted."""
    for i, (*args, masked) in enumerate(reduce.samples(device, dtype)):
        # An empty batch's variance is NaN, and so would be its weight's gradient.
        weight = args[4] is not None and i % 5 != 4 and args[1].numel() > 0
        activation = args[6] is None and i % 2 == 0
        wanted = [i % 3 != 2, weight, args[5] is not None and i % 7 != 6, masked, activation]
        yield *args, wanted


OP = Op(
    name=NAME,
    schema=(
        "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
        "Tensor? y, float eps, str? act, bool[5] wanted) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    check=check,
    reference=reference,
    fake=fake,
    autocast=(),
    nbytes=nbytes,
    samples=samples,
)
