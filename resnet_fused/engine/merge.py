"""Which calls of a captured pass become one call of an op: one function per pattern.

The calls of a pattern follow each other directly, and nobody else reads what lies between them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import (
    AUTO,
    ORDER,
    REFERENCE,
    choose,
    cpu,
    measured,
    onednn,
    requested,
)
from resnet_fused.backends._sizes import is_product
from resnet_fused.engine.capture import Call, Captured, Ref, fill, refs
from resnet_fused.engine.kernels import CONV, HEAD, MAX_POOL, pool_arguments
from resnet_fused.ops._checks import FLOAT_DTYPES

#: Whose stem is two kernels of its own: the engine runs these over planned buffers, in chunks of
#: images that stay in cache.
STEM_IN_TWO = (cpu, onednn)

PAIR = torch.ops.resnet_fused.conv_bn_act_conv_bn_act.default
STEM = torch.ops.resnet_fused.conv_bn_act_max_pool.default
_AVG_POOL = torch.ops.aten.adaptive_avg_pool2d.default
_FLATTEN = torch.ops.aten.flatten.using_ints
_LINEAR = torch.ops.aten.linear.default


def merge(captured: Captured) -> Captured:
    """Write every pattern that occurs as one call."""
    return merge_pairs(merge_stems(merge_heads(captured)))


def merge_heads(captured: Captured) -> Captured:
    """Write each average pool → flatten → linear as one call of avg_pool_linear.

    A backend asked for by name was not asked for an op that the model does not call.
    """
    if requested() in ORDER and not hasattr(ORDER[requested()], "avg_pool_linear"):
        return captured
    return _written(captured, list(heads(captured)), 3)


def heads(captured: Captured) -> Iterator[Call]:
    """Yield the call that each head could be, where the op takes its weights."""
    for pool, flatten, linear in _chains(captured, (_AVG_POOL, _FLATTEN, _LINEAR)):
        if flatten.args[1:] == (1,) and list(pool.args[1]) == [1, 1]:
            weight, bias = linear.args[1], linear.args[2] if len(linear.args) > 2 else None
            if _is_classifier(weight, bias):
                yield Call(HEAD, (pool.args[0], weight, bias), {}, linear.out)


def _is_classifier(weight: Any, bias: Any) -> bool:
    """Return whether avg_pool_linear takes the weights of a linear layer behind a pool.

    With one input feature the pooled map may have been one without a batch, (C, H, W).
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] < 2:
        return False
    if weight.dtype not in FLOAT_DTYPES:
        return False
    if bias is None:
        return True
    return (
        isinstance(bias, Tensor) and bias.shape == weight.shape[:1] and bias.dtype == weight.dtype
    )


def merge_stems(captured: Captured) -> Captured:
    """Write each stem as one call of conv_bn_act_max_pool, where one kernel runs it."""
    values = list(captured.examples)
    merged = [
        call
        for call in stems(captured)
        if _in_one_kernel("conv_bn_act_max_pool", fill(call.args, values))
    ]
    return _written(captured, merged, 2)


def stems(captured: Captured) -> Iterator[Call]:
    """Yield the call that each conv_bn_act without residual → max pool could be."""
    for conv, pool in _chains(captured, (CONV, MAX_POOL)):
        size, stride, padding, dilation, ceil_mode = pool_arguments(*pool.args[1:])
        if conv.args[4] is None and not ceil_mode and all(d == 1 for d in dilation):
            pairs = (tuple(_pair(value)) for value in (size, stride, padding))
            yield Call(STEM, (*conv.args[:4], *conv.args[5:], *pairs), {}, pool.out)


def _pair(value: list[int]) -> list[int]:
    return value if len(value) == 2 else value * 2


def merge_pairs(captured: Captured) -> Captured:
    """Write a conv_bn_act and its 1x1 as one call of conv_bn_act_conv_bn_act, where that is faster.

    Faster by measurement alone: for this very call the tuner found a backend that runs it whole to
    be faster than the two, each on the backend of its own choice. A backend asked for by name was
    not asked for this op.
    """
    if requested() != AUTO:
        return captured
    merged, dropped = [], set()
    for first, call in pairs(captured):
        args = fill(call.args, list(captured.examples))
        if measured("conv_bn_act_conv_bn_act", *args) not in (None, REFERENCE):
            merged.append(call)
            dropped.add(first.out)
    calls = tuple(call for call in captured.calls if call.out not in dropped)
    return _written(dataclasses.replace(captured, calls=calls), merged, 1)


def pairs(captured: Captured) -> Iterator[tuple[Call, Call]]:
    """Yield each conv_bn_act that one 1x1 alone reads, and the call that could be both.

    Only other calls of conv_bn_act stand between the two, such as the projection of a shortcut:
    they write nothing that is read before, so the first may as well run behind them.
    """
    readers = _readers(captured)
    earlier: dict[Ref, Call] = {}
    for call in captured.calls:
        if call.target is not CONV or call.kwargs:
            earlier.clear()
            continue
        first = earlier.pop(call.args[0], None)
        if first is not None and readers[first.out] == 1 and _is_pair(first, call):
            (*conv, _, stride, padding, dilation, _, act), second = first.args, call.args
            geometry = (stride, padding, dilation, act, second[9])
            yield first, Call(PAIR, (*conv, *second[1:5], *geometry), {}, call.out)
        else:
            earlier[Ref(call.out)] = call


def _is_pair(first: Call, second: Call) -> bool:
    """Return whether the second convolution is pointwise, and the first dense, without residual."""
    weight, (stride, padding, _, groups) = second.args[1], second.args[5:9]
    if not isinstance(weight, Tensor) or not is_product(weight.shape, stride, padding, groups):
        return False
    return first.args[4] is None and first.args[8] == 1


def _readers(captured: Captured) -> Counter[int]:
    """Return how often each value is read, by calls or as a result of the pass."""
    values = [*(ref for call in captured.calls for ref in refs(call)), *captured.outputs]
    return Counter(value.index for value in values if isinstance(value, Ref))


def _in_one_kernel(op: str, args: tuple[Any, ...]) -> bool:
    """Return whether what runs ``op`` here keeps on chip what a merged call no longer writes.

    The reference does not, nor do those of :data:`STEM_IN_TWO`.
    """
    try:
        run = choose(op, *args)
    except RuntimeError:  # A backend asked for by name was not asked for this op.
        return False
    return run is not None and all(run is not getattr(b, op, None) for b in STEM_IN_TWO)


def _chains(captured: Captured, targets: tuple[Any, ...]) -> Iterator[tuple[Call, ...]]:
    """Yield calls of ``targets`` in a row, each the only reader of the one before it.

    Nothing runs between them that might write what they read or switch autocast.
    """
    readers = _readers(captured)
    for start in range(len(captured.calls) - len(targets) + 1):
        chain = captured.calls[start : start + len(targets)]
        if tuple(call.target for call in chain) != targets or any(call.kwargs for call in chain):
            continue
        if all(
            after.args[0] == Ref(before.out) and readers[before.out] == 1
            for before, after in itertools.pairwise(chain)
        ):
            yield chain


def _written(captured: Captured, merged: list[Call], length: int) -> Captured:
    """Return the pass with each merged call in place of ``length`` calls, its own the last."""
    by_out = {call.out: call for call in merged}
    calls: list[Call] = []
    for call in captured.calls:
        calls.append(by_out.get(call.out, call))
        if call.out in by_out:
            del calls[-length:-1]
    return dataclasses.replace(captured, calls=tuple(calls))
