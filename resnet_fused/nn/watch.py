"""Watching what a forward changes beside its results while it runs on symbols."""

from __future__ import annotations

import functools
import inspect
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Watch:
    """Notes what happens to a module's state inside a ``with`` block, and undoes it.

    Seen are the attributes of the module and its submodules and the globals that its forward names:
    which they are, the contents of the lists, dicts and sets and the values of the tensors among
    them, also in an object of one's own; and the random numbers of torch, Python and NumPy, and of
    generators among the attributes and globals. Parameters and buffers are not: their uses stand in
    the graph.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        #: What was changed, once the block has ended; training flags do not count.
        self.changed: list[str] = []

    def __enter__(self) -> Watch:
        """Note the state."""
        self._before = [dict(m.__dict__) for m in self._modules]
        named = [*self._named()]
        self._kept = [
            (name, value, _copy(value))
            for name, value in named
            if isinstance(value, list | dict | set | Tensor)
        ]
        self._versions = [_version(value) for _, value, _ in self._kept]
        self._random = [*_sources_of_random(value for _, value in named)]
        self._drawn = [source.get() for source in self._random]
        return self

    def _named(self) -> Iterator[tuple[str, Any]]:
        """Go through what a forward may read and write, with names."""
        own = type(self._modules[0])
        names = getattr(inspect.unwrap(own.forward), "__code__", None)
        reached = getattr(inspect.unwrap(own.forward), "__globals__", {})
        read = names.co_names if names is not None else ()
        globals_read = {name: reached[name] for name in read if name in reached}
        for attributes in (globals_read, *self._before):
            for name, value in attributes.items():
                yield name, value
                if _is_ones_own(value):
                    yield name, vars(value)
                    yield from ((f"{name}.{inner}", v) for inner, v in vars(value).items())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Compare with the state before, and restore it."""
        changed: list[str] = []
        for module, before in zip(self._modules, self._before, strict=True):
            now = module.__dict__
            names = {*now, *before} - {"training"}
            changed += [n for n in names if now.get(n, _MISSING) is not before.get(n, _MISSING)]
            now.clear()
            now.update(before)
        for (name, value, kept), version in zip(self._kept, self._versions, strict=True):
            if _version(value) != version or not _same(value, kept):
                changed.append(name)
                _restore(value, kept)
        for source, drawn in zip(self._random, self._drawn, strict=True):
            if not same_state(source.get(), drawn):
                changed.append("the state of random numbers")
                source.set(drawn)
        self.changed = sorted(set(changed))


class Random(NamedTuple):
    """Where random numbers come from: its state."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]


def random_outside_torch() -> Iterator[Random]:
    """Return what Python's and NumPy's own random numbers come from."""
    yield Random(random.getstate, random.setstate)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield Random(numpy.random.get_state, numpy.random.set_state)


def _sources_of_random(values: Iterator[Any]) -> Iterator[Random]:
    """Return those, torch's own, and the generators among some values."""
    yield from random_outside_torch()
    yield Random(torch.get_rng_state, torch.set_rng_state)
    numpy = sys.modules.get("numpy")
    for value in values:
        if isinstance(value, random.Random):
            yield Random(value.getstate, value.setstate)
        elif isinstance(value, torch.Generator) or (
            numpy is not None and isinstance(value, numpy.random.RandomState)
        ):
            yield Random(value.get_state, value.set_state)
        elif numpy is not None and isinstance(value, numpy.random.Generator):
            bits = value.bit_generator
            yield Random(
                functools.partial(getattr, bits, "state"), functools.partial(setattr, bits, "state")
            )


def same_state(a: Any, b: Any) -> bool:
    """Return whether two states of a source of random numbers are the same."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    # NumPy's have arrays among their parts.
    return pickle.dumps(a) == pickle.dumps(b)


def _is_ones_own(value: Any) -> bool:
    """Return whether a value is an object of a class that is neither torch's nor Python's."""
    if isinstance(value, nn.Module | Tensor | type) or callable(value):
        return False
    known = type(value).__module__.partition(".")[0] in ("torch", "builtins", "numpy")
    return not known and isinstance(getattr(value, "__dict__", None), dict)


_MISSING = object()


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value.copy()


def _version(value: Any) -> int:
    # Tensors made in inference mode count no versions.
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _same(value: Any, kept: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    pairs = (value.items(), kept.items()) if isinstance(value, dict) else (value, kept)
    return len(value) == len(kept) and all(_identical(a, b) for a, b in zip(*pairs, strict=True))


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_identical, a, b))
    return a is b


def _restore(value: Any, kept: Any) -> None:
    if isinstance(value, Tensor):
        with torch.no_grad():
            value.copy_(kept)
        return
    value.clear()
    value.extend(kept) if isinstance(value, list) else value.update(kept)
