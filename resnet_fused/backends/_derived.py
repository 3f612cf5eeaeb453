"""Values derived from parameters, kept until a parameter changes. They never enter a state_dict."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")

_lock = threading.Lock()
_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def derived(sources: tuple[Tensor | None, ...], key: Hashable, make: Callable[[], T]) -> T:
    """Return ``make()``, or what it returned before if no source has changed since.

    A source counts as changed when it is another tensor, lives in other memory, or was written in
    place (its version counter moved). Writing through ``tensor.data`` moves no counter and is not
    seen: write under ``torch.no_grad()`` instead. Tensors made in inference mode have no counter;
    nothing is kept for them.

    Args:
        sources: the tensors the value depends on; the value lives as long as the first one.
        key: what else it depends on, and which value it is.
        make: computes the value.
    """
    first = sources[0]
    if first is None or any(s is not None and s.is_inference() for s in sources):
        return make()
    stamp = tuple(None if s is None else (s._version, s.data_ptr(), s.dtype) for s in sources)
    with _lock:
        kept = _cache.get(first, {}).get(key)
    if kept is not None and kept[0] == stamp and _same(kept[1], sources):
        return kept[2]
    value = make()
    entry: Any = (stamp, [None if s is None else weakref.ref(s) for s in sources], value)
    with _lock:
        _cache.setdefault(first, {})[key] = entry
    return value


def _same(
    kept: list[weakref.ReferenceType[Tensor] | None], sources: tuple[Tensor | None, ...]
) -> bool:
    return all((r() if r is not None else None) is s for r, s in zip(kept, sources, strict=True))
