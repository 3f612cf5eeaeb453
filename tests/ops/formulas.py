"""What each op is, once more and apart: the chain of torch calls a user would write."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from devices import device_of
from torch import Tensor

import resnet_fused as rf
from resnet_fused.backends import ORDER
from resnet_fused.ops import INFERENCE, OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = [b.name for b in rf.backends() if b.available]
#: Every op with every backend that is here and has it.
PAIRS = [(op, b) for op in INFERENCE for b in BACKENDS if b == "reference" or hasattr(ORDER[b], op)]


def _batch_norm(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """F.batch_norm as scale and shift alone: mean 0, and variance + eps exactly 1."""
    if scale is None and shift is None:
        return y
    scale = torch.ones_like(shift) if scale is None else scale
    shift = torch.zeros_like(scale) if shift is None else shift
    eps = 2.0**-8  # not 0, which some versions of torch refuse; exact in every dtype
    mean, variance = torch.zeros_like(scale), torch.full_like(scale, 1 - eps)
    return F.batch_norm(y, mean.detach(), variance.detach(), scale, shift, eps=eps)


class Choices(NamedTuple):
    """The two functions that choose among values, so that a gradient test can fix the choice."""

    relu: Callable[[Tensor], Tensor] = torch.relu
    #: Of the map between two convolutions.
    inner_relu: Callable[[Tensor], Tensor] = torch.relu
    #: Of (map, size, stride, padding).
    max_pool: Callable[..., Tensor] = F.max_pool2d


TORCHS_OWN = Choices()


def _conv_bn_act(
    choices, x, weight, scale, shift, residual, stride, padding, dilation, groups, act
):
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return _bn_apply(choices, y, scale, shift, residual, act)


def _conv_bn_act_max_pool(choices, x, weight, scale, shift, *rest):
    *geometry, act, size, stride, padding = rest
    y = _conv_bn_act(choices, x, weight, scale, shift, None, *geometry, None)
    # The ReLU behind the pool: the same values and gradients, and its mask is the result's sign.
    y = choices.max_pool(y, size, stride, padding)
    return choices.relu(y) if act == "relu" else y


def _conv_bn_act_conv_bn_act(
    choices, x, weight, scale, shift, weight2, scale2, shift2, residual, *rest
):
    stride, padding, dilation, act, act2 = rest
    y = _batch_norm(F.conv2d(x, weight, None, stride, padding, dilation), scale, shift)
    y = choices.inner_relu(y) if act == "relu" else y
    return _bn_apply(choices, F.conv2d(y, weight2), scale2, shift2, residual, act2)


def _bn_apply(choices, x, scale, shift, residual, act):
    y = _batch_norm(x, scale, shift)
    y = y if residual is None else y + residual
    return choices.relu(y) if act == "relu" else y


def _add_relu(choices, x, residual):
    return choices.relu(x + residual)


def _avg_pool_linear(choices, x, weight, bias):
    return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)


_FORMULAS = {
    "conv_bn_act": _conv_bn_act,
    "conv_bn_act_max_pool": _conv_bn_act_max_pool,
    "conv_bn_act_conv_bn_act": _conv_bn_act_conv_bn_act,
    "bn_apply": _bn_apply,
    "add_relu": _add_relu,
    "avg_pool_linear": _avg_pool_linear,
}


def eager(op: str, args: tuple, choices: Choices = TORCHS_OWN) -> Tensor:
    """Compute ``op`` the eager way, with other choices if asked; an op without a formula here is
    held to its own reference."""
    formula = _FORMULAS.get(op)
    return OPS[op].reference(*args) if formula is None else formula(choices, *args)


def own_choices(op: str, args: tuple, out: Tensor) -> Choices:
    """What the op chose when it gave ``out``: where its ReLU passes, which values its pool took."""
    relu = functools.partial(torch.mul, out > 0)
    if op == "conv_bn_act_conv_bn_act":
        between = call("conv_bn_act", (*args[:4], None, *args[8:11], 1, args[11]))
        return Choices(relu, functools.partial(torch.mul, between > 0))
    if op != "conv_bn_act_max_pool":
        return Choices(relu)
    chosen = call("conv_bn_act", (*args[:4], None, *args[4:9]))
    _, indices = F.max_pool2d(chosen, *args[9:], return_indices=True)

    def take(y: Tensor, *pool: object) -> Tensor:
        return y.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)

    return Choices(relu, max_pool=take)


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


def reduced(op: str, args: tuple) -> int:
    """How many terms each element of the result sums, of the map where a maximum follows."""
    named = dict(zip(inspect.signature(OPS[op].check).parameters, args, strict=True))
    pixels = named["x"].shape[2:].numel() if op == "avg_pool_linear" else 1
    weights = [named[name] for name in ("weight", "weight2") if name in named]
    return sum(weight[0].numel() for weight in weights) * pixels or 1


def tensor_arguments(args: tuple) -> list[int]:
    return [i for i, a in enumerate(args) if isinstance(a, Tensor)]
