"""What each op is, once more and apart: the chain of torch calls a user would write."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from devices import device_of
from torch import Tensor

import resnet_fused as rf
from resnet_fused.backends import ORDER
from resnet_fused.ops import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = [b.name for b in rf.backends() if b.available]
#: Every op with every backend that is here and has it.
PAIRS = [(op, b) for op in OPS for b in BACKENDS if b == "reference" or hasattr(ORDER[b], op)]


def _batch_norm(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """F.batch_norm as scale and shift alone: mean 0, variance 1, eps 0."""
    if scale is None and shift is None:
        return y
    scale = torch.ones_like(shift) if scale is None else scale
    shift = torch.zeros_like(scale) if shift is None else shift
    mean, variance = torch.zeros_like(scale), torch.ones_like(scale)
    return F.batch_norm(y, mean.detach(), variance.detach(), scale, shift, eps=0.0)


def _conv_bn_act(relu, x, weight, scale, shift, residual, stride, padding, dilation, groups, act):
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return _bn_apply(relu, y, scale, shift, residual, act)


def _bn_apply(relu, x, scale, shift, residual, act):
    y = _batch_norm(x, scale, shift)
    y = y if residual is None else y + residual
    return relu(y) if act == "relu" else y


def _add_relu(relu, x, residual):
    return relu(x + residual)


_FORMULAS = {"conv_bn_act": _conv_bn_act, "bn_apply": _bn_apply, "add_relu": _add_relu}


def eager(op: str, args: tuple, relu: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
    """Compute ``op`` the eager way, with another ReLU if asked; an op without a formula here is
    held to its own reference."""
    formula = _FORMULAS.get(op)
    return OPS[op].reference(*args) if formula is None else formula(relu, *args)


def call(op: str, args: tuple) -> Tensor:
    return getattr(torch.ops.resnet_fused, op)(*args)


def declined(op: str, backend: str, args: tuple) -> str:
    """Why ``backend`` does not run this call; empty if it does."""
    with rf.use_backend(backend):
        return next(v.reason for v in rf.explain(op, *args) if v.name == backend)


def samples(op: str, dtype: torch.dtype, backend: str | None = None) -> list[tuple]:
    """The op's samples in ``dtype``, those that ``backend`` runs."""
    drawn = OPS[op].samples(device_of(backend), dtype)
    return [args for args in drawn if backend is None or not declined(op, backend, args)]


def reduced(op: str, args: tuple, out: Tensor) -> int:
    """How many products each element of the result sums."""
    shapes = [a.shape if isinstance(a, Tensor) else a for a in args]
    return max(1, OPS[op].flops(*shapes, out_shape=out.shape) // (2 * max(out.numel(), 1)))


def tensor_arguments(args: tuple) -> list[int]:
    return [i for i, a in enumerate(args) if isinstance(a, Tensor)]
