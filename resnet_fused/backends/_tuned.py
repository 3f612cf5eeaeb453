"""Measured choices: which candidate runs a call, looked up by the call's signature.

:mod:`resnet_fused.tuning` measures and writes them down; here they are found again. On a GPU the
cache file is read at the first call on that device. On the CPU the fixed order is good, and a
choice holds only in a process that called ``tune`` on CPU tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _tuned_file
from resnet_fused.backends._tuned_file import Choice, Signature


@dataclass(slots=True)
class Entry:
    """A choice in force, and the function it was found to mean."""

    choice: Choice
    #: None before it was sought, and where the candidate no longer exists.
    run: Callable[..., Tensor] | None = None
    sought: bool = False


#: By device, what is in force there. A device that was never looked at has no table.
_tables: dict[torch.device, dict[Signature, Entry]] = {}
#: By device, the dtypes of which convolutions in training were measured.
_trained: dict[torch.device, frozenset[torch.dtype]] = {}
_loading = threading.Lock()


def signature(op: str, args: Sequence[Any]) -> Signature:
    """Return what the speed of a call depends on: shapes, dtypes, x's strides, geometry, act.

    The strides of a weight or residual are left out, as every backend has its own layout for them.
    On a GPU, float32 convolutions also depend on whether TF32 is allowed.
    """
    x = args[0]
    precision = None
    if x.dtype == torch.float32 and x.is_cuda:
        precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    # One expression of what tensors hold ready: this runs in every call of a tuned device.
    parts = [
        (a.dtype, a.shape) if isinstance(a, Tensor) else tuple(a) if isinstance(a, list) else a
        for a in args
    ]
    return (op, precision, x.stride(), *parts)


def lookup(op: str, args: Sequence[Any]) -> Entry | None:
    """Return what is in force for a call, or None if nothing was measured for it."""
    device = args[0].device
    table = _tables.get(device)
    if table is None:
        table = _first_look(device)
    return table.get(signature(op, args)) if table else None


def measured_on(device: torch.device) -> bool:
    """Return whether any choice is in force on a device."""
    table = _tables.get(device)
    return bool(_first_look(device) if table is None else table)


def remember(device: torch.device, choices: dict[Signature, Choice]) -> None:
    """Put choices that were measured here in force for this process."""
    table = _first_look(device)
    _trained[device] |= _trained_dtypes(choices)
    _tables[device] = {**table, **_entries(choices)}


def forget() -> None:
    """Drop all choices from memory; on a GPU the next call reads the cache file again."""
    _tables.clear()


def trains(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether convolutions of a training model of the dtype were measured on the device.

    By whoever uses it, not by those who shipped a table: that says which kernels are fastest, not
    that a step of theirs is.
    """
    if device not in _tables:
        _first_look(device)
    return dtype in _trained[device]


def _first_look(device: torch.device) -> dict[Signature, Entry]:
    with _loading:
        if device not in _tables:
            shipped: dict[Signature, Choice] = {}
            own: dict[Signature, Choice] = {}
            if device.type == "cuda":
                shipped, own = _tuned_file.shipped(device), _tuned_file.measured(device)
            _trained[device] = _trained_dtypes(own)
            _tables[device] = _entries({**shipped, **own})
        return _tables[device]


def _trained_dtypes(choices: dict[Signature, Choice]) -> frozenset[torch.dtype]:
    # Of a signature, the fourth part is the first tensor's dtype and shape.
    return frozenset(key[3][0] for key in choices if key[0] == "conv_bn_stats")


def _entries(choices: dict[Signature, Choice]) -> dict[Signature, Entry]:
    return {key: Entry(choice) for key, choice in choices.items()}
