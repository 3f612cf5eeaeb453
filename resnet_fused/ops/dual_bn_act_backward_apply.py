"""dual_bn_act_backward_apply: both input gradients of dual_bn_act, once the sums are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math
from resnet_fused.ops import _bn, _checks, _samples, dual_bn_act
from resnet_fused.ops import dual_bn_act_backward_reduce as reduce
from resnet_fused.ops._op import Op

NAME = "dual_bn_act_backward_apply"


def check(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None,
    y: Tensor | None,
    sum_g: Tensor,
    sum_gx: Tensor,
    sum_gr: Tensor,
    eps: float,
    residual_eps: float,
    act: str | None,
    count: int,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    reduce.check_maps(NAME, grad, x, residual, y, act)
    _bn.check_statistics(NAME, mean, var, x)
    _bn.check_statistics(NAME, residual_mean, residual_var, x, "residual_")
    _bn.check_affine(NAME, weight, None, x)
    _bn.check_affine(NAME, residual_weight, None, x, "residual_")
    for name, vector in (("sum_g", sum_g), ("sum_gx", sum_gx), ("sum_gr", sum_gr)):
        _bn.check_vector(NAME, name, vector, x)
    _bn.check_eps(NAME, eps)
    _bn.check_eps(NAME, residual_eps)
    if count < 0:
        raise ValueError(f"{NAME}: count must be at least 0, got {count}")


def reference(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None,
    y: Tensor | None,
    sum_g: Tensor,
    sum_gx: Tensor,
    sum_gr: Tensor,
    eps: float,
    residual_eps: float,
    act: str | None,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Compute BatchNorm's gradient for either side from the same masked gradient."""
    g = reduce.mask(grad, y, act).to(mean.dtype)
    sides = (
        (x, (mean, var, weight, sum_g, sum_gx, eps)),
        (residual, (residual_mean, residual_var, residual_weight, sum_g, sum_gr, residual_eps)),
    )
    results = []
    for t, vectors in sides:
        a, b, d = (v.view(-1, 1, 1) for v in _bn_math.gradient_vectors(*vectors, max(count, 1)))
        results.append(_checks.channels_last((g * a + t.to(g.dtype) * b + d).to(x.dtype)))
    return results[0], results[1]


def fake(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Return two empty channels_last tensors of x's shape."""
    return _checks.empty_channels_last(x, x.shape), _checks.empty_channels_last(x, x.shape)


def nbytes(grad: Tensor, x: Tensor, *args: Any) -> int:
    """Everything read once, both gradients written once."""
    read = sum(a.nbytes for a in (grad, x, *args) if isinstance(a, Tensor))
    return read + 2 * x.nbytes


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield for each sample of dual_bn_act, with the sums of its own reduction."""
    draw = _samples.normal(6, device, dtype)
    for args in dual_bn_act.samples(device, dtype):
        x, mean, var, weight, _, r, r_mean, r_var, r_weight, _, eps, r_eps, _ = args
        for grad, *_, y, act in reduce.samples_of(args, draw):
            sums = reduce.reference(grad, x, mean, r, r_mean, y, act)
            count = _bn.values_per_channel(x.shape)
            yield (
                grad, x, mean, var, weight, r, r_mean, r_var, r_weight, y, *sums, eps, r_eps, act,
                count,
            )  # fmt: skip


OP = Op(
    name=NAME,
    schema=(
        "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor residual, "
        "Tensor residual_mean, Tensor residual_var, Tensor? residual_weight, Tensor? y, "
        "Tensor sum_g, Tensor sum_gx, Tensor sum_gr, float eps, float residual_eps, str? act, "
        "SymInt count) -> (Tensor, Tensor)"
    ),
    check=check,
    reference=reference,
    fake=fake,
    autocast=(),
    nbytes=nbytes,
    samples=samples,
)
