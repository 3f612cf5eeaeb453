"""bn_act_backward_reduce: the two sums of BatchNorm's backward, behind ReLU's mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math
from resnet_fused.ops import _bn, _checks, _samples, bn_act
from resnet_fused.ops._op import Op

NAME = "bn_act_backward_reduce"
Result = tuple[Tensor, Tensor, Tensor]


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
    masked: bool,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    check_maps(NAME, grad, x, y)
    _bn.check_statistics(NAME, mean, var, x)
    _bn.check_affine(NAME, weight, bias, x)
    _bn.check_eps(NAME, eps)
    _checks.check_act(NAME, act)
    if masked and act is None:
        raise ValueError(f"{NAME}: masked must be False for act=None, where it would be grad")


def check_maps(op: str, grad: Tensor, x: Tensor, y: Tensor | None) -> None:
    """Check the maps that a backward reads."""
    _checks.check_feature_map(op, x)
    _checks.check_like(op, "grad", grad, x)
    if y is not None:
        _bn.check_relu_result(op, y, x)


def mask(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    eps: float,
    act: str | None,
) -> Tensor:
    """Return the gradient in front of ReLU: y says what passed, or x, of which y is made again."""
    if act is None:
        return grad
    if y is None:
        y, _ = bn_act.reference(x, mean, var, weight, bias, None, eps, None)
    return torch.where(_bn.passed_by(y), grad, torch.zeros_like(grad))


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
    masked: bool,
) -> Result:
    """Compute Σ g, Σ g · (x - μ) and, if asked for, g itself in plain torch."""
    g = mask(grad, x, mean, var, weight, bias, y, eps, act)
    wide = g.to(mean.dtype)
    sum_gx = (wide * (x.to(mean.dtype) - mean.view(-1, 1, 1))).sum((0, 2, 3))
    written = _checks.channels_last(g.clone()) if masked else g.new_empty(0)
    return wide.sum((0, 2, 3)), sum_gx, written


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
    masked: bool,
) -> Result:
    """Return two empty vectors and the masked gradient, empty of elements if not asked for."""
    written = _checks.empty_channels_last(x, x.shape) if masked else x.new_empty(0)
    return _bn.vector_like(x), _bn.vector_like(x), written


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
    masked: bool,
) -> int:
    """grad, x and y, or its bits, read once, the masked gradient written if asked for."""
    read = sum(t.nbytes for t in (grad, x, mean, var, weight, bias, y) if t is not None)
    return read + 2 * mean.nbytes + (grad.nbytes if masked else 0)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield for each sample of bn_act that has a batch, with and without the masked gradient."""
    draw = _samples.normal(1, device, dtype)
    for i, args in enumerate(bn_act.samples(device, dtype)):
        x, mean, var, weight, bias, residual, eps, act = args
        grad, masked = draw(*x.shape), bool(i % 2 and act)
        y, bits = bn_act.reference(*args) if residual is not None else (None, _bn_math.no_bits(x))
        yield grad, x, mean, var, weight, bias, y, eps, act, masked
        if bits.numel():
            yield grad, x, mean, var, weight, bias, bits, eps, act, masked


OP = Op(
    name=NAME,
    schema=(
        "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
        "Tensor? y, float eps, str? act, bool masked) -> (Tensor, Tensor, Tensor)"
    ),
    check=check,
    reference=reference,
    fake=fake,
    autocast=(),
    nbytes=nbytes,
    samples=samples,
)
