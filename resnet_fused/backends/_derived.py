"""Values derived from parameters, kept until a parameter changes. They never enter a state_dict."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

#: By the id of the first source: its values, by key. Gone with that tensor.
_cache: dict[int, dict[Hashable, _Kept]] = {}


class _Kept:
    """A value and the state of its sources when it was made."""

    def __init__(self, sources: tuple[Tensor | None, ...], value: Any) -> None:
        # None answers "is it the same tensor" like any other source that has gone.
        self._sources = [(_nothing if s is None else weakref.ref(s), _stamp(s)) for s in sources]
        self.value = value

    def holds(self, sources: tuple[Tensor | None, ...]) -> bool:
        """Return whether the sources are the same tensors, not written since."""
        # A loop, as this runs in every call of every layer. A stamp is taken of a tensor known from
        # before only: no other is sure to have a version counter.
        for source, (known, stamp) in zip(sources, self._sources, strict=True):
            if known() is not source or _stamp(source) != stamp:
                return False
        return True


def derived(sources: tuple[Tensor | None, ...], key: Hashable, make: Callable[[], T]) -> T:
    """Return ``make()``, or what it returned before if no source has changed since.

    A source counts as changed when it is another tensor, lives in other memory, or was written in
    place (its version counter moved). Writing through ``tensor.data`` moves no counter and is not
    seen: write under ``torch.no_grad()`` instead. Tensors made in inference mode have no counter,
    and those of torch's function transforms and fake tensors no memory; nothing is kept for them.

    Args:
        sources: the tensors the value depends on; the value lives as long as the first one.
        key: what else it depends on, and which value it is.
        make: computes the value.
    """
    first = sources[0]
    values = _cache.get(id(first))
    kept = values.get(key) if values is not None else None
    if kept is not None and kept.holds(sources):
        return kept.value
    value = make()
    if first is not None and all(s is None or _countable(s) for s in sources):
        if values is None:
            values = _cache.setdefault(id(first), {})
            weakref.finalize(first, _cache.pop, id(first), None)
        values[key] = _Kept(sources, value)
    return value


def _nothing() -> None:
    return None


def _stamp(source: Tensor | None) -> tuple[int, int, torch.dtype] | None:
    return None if source is None else (source._version, source.data_ptr(), source.dtype)


def _countable(source: Tensor) -> bool:
    return (
        type(source) in (Tensor, nn.Parameter, nn.Buffer)
        and not source.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(source)
    )
