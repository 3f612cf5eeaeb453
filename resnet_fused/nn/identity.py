"""A block with an identity shortcut as one node that runs by a plan of the CPU's kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resnet_fused.backends import _cpu_block, cpu, is_all_native
from resnet_fused.backends._cpu_block import BlockPlan, Convolution, Saved
from resnet_fused.backends._cpu_conv import is_dense
from resnet_fused.nn import recompute, train
from resnet_fused.ops import _bn

if TYPE_CHECKING:
    from resnet_fused.nn.program import Step

#: Tensors of a layer: the weight, gamma, beta.
_EACH = 3


def node(calls: Sequence[Step], bound: list[nn.Module], x: Tensor) -> Callable[[], Tensor] | None:
    """Return what runs a block of ``x``, or None where it has no plan or not all need gradients.

    The caller has seen that each call is on its own (:func:`train.taken`).
    """
    if cpu.available() is not None or not is_all_native() or not x.requires_grad:
        return None
    if x.is_neg() or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    norms: list[Any] = [bound[step.target.bn] for step in calls]
    convolutions, inputs, channels = [], [], x.shape[1]
    for step, bn in zip(calls, norms, strict=True):
        c = _convolution(bound[step.target.conv], bn)
        if not _fits(c.weight, bn.weight, bn.bias, channels):
            return None
        convolutions.append(c)
        inputs += [c.weight, bn.weight, bn.bias]
        channels = len(c.weight)
    plan = _cpu_block.plan(x, convolutions)
    if plan is None:
        return None
    memory = calls[-1].target.memory
    return functools.partial(_Identity.apply, plan, norms, memory, x, *inputs)


def _convolution(conv: Any, bn: Any) -> Convolution:
    return Convolution(conv.weight, *train.geometry_of(conv), bn.eps)


def _fits(weight: Tensor, gamma: Tensor | None, beta: Tensor | None, channels: int) -> bool:
    """Return whether kernels read parameters as they lie there, and all gradients are wanted."""
    if weight.dim() != 4 or weight.shape[1] != channels or not is_dense(weight):
        return False
    if not _is_wanted(weight):
        return False
    return all(
        v is not None
        and v.shape == weight.shape[:1]
        and v.dtype == torch.float32
        and v.is_contiguous()
        and _is_wanted(v)
        for v in (gamma, beta)
    )


def _is_wanted(t: Tensor) -> bool:
    return t.requires_grad and t.is_cpu and not t.is_neg()


class _Identity(torch.autograd.Function):
    """The block; it saves its input, and of each convolution what :class:`Saved` says."""

    @staticmethod
    def forward(
        ctx: Any, plan: BlockPlan, norms: Sequence[Any], memory: str, x: Tensor, *inputs: Tensor
    ) -> Tensor:
        """Run the block, and move the running statistics."""
        saved: list[Saved] = []
        read = x
        for i, bn in enumerate(norms):
            weight, gamma, beta = inputs[i * _EACH : (i + 1) * _EACH]
            read, mean, var = plan.convolve(i, read, weight, saved[-1] if saved else None)
            train.update(bn, mean, var, _bn.values_per_channel(read.shape), None)
            kept_beta = None if i == len(norms) - 1 else _bn.kept_bias(beta)
            saved.append(Saved(read, mean, var, weight, gamma, kept_beta))
        last, beta = saved[-1], inputs[-1]
        end = functools.partial(plan.end, last, beta, x)
        if memory == "low":
            vectors = (last.mean, last.var, last.gamma, beta)
            args = (last.z, *vectors, x, norms[-1].eps, "relu")
            y, bits = recompute.block_end("bn_act", *args, run=end)
        else:
            y, bits = end()
        kept = _bn.kept_result(y, bits)
        ctx.save_for_backward(x, *(t for each in saved for t in each), kept)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.layers = plan, len(norms)
        #: Where the block's input and output are among the saved tensors, if they are.
        ctx.place_of_x, ctx.place_of_y = 0, None if kept is bits else len(saved) * len(last) + 1
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of all parameters."""
        nothing = (None,) * 3  # for what is no tensor
        if grad is None:
            return *nothing, None, *(None,) * (ctx.layers * _EACH)
        x, *flat, kept = ctx.saved_tensors
        size = len(flat) // ctx.layers
        saved = [Saved(*flat[i : i + size]) for i in range(0, len(flat), size)]
        with torch.no_grad():
            grad_x, grads = ctx.plan.backward(grad.resolve_neg(), x, saved, kept)
        found = (grad_x, *(g for layer in grads for g in layer))
        if torch.is_grad_enabled():
            found = _NotTwice.apply(x, *found)
        return *nothing, *found


class _NotTwice(torch.autograd.Function):
    """Gradients that refuse to be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients; ``x`` has autograd record it."""
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Say what to do instead."""
        raise RuntimeError(
            "a fused block: double backward is not supported. Use rf.unfuse(model) to "
            "differentiate gradients"
        )
