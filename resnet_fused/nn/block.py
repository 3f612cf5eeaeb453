"""A block in training as one node of autograd, on the CPU, where Python between kernels costs most.

That is a program of convolutions with their BatchNorms alone, from one map to another. On a GPU a
captured step waits for no Python.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resnet_fused.nn import identity, recompute, train
from resnet_fused.nn.bn import sharing_group
from resnet_fused.ops import _direct
from resnet_fused.ops._tape import Node

if TYPE_CHECKING:
    from resnet_fused.nn.program import FusedCall, Step


def is_block(steps: Sequence[Step]) -> bool:
    """Return whether all steps are fused calls, two or more, and the last one's result is all."""
    *calls, end = steps
    fused = len(calls) > 1 and all(step.kind == "fused" for step in calls)
    return fused and calls[-1].target.adds and getattr(end.args, "index", None) == calls[-1].out


def has_identity(steps: Sequence[Step]) -> bool:
    """Return whether a block's convolutions follow each other, with ReLUs, and x is added."""
    *calls, _ = steps
    reads = [tuple(slot.index for slot in step.args) for step in calls]
    chain = [(0,), *((step.out,) for step in calls[:-2]), (calls[-2].out, 0)]
    ends = all(step.target.act == "relu" for step in calls)
    return reads == chain and ends and all(step.target.defers for step in calls[:-1])


def run(
    steps: Sequence[Step], bound: list[nn.Module], slots: int, x: Any, *, identity_shortcut: bool
) -> Tensor | None:
    """Run a block's steps, or return None where each of its ops has to be a node of its own."""
    if not _may(x):
        return None
    calls = [step for step in steps if step.kind == "fused"]
    made = _made(calls, bound, slots, x)
    if made is None:
        return None
    inputs = [x, *_parameters(calls, bound)]
    if _direct.watched(inputs) or not any(t.requires_grad for t in inputs):
        return None
    node = identity.node(calls, bound, x) if identity_shortcut else None
    if node is None:
        node = _taped(calls, bound, slots, made, inputs)
    with _past_autocast():
        low = calls[-1].target.memory == "low"
        y: Tensor = recompute.as_one_node(x, node) if low else node()
    return y


def _taped(
    calls: Sequence[Step],
    bound: list[nn.Module],
    slots: int,
    made: Sequence[train.Map],
    inputs: Sequence[Tensor],
) -> Callable[[], Tensor]:
    """Return what runs the calls as a node whose ops go on a tape."""

    def compute() -> Tensor:
        results: list[Any] = [inputs[0], *[None] * (slots - 1)]
        for step, result in zip(calls, made, strict=True):
            call: FusedCall = step.target
            place = step.args[0].index
            residual = results[step.args[1].index] if call.adds else None
            ran = train.run_taken(
                bound[call.conv], bound[call.bn], results[place], residual, call.act, call.memory,
                result, read_again=place not in step.frees,
            )  # fmt: skip
            results[place] = ran.x
            results[step.out] = ran.result if call.defers else train.value(ran.result)
        y: Tensor = results[calls[-1].out]
        return y

    return functools.partial(Node.apply, compute, *inputs)


def _may(x: Any) -> bool:
    """Return whether a block of ``x`` may be one node: nobody wants to see its ops."""
    if type(x) is not Tensor or not x.is_cpu or not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return False
    return train.result_dtype(x) == x.dtype  # else autocast casts, as nodes of its own


def _made(
    calls: Sequence[Step], bound: list[nn.Module], slots: int, x: Tensor
) -> list[train.Map] | None:
    """Return what each call gives, or None if one of them is not on its own."""
    maps: list[Any] = [x, *[None] * (slots - 1)]
    for step in calls:
        call: FusedCall = step.target
        conv, bn = bound[call.conv], bound[call.bn]
        residual = maps[step.args[1].index] if call.adds else None
        made = train.taken(conv, bn, maps[step.args[0].index], residual)
        if made is None or sharing_group(bn) is not None or conv.bias is not None:
            return None
        if conv.weight.dtype not in (torch.float32, x.dtype):
            return None  # autocast casts it, or an op says what is wrong with it
        maps[step.out] = made
    return [maps[step.out] for step in calls]


def _parameters(calls: Sequence[Step], bound: list[nn.Module]) -> list[Tensor]:
    found: list[Tensor | None] = []
    for step in calls:
        call: FusedCall = step.target
        bn: Any = bound[call.bn]
        found += (bound[call.conv].weight, bn.weight, bn.bias)  # type: ignore[arg-type]
    # A parameter that two layers share is one input.
    return list({id(p): p for p in found if p is not None}.values())


@contextlib.contextmanager
def _past_autocast() -> Iterator[None]:
    """Leave autocast, which has nothing to cast here."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        yield
