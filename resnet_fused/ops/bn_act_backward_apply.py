"""bn_act_backward_apply: BatchNorm's input gradient, once the two sums are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math
from resnet_fused.ops import _bn, _checks
from resnet_fused.ops import bn_act_backward_reduce as reduce
from resnet_fused.ops._op import Op

NAME = "bn_act_backward_apply"


def check(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    sum_g: Tensor,
    sum_gx: Tensor,
    eps: float,
    act: str | None,
    count: int,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    reduce.check_maps(NAME, grad, x, y)
    _bn.check_statistics(NAME, mean, var, x)
    _bn.check_affine(NAME, weight, bias, x)
    _bn.check_vector(NAME, "sum_g", sum_g, x)
    _bn.check_vector(NAME, "sum_gx", sum_gx, x)
    _bn.check_eps(NAME, eps)
    _checks.check_act(NAME, act)
    if count < 0:
        raise ValueError(f"{NAME}: count must be at least 0, got {count}")


def reference(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    sum_g: Tensor,
    sum_gx: Tensor,
    eps: float,
    act: str | None,
    count: int,
) -> Tensor:
    """Compute grad_x = γ/σ · (g - Σg / M - x̂ · Σ(g x̂) / M) in plain torch."""
    g = reduce.mask(grad, x, mean, var, weight, bias, y, eps, act)
    a, b, d = _bn_math.gradient_vectors(mean, var, weight, sum_g, sum_gx, eps, max(count, 1))
    wide = g.to(mean.dtype) * a.view(-1, 1, 1) + x.to(mean.dtype) * b.view(-1, 1, 1)
    return _checks.channels_last((wide + d.view(-1, 1, 1)).to(x.dtype))


def fake(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    """Return an empty channels_last tensor of x's shape."""
    return _checks.empty_channels_last(x, x.shape)


def nbytes(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    sum_g: Tensor,
    sum_gx: Tensor,
    eps: float,
    act: str | None,
    count: int,
) -> int:
    """grad, x and y read once, the gradient written once."""
    tensors = (grad, x, mean, var, weight, bias, y, sum_g, sum_gx)
    return sum(t.nbytes for t in tensors if t is not None) + x.nbytes


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield for each sample of the reduction; the sums are its own, over the batch's count."""
    for args in reduce.samples(device, dtype):
        sum_g, sum_gx, _ = reduce.reference(*args)
        eps, act = args[7:9]
        yield *args[:7], sum_g, sum_gx, eps, act, _bn.values_per_channel(args[1].shape)


OP = Op(
    name=NAME,
    schema=(
        "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
        "Tensor? y, Tensor sum_g, Tensor sum_gx, float eps, str? act, SymInt count) -> Tensor"
    ),
    check=check,
    reference=reference,
    fake=fake,
    autocast=(),
    nbytes=nbytes,
    samples=samples,
)
