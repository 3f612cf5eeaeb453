"""Weights that autocast casts, cast all together as a step that is a CUDA graph begins.

A ResNet-152 has a cast for each of 155 convolutions, of 2 to 4 us each on an H200 and few bytes.
What an unrecorded step casts it casts one by one, as it is told of no beginning.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused.backends import _derived
from resnet_fused.backends._derived import stamp


class _Twin(NamedTuple):
    parameter: weakref.ref[Tensor]
    narrow: Tensor


class Casts:
    """The casts of one step, noted as they are made, then made together."""

    def __init__(self) -> None:
        #: By a parameter's id and the dtype that it is cast to.
        self._twins: dict[tuple[int, torch.dtype], _Twin] = {}
        #: What the parameters were when they were last cast together.
        self._stamps: dict[tuple[int, torch.dtype], Any] = {}
        self._due = False
        #: The last making on a GPU.
        self._made: _derived.Made | None = None

    def begin(self) -> None:
        """Have the next cast make all that were noted, as a step begins."""
        self._due = True
        self._stamps.clear()

    @torch.no_grad()
    def _make(self) -> None:
        """Cast what was noted, in a few launches on the current stream."""
        pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for key, twin in self._twins.items():
            parameter = twin.parameter()
            if parameter is not None:
                self._stamps[key] = stamp(parameter)
                narrow, wide = pairs.setdefault(key[1], ([], []))
                narrow.append(twin.narrow)
                wide.append(parameter)
        for narrow, wide in pairs.values():
            torch._foreach_copy_(narrow, wide)
            if _derived.on_gpu(narrow[0]):
                self._made = _derived.Made(narrow[0].device, ())

    def cast(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a parameter in another dtype, from those that were made if it is as it was.

        A write through ``parameter.data`` after the first cast of a step is not seen.
        """
        if self._due:
            self._due = False
            self._make()
        key = id(parameter), dtype
        twin = self._twins.get(key)
        if twin is None or twin.parameter() is not parameter:
            self._twins[key] = _Twin(weakref.ref(parameter), parameter.detach().to(dtype))
            self._stamps.pop(key, None)
        elif self._stamps.get(key) == stamp(parameter):
            if self._made is not None:
                # Another stream may have met the first cast. Also in a recording, as every step of
                # one makes its own.
                self._made.wait()
            narrow: Tensor = _Made.apply(parameter, twin.narrow)
            return narrow
        return parameter.to(dtype)


class _Made(torch.autograd.Function):
    """A cast whose values are there already."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, narrow: Tensor) -> Tensor:
        """Return the values."""
        ctx.dtype = parameter.dtype
        return narrow.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Cast the gradient back."""
        return grad.to(ctx.dtype), None


class _Active(threading.local):
    casts: Casts | None = None


_active = _Active()


@contextlib.contextmanager
def together() -> Iterator[Casts]:
    """Have this thread's autocast take what the casts that it yields have made."""
    before, casts = _active.casts, Casts()
    _active.casts = casts
    try:
        yield casts
    finally:
        _active.casts = before


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an argument in the dtype that autocast casts it to."""
    if _active.casts is None or type(value) is not nn.Parameter:
        return value.to(dtype)
    return _active.casts.cast(value, dtype)
