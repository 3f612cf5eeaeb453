"""dual_bn_act_backward_reduce: the three sums of two BatchNorms' backward behind one mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math
from resnet_fused.ops import _bn, _checks, _samples, dual_bn_act
from resnet_fused.ops._op import Op

NAME = "dual_bn_act_backward_reduce"
Result = tuple[Tensor, Tensor, Tensor]


def check(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    residual: Tensor,
    residual_mean: Tensor,
    y: Tensor | None,
    act: str | None,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    check_maps(NAME, grad, x, residual, y, act)
    _bn.check_vector(NAME, "mean", mean, x)
    _bn.check_vector(NAME, "residual_mean", residual_mean, x)


def check_maps(
    op: str, grad: Tensor, x: Tensor, residual: Tensor, y: Tensor | None, act: str | None
) -> None:
    """Check that all maps are alike, and that ReLU's output is there where it is needed."""
    _checks.check_feature_map(op, x)
    if y is not None:
        _bn.check_relu_result(op, y, x)
    _checks.check_like(op, "grad", grad, x)
    _checks.check_like(op, "residual", residual, x)
    _checks.check_act(op, act)
    if act is not None and y is None:
        raise ValueError(f"{op}: y must be given for act={act!r}, got None")


def mask(grad: Tensor, y: Tensor | None, act: str | None) -> Tensor:
    """Return the gradient in front of ReLU."""
    if act is None or y is None:
        return grad
    return torch.where(_bn.passed_by(y), grad, torch.zeros_like(grad))


def reference(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    residual: Tensor,
    residual_mean: Tensor,
    y: Tensor | None,
    act: str | None,
) -> Result:
    """Compute Σ g, Σ g · (x - μ) and Σ g · (r - μ_r) in plain torch."""
    g = mask(grad, y, act).to(mean.dtype)
    centred = [
        t.to(mean.dtype) - m.view(-1, 1, 1) for t, m in ((x, mean), (residual, residual_mean))
    ]
    sum_gx, sum_gr = ((g * c).sum((0, 2, 3)) for c in centred)
    return g.sum((0, 2, 3)), sum_gx, sum_gr


def fake(grad: Tensor, x: Tensor, *_: Any) -> Result:
    """Return three empty vectors."""
    return _bn.vector_like(x), _bn.vector_like(x), _bn.vector_like(x)


def nbytes(*args: Any) -> int:
    """Everything read once; the sums are written."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    return sum(t.nbytes for t in tensors) + 3 * tensors[2].nbytes


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield for each sample of dual_bn_act."""
    draw = _samples.normal(6, device, dtype)
    for args in dual_bn_act.samples(device, dtype):
        yield from samples_of(args, draw)


def samples_of(args: tuple[Any, ...], draw: Callable[..., Tensor]) -> Iterator[tuple[Any, ...]]:
    """Yield for one sample of dual_bn_act: with ReLU's result, and with its bits if it has any."""
    x, mean, _, _, _, residual, residual_mean, *_, act = args
    grad = draw(*x.shape)
    y, bits = dual_bn_act.reference(*args) if act else (None, _bn_math.no_bits(x))
    yield grad, x, mean, residual, residual_mean, y, act
    if bits.numel():
        yield grad, x, mean, residual, residual_mean, bits, act


OP = Op(
    name=NAME,
    schema=(
        "(Tensor grad, Tensor x, Tensor mean, Tensor residual, Tensor residual_mean, Tensor? y, "
        "str? act) -> (Tensor, Tensor, Tensor)"
    ),
    check=check,
    reference=reference,
    fake=fake,
    autocast=(),
    nbytes=nbytes,
    samples=samples,
)
