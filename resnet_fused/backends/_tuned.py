"""Measured choices: which candidate runs a call, looked up by the call's signature.

:mod:`resnet_fused.tuning` measures and writes them down; here they are found again. On a GPU the
cache file is read at the first call on that device. On the CPU the fixed order is good, and a
choice holds only in a process that called ``tune`` on CPU tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _tuned_file
from resnet_fused.backends._tuned_file import Choice, Signature

_DTYPES = {getattr(torch, n): n for n in ("float32", "bfloat16", "float16", "float64")}

#: By device, the choices in force there. A device that was never looked at has none.
_tables: dict[torch.device, dict[Signature, Choice]] = {}
#: The functions that choices were found to mean, so that candidates are listed once a signature.
_functions: dict[tuple[torch.device, Signature], Callable[..., Tensor] | None] = {}
_loading = threading.Lock()


def signature(op: str, args: Sequence[Any]) -> Signature:
    """Return what the speed of a call depends on: shapes, dtypes, x's strides, geometry, act.

    The strides of a weight or residual are left out, as every backend has its own layout for them.
    On a GPU, float32 convolutions also depend on whether TF32 is allowed.
    """
    x = args[0]
    precision = None
    if x.dtype == torch.float32 and x.device.type == "cuda":
        precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return (op, precision, x.stride(), *map(_part, args))


def _part(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (_DTYPES.get(value.dtype), *value.shape)
    return tuple(value) if isinstance(value, list | tuple) else value


def lookup(op: str, args: Sequence[Any]) -> tuple[Signature, Choice] | None:
    """Return the signature of a call and the choice for it, or None if there is none."""
    device = args[0].device
    table = _tables.get(device)
    if table is None:
        table = _first_look(device)
    if not table:
        return None
    key = signature(op, args)
    choice = table.get(key)
    return None if choice is None else (key, choice)


def function(
    device: torch.device, key: Signature, find: Callable[[], Callable[..., Tensor] | None]
) -> Callable[..., Tensor] | None:
    """Return the function a choice means, found once; None if its candidate no longer exists."""
    known = (device, key)
    if known not in _functions:
        _functions[known] = find()
    return _functions[known]


def remember(device: torch.device, choices: dict[Signature, Choice]) -> None:
    """Put choices in force for this process."""
    for key in choices:
        _functions.pop((device, key), None)
    _tables[device] = {**_first_look(device), **choices}


def forget() -> None:
    """Drop all choices from memory; on a GPU the next call reads the cache file again."""
    _tables.clear()
    _functions.clear()


def _first_look(device: torch.device) -> dict[Signature, Choice]:
    with _loading:
        if device not in _tables:
            _tables[device] = _tuned_file.load(device) if device.type == "cuda" else {}
        return _tables[device]
