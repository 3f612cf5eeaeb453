"""A block's end in training, forward and backward: as one op, and as the ops that it replaces.

What each needs of the other's backward differs, so that only both together can be compared: from
the raw output of the convolution before, to the gradient of that. A projection, which nothing is
added to, is compared with the rest of its block's end beside it: with a map to add that pass has
less to do than with one to be normalised.
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
    if residual is None:
        return _projection_together(x, weight, bn_weight, bn_bias, eps)
    vectors, grad = _vectors(x), _gradient(x, weight)
    adds = [act is not None]

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
    if residual is None:
        return _projection_apart(x, weight, bn_weight, bn_bias, eps)
    vectors, grad = _vectors(x), _gradient(x, weight)
    layout = (not weight.is_contiguous(), weight.dtype)
    wanted = [True, bn_weight is not None, bn_bias is not None, act is not None]

    def run() -> object:
        z, *moments = call("bn_act_conv_bn_stats", x, *vectors, weight, _EPS, "relu", *GEOMETRY)
        own = (z, *moments, bn_weight, bn_bias)
        y, bits = call("bn_act", *own, residual, eps, act)
        kept = _bn.kept_result(y, bits) if act == "relu" else None
        grad_z, *_ = call("bn_act_backward", grad, *own, kept, eps, act, [*wanted, False])
        return call(
            "bn_act_conv_backward", grad_z, weight, x, *vectors, _EPS, "relu", *GEOMETRY, *layout,
            _ALL,
        )  # fmt: skip

    return run


def _projection_together(
    x: Tensor, weight: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float
) -> Callable[[], object]:
    """Return what runs a projection as the one op, and a block's end that adds its result."""
    grad = _gradient(x, weight)
    other, vectors = torch.randn_like(grad), _vectors(grad)

    def run() -> object:
        r, *moments = call(OP, x, weight, bn_weight, bn_bias, None, eps, None)
        y, bits = call("bn_act", other, *vectors, r, _EPS, "relu")
        kept = _bn.kept_result(y, bits)
        *_, g, _ = call(
            "bn_act_backward", grad, other, *vectors, kept, _EPS, "relu", [*_ALL, True, False]
        )
        saved = (x, weight, *moments, bn_weight, None, None, eps, None)
        return call(OP + "_backward", g, *saved, [True, False])

    return run


def _projection_apart(
    x: Tensor, weight: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float
) -> Callable[[], object]:
    """Return what runs a projection's convolution, and a block's end with both BatchNorms."""
    grad = _gradient(x, weight)
    other, (mean, var, gamma, beta) = torch.randn_like(grad), _vectors(grad)
    layout, count = (not weight.is_contiguous(), weight.dtype), grad.numel() // grad.shape[1]

    def run() -> object:
        z, z_mean, z_var = call("conv_bn_stats", x, weight, *GEOMETRY)
        theirs = (z, z_mean, z_var, bn_weight)
        y, bits = call(
            "dual_bn_act", other, mean, var, gamma, beta, *theirs, bn_bias, _EPS, eps, "relu"
        )
        kept = _bn.kept_result(y, bits)
        sums = call("dual_bn_act_backward_reduce", grad, other, mean, z, z_mean, kept, "relu")
        _, grad_z = call(
            "dual_bn_act_backward_apply", grad, other, mean, var, gamma, *theirs, kept, *sums,
            _EPS, eps, "relu", count,
        )  # fmt: skip
        call("conv_backward_weight", grad_z, x, weight.shape, *GEOMETRY, *layout)
        return call("conv_backward_data", grad_z, weight, x.shape, *GEOMETRY, None)

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
