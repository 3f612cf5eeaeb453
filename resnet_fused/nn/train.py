"""Fused groups in training mode: live BatchNorm, and activations that are never written.

A group's result is either a tensor, or *pending*: the raw output of its convolution with the
batch's statistics. A pending result goes into the next convolution (which normalises it as it
reads), into a block's end (as the projection shortcut) or into the stem's max pool; nothing else
ever sees one.
"""

from __future__ import annotations

import contextlib
import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from resnet_fused.backends import trains
from resnet_fused.backends._sizes import output_shape
from resnet_fused.nn import pointwise, recompute
from resnet_fused.nn.bn import BATCH_NORMS, sharing_group, uses_batch_statistics
from resnet_fused.ops import _bn, _direct, _shared
from resnet_fused.ops._checks import AUTOCAST_DEVICES

#: The largest side of a pool's window that every backend's byte index can name.
LARGEST_POOL = 16


class Pending(NamedTuple):
    """act(BN(x)), not computed: ``x`` is a convolution's output, ``mean`` and ``var`` its own."""

    x: Tensor
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    act: str | None


class Ran(NamedTuple):
    """What :func:`run` made."""

    result: Tensor | Pending
    #: The input for the readers after this one; autograd brings their gradients here first.
    x: Tensor | Pending


def _raw(result: Tensor | Pending) -> Tensor:
    """Return the tensor, of a pending result what is there of it."""
    return result.x if isinstance(result, Pending) else result


def value(result: Tensor | Pending) -> Tensor:
    """Return the result as a tensor."""
    if not isinstance(result, Pending):
        return result
    *vectors, eps, act = result
    y, _ = _direct.record("bn_act", *vectors, None, eps, act)
    return y


class Map(NamedTuple):
    """What of a map decides who computes with it; a tensor is as good."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def run(
    conv: nn.Module,
    bn: nn.Module,
    x: Tensor | Pending,
    residual: Tensor | Pending | None,
    act: str | None,
    memory: str,
    *,
    read_again: bool,
) -> Ran | None:
    """Run convolution, statistics and block end; the result of a group without add is pending.

    With ``memory="low"`` block ends are computed again in backward. ``read_again`` says whether x
    has readers after this one.

    Returns:
        None where :func:`taken` says that this call is torch's.

    Raises:
        ValueError: a channel has one value only, as torch raises.
    """
    made = taken(conv, bn, _raw(x), None if residual is None else _raw(residual))
    if made is None:
        return None
    return run_taken(conv, bn, x, residual, act, memory, made, read_again=read_again)


def taken(
    conv: nn.Module, bn: nn.Module, x: Tensor | Map, residual: Tensor | Map | None
) -> Map | None:
    """Return what :func:`run` would give, or None where this call is torch's.

    It is where :func:`_applies` says so; where nothing of ours is faster; where the residual is not
    of the convolution's shape and dtype; and where the batch is empty.

    Raises:
        ValueError: a channel has one value only, as torch raises.
    """
    if not _applies(conv, bn, x):
        return None
    assert isinstance(conv, nn.Conv2d)
    shape = output_shape(x.shape, conv.weight.shape, *geometry_of(conv)[:3])
    dtype, group = result_dtype(x), sharing_group(bn)
    # SyncBatchNorm pays always, in fewer collectives than torch's, and on the CPU at all.
    # Without math.prod: torch.compile, behind a run of activation checkpointing, does not trace it.
    n, _, oh, ow = shape
    macs = n * oh * ow * conv.weight.numel() if group is None else math.inf
    if not trains(x.device, dtype, macs):
        return None
    if residual is not None and (residual.shape != shape or residual.dtype != dtype):
        return None
    count = _bn.values_per_channel(shape)
    if group is None and count < 2:
        if count == 0:
            return None
        raise ValueError(
            "Expected more than 1 value per channel when training, "
            f"got input size {torch.Size(shape)}"
        )
    return Map(shape, dtype, x.device)


def run_taken(
    conv: Any,
    bn: Any,
    x: Tensor | Pending,
    residual: Tensor | Pending | None,
    act: str | None,
    memory: str,
    made: Map,
    *,
    read_again: bool,
) -> Ran:
    """Do what :func:`run` does, where :func:`taken` returned ``made``."""
    raw = _raw(x)
    count = _bn.values_per_channel(made.shape)
    geometry = geometry_of(conv)
    if memory != "low" and pointwise.takes(conv, bn, raw, geometry, residual, made.dtype, act):
        end = (value(x), conv.weight, bn.weight, bn.bias, residual, bn.eps, act)
        y, mean, var, *_ = _direct.record(pointwise.OP, *end)
        update(bn, mean, var, count, None)
        return Ran(y, x)
    # Where autocast would cast the activation, it has to be there.
    pending = isinstance(x, Pending) and made.dtype == raw.dtype
    read = x if pending else value(x)
    read_again = read_again and not isinstance(x, Pending) and made.dtype == raw.dtype
    y, mean, var, read = _convolve(conv.weight, read, geometry, memory, read_again=read_again)
    if conv.bias is not None:
        # The bias leaves no trace in BatchNorm's result but where it is not finite, as in torch.
        trace = 0 * conv.bias.detach()
        mean, var = mean + trace, var + trace
        y = _Biased.apply(y, conv.bias)
    group = sharing_group(bn)
    if group is not None:
        mean, var = _shared.join(mean, var, count, group)
    batch_mean = mean if conv.bias is None else mean + conv.bias.detach()
    update(bn, batch_mean, var, count, _shared.shared(mean))
    result = Pending(y, mean, var, bn.weight, bn.bias, bn.eps, act)
    return Ran(result if residual is None else _finish(result, residual, memory), read)


def _applies(conv: nn.Module, bn: nn.Module, x: Tensor | Map) -> bool:
    """Return whether the ops of training compute what the two modules would, called now.

    They do for torch's own BatchNorm2d and SyncBatchNorm where that would normalise by the batch's
    statistics. torch.compile gets SyncBatchNorm as torch wrote it.
    """
    if type(conv) is not nn.Conv2d or type(bn) not in BATCH_NORMS or not uses_batch_statistics(bn):
        return False
    if conv.padding_mode != "zeros" or conv.padding == "same":
        return False
    # torch says what is wrong, before any statistic moves
    if conv.out_channels != bn.num_features:
        return False
    if conv.weight.dtype != x.dtype and not _autocasts(x.device.type):
        return False
    if torch.compiler.is_compiling() and sharing_group(bn) is not None:
        return False
    return len(x.shape) == 4


def is_torchs(conv: nn.Module | None, bn: nn.Module | None) -> bool:
    """Return whether :func:`run` leaves the two modules to torch in training, whatever the size.

    Not where BatchNorm, called now, is no training: then they are a scale and a shift.
    """
    if type(conv) is not nn.Conv2d or bn is None or not uses_batch_statistics(bn):
        return False
    if sharing_group(bn) is not None:
        return False
    # Last, as torch.compile cannot trace the first look at a device, and eval needs none.
    weight = conv.weight
    return not trains(weight.device, result_dtype(weight), sys.maxsize)


class _Biased(torch.autograd.Function):
    """A convolution's output whose bias is left to BatchNorm's running mean, for its gradient.

    That is the sum of the output's gradient, as in torch: zero, were it not for rounding.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        """Return y."""
        ctx.dtype = bias.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hand y's gradient on, and sum it for the bias."""
        wanted = ctx.needs_input_grad[1]
        return grad, grad.sum((0, 2, 3), dtype=ctx.dtype) if wanted else None


def _convolve(
    weight: Tensor,
    x: Tensor | Pending,
    geometry: tuple[object, ...],
    memory: str,
    *,
    read_again: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | Pending]:
    """Return the output, its statistics, and x for its further readers."""
    if isinstance(x, Pending):
        *vectors, eps, act = x
        op = "bn_act_conv_bn_stats"
        return *_direct.record(op, *vectors, weight, eps, act, *geometry), x
    op = "conv_bn_stats"
    hands_on = read_again and _direct.records(x) and not torch.compiler.is_compiling()
    with recompute.reading(x) if memory == "low" else contextlib.nullcontext():
        if not hands_on:
            return *_direct.record(op, x, weight, *geometry), x
        *made, again = _direct.record_handing_on(op, x, weight, *geometry)
    if memory == "low":
        recompute.rename(x, again)
    return *made, again


def _finish(result: Pending, residual: Tensor | Pending, memory: str) -> Tensor:
    *vectors, eps, act = result
    if isinstance(residual, Pending) and residual.act is None and _one_batch(result, residual):
        *others, other_eps, _ = residual
        name, args = "dual_bn_act", (*vectors, *others, eps, other_eps, act)
    else:
        name, args = "bn_act", (*vectors, value(residual), eps, act)
    y, _ = (recompute.block_end if memory == "low" else _direct.record)(name, *args)
    return y


def _one_batch(result: Pending, residual: Pending) -> bool:
    """Return whether the same processes share what both are normalised by."""
    first, second = _shared.shared(result.mean), _shared.shared(residual.mean)
    return (first and first.group) is (second and second.group)


def pool(module: nn.Module, x: Tensor | Pending) -> Tensor:
    """Return ``module``, without hooks, of ``x``.

    Of a pending result a square max pool is one op; anything else takes its value. The average of
    whole maps in channels_last has its gradient written in channels_last.
    """
    if not isinstance(x, Pending):
        return _Averaged.apply(x, module) if _averages(module, x) else module(x)
    plain = type(module) is nn.MaxPool2d and not (module.return_indices or module.ceil_mode)
    if not plain or _pair(module.dilation) != (1, 1):
        return module(value(x))
    sizes = [_pair(v) for v in (module.kernel_size, module.stride, module.padding)]
    if any(first != second for first, second in sizes) or max(sizes[0]) > LARGEST_POOL:
        return module(value(x))
    *vectors, eps, act = x
    return _direct.record("bn_act_max_pool", *vectors, eps, act, *sizes)[0]


def _averages(module: nn.Module, x: Any) -> bool:
    """Return whether ``module`` averages whole maps in channels_last, in training.

    torch.compile lays gradients out itself. Hooks for all modules want the module's own node.
    """
    if type(module) is not nn.AdaptiveAvgPool2d or module.output_size not in (1, (1, 1)):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _has_any_global_hook():
        return False
    if type(x) is not Tensor or x.dim() != 4:
        return False
    if not (module.training and x.requires_grad and torch.is_grad_enabled()):
        return False
    # Maps of one pixel or channel are both, and torch's gradient is as it should be.
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class _Averaged(torch.autograd.Function):
    """A global average pool whose gradient is channels_last, as the block in front of it wants it.

    torch writes it in NCHW whatever the map was, and the block's end would copy it first: on a CPU
    pool, gradient and copy take 2 to 2.8 times as long (2048 channels of 7x7, batch 8 and 32,
    bfloat16 and float32, one thread; from a script that is not kept).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        """Return torch's own average."""
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return module(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Write each channel's share at all of its pixels, rounded once, as torch does."""
        share = (grad / math.prod(ctx.shape[2:])).to(ctx.dtype)
        return share.expand(ctx.shape).contiguous(memory_format=torch.channels_last), None


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    first, second = value if len(value) == 2 else tuple(value) * 2
    return first, second


def update(bn: Any, mean: Tensor, var: Tensor, count: int, batch: _shared.Shared | None) -> None:
    """Move the running statistics as ``BatchNorm2d.forward`` does."""
    if bn.training and bn.track_running_stats and bn.running_mean is not None:
        if batch is not None:
            # The op makes the variance unbiased by a count that it has to know; for 2, it doubles.
            var, count = var * (batch.values / (batch.values - 1) / 2).to(var.dtype), 2
        running = bn.running_mean, bn.running_var, bn.num_batches_tracked
        # Nothing to average over: torch then moves nothing, and the op refuses.
        momentum = 0.0 if bn.momentum is None and running[2] is None else bn.momentum
        _direct.record("bn_update_stats", *running, mean, var, count, momentum)


def geometry_of(conv: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
    """Return a convolution's stride, padding and dilation, two numbers each, and its groups.

    Its attributes may have been set to one number, or to a list, since it was made. Of the words
    for padding only "valid" is taken.
    """
    padding = (0, 0) if isinstance(conv.padding, str) else _pair(conv.padding)
    return _pair(conv.stride), padding, _pair(conv.dilation), conv.groups


def result_dtype(x: Tensor | Map) -> torch.dtype:
    """Return the dtype of a convolution of ``x``, under autocast or not."""
    if isinstance(x, Map):
        return x.dtype  # a convolution's own
    device = x.device.type
    if x.dtype == torch.float64 or not _autocasts(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def _autocasts(device: str) -> bool:
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
