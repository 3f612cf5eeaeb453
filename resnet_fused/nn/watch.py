"""Watching what a forward changes beside its results while it runs on symbols."""

from __future__ import annotations

import random
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class Watch:
    """Notes what happens to a module's state inside a ``with`` block, and undoes it.

    Seen are the attributes of the module and its submodules, the contents of the lists, dicts and
    sets and the values of the tensors among them, and torch's and Python's random numbers.
    Parameters and buffers are not: their uses stand in the graph.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        #: What was changed, once the block has ended; training flags do not count.
        self.changed: list[str] = []

    def __enter__(self) -> Watch:
        """Note the state."""
        self._before = [dict(m.__dict__) for m in self._modules]
        self._kept = [
            (name, value, _copy(value))
            for attributes in self._before
            for name, value in attributes.items()
            if isinstance(value, list | dict | set | Tensor)
        ]
        self._versions = [_version(value) for _, value, _ in self._kept]
        self._random = random.getstate(), torch.get_rng_state()
        return self

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
        if random.getstate() != self._random[0] or not torch.equal(
            torch.get_rng_state(), self._random[1]
        ):
            changed.append("the state of random numbers")
            random.setstate(self._random[0])
            torch.set_rng_state(self._random[1])
        self.changed = sorted(set(changed))


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
