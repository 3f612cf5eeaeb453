"""Flags beside a module: plain globals that its forward, or what that calls, reads.

A graph holds what a forward did under them, so a program is run as long as they are as they were.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from resnet_fused.nn.child import PLAIN, likeness
from resnet_fused.nn.names import Names, names_of

#: How far calls are followed.
_DEPTH = 3


class Flag(NamedTuple):
    """A value by the name of the module, then of the global, then perhaps of an attribute."""

    module: str
    path: tuple[str, ...]
    like: Any

    def holds(self) -> bool:
        """Return whether the value is as it was."""
        return likeness(_at(self.module, self.path)) == self.like


_MISSING = object()


def _at(module: str, path: tuple[str, ...]) -> Any:
    found: Any = sys.modules.get(module)
    for name in path:
        found = getattr(found, "__dict__", {}).get(name, _MISSING)
    return found


def read_by(module: nn.Module) -> Iterator[Flag]:
    """Go through the flags that the forward of ``module``'s class reads, and those of its calls.

    Followed are the class's own methods and Python functions that are globals, but torch's. Some
    flags may come twice.
    """
    kind = type(module)
    seen: set[types.CodeType] = set()
    waiting = [(kind.forward, _DEPTH)]
    while waiting:
        function, depth = waiting.pop()
        function = inspect.unwrap(function)
        code = getattr(function, "__code__", None)
        if code is None or code in seen or _is_torchs(function.__module__):
            continue
        seen.add(code)
        scope = function.__globals__
        if vars(sys.modules.get(scope.get("__name__"), types)) is not scope:
            continue  # nothing would lead back to it
        names = _all_names(code)
        for path, value in _read(scope, names):
            yield Flag(scope["__name__"], path, likeness(value))
        called = [scope.get(name) for name in names.globals]
        called += [inspect.getattr_static(kind, name, None) for name in names.attributes]
        if depth:
            waiting += [(f, depth - 1) for f in called if isinstance(f, types.FunctionType)]


def _all_names(code: types.CodeType) -> Names:
    """Return what code names, with the functions that are written within it."""
    codes = [code]
    for one in codes:
        codes += [inner for inner in one.co_consts if isinstance(inner, types.CodeType)]
    globals_, attributes = (sum(found, ()) for found in zip(*map(names_of, codes), strict=True))
    return Names(globals_, attributes)


def _read(scope: dict[str, Any], names: Names) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Go through plain values, collections of them, and plain attributes of what is neither."""
    for name in names.globals:
        value = scope.get(name, _MISSING)
        if _is_plain(value):
            yield (name,), value
        elif not isinstance(value, type) and not _is_torchs(getattr(value, "__name__", "")):
            own = getattr(value, "__dict__", {})
            for attribute in names.attributes:
                if _is_plain(own.get(attribute, _MISSING)):
                    yield (name, attribute), own[attribute]


def _is_plain(value: Any) -> bool:
    """Return whether a value is plain or a collection of plain ones, and so can be pickled."""
    if isinstance(value, dict):
        value = (*value, *value.values())
    if isinstance(value, tuple | list):
        return all(isinstance(item, PLAIN) or _is_plain(item) for item in value)
    return isinstance(value, PLAIN)


def _is_torchs(name: Any) -> bool:
    return str(name).partition(".")[0] == "torch"
