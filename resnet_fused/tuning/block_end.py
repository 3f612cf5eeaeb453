"""A block's end in training, forward and backward: as one op, and as the ops that it replaces.

What each needs of the other's backward differs, so that only both together can be compared: from
the raw output of the convolution before, to the gradient of that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fused.backends._pointwise import GEOMETRY
from resnet_fused.nn.pointwise import OP as OP
from resnet_fused.ops import _bn
from resnet_fused.ops._direct import call

#: The BatchNorm before has ReLU and all of its vectors.
_ALL = [True, True, True]
_EPS = 1e-5


def together(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> Callable[[], object]:
    """Return what runs BatchNorm and ReLU of ``x``, then the one op, and their gradients."""
    vectors, grad = _vectors(x), _gradient(x, weight)
    adds = [residual is not None and act is not None]

    def run() -> object:
        a, _ = call("bn_act", x, *vectors, None, _EPS, "relu")
        y, *moments = call(OP, a, weight, bn_weight, bn_bias, residual, eps, act)
        kept = y if act == "relu" else None
        grad_a, *_ = call(
            OP + "_backward", grad, a, weight, *moments, bn_weight, kept, None, eps, act,
            [True, *adds],
        )  # fmt: skip
        return call(
            "bn_act_backward", grad_a, x, *vectors, None, _EPS, "relu", [*_ALL, False, False]
        )

    return run


def apart(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> Callable[[], object]:
    """Return what runs the same as a convolution that normalises what it reads, and bn_act."""
    vectors, grad = _vectors(x), _gradient(x, weight)
    layout = (not weight.is_contiguous(), weight.dtype)
    wanted = [True, bn_weight is not None, bn_bias is not None, residual is not None and bool(act)]

    def run() -> object:
        z, *moments = call("bn_act_conv_bn_stats", x, *vectors, weight, _EPS, "relu", *GEOMETRY)
        own = (z, *moments, bn_weight, bn_bias)
        y, bits = call("bn_act", *own, residual, eps, act)
        by_result = act == "relu" and residual is not None
        kept = _bn.kept_result(y, bits) if by_result else None
        grad_z, *_ = call("bn_act_backward", grad, *own, kept, eps, act, [*wanted, False])
        return call(
            "bn_act_conv_backward", grad_z, weight, x, *vectors, _EPS, "relu", *GEOMETRY, *layout,
            _ALL,
        )  # fmt: skip

    return run


def _vectors(x: Tensor) -> list[Tensor]:
    """Return mean, variance, weight and bias of the BatchNorm before."""
    zeros = torch.zeros(x.shape[1], device=x.device)
    return [zeros, zeros + 1, zeros + 1, zeros]


def _gradient(x: Tensor, weight: Tensor) -> Tensor:
    """Return a gradient of the block's output."""
    shape = (len(x), len(weight), *x.shape[2:])
    return torch.randn(shape, dtype=x.dtype, device=x.device).contiguous(
        memory_format=torch.channels_last
    )
