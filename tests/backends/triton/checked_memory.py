"""A pytest plugin that watches the memory of kernels in Triton's interpreter.

The interpreter runs one program after another, in one order, on memory that nothing guards: it
shows no race and no stray address, and what was never written is often zero there. With
``-p checked_memory`` a launch fails

- that loads or stores outside of the tensors it was given,
- that stores twice to one address,
- that loads where it stores, unless one program does both, and loads first: on a GPU, whichever
  comes first.

Memory that nothing wrote holds NaN, or the largest integer.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor


class Watch:
    """The interpreter's own functions, and the addresses that a launch gives them, in order."""

    def __init__(self, functions: Any) -> None:
        self._functions = functions
        self._programs: list[int] = []
        self.loaded: list[tuple[np.ndarray, int]] = []
        self.stored: list[tuple[np.ndarray, int]] = []

    def load(self, addresses: np.ndarray, mask: np.ndarray, *rest: Any) -> np.ndarray:
        self.loaded.append((addresses[mask], self._now()))
        return self._functions.load(addresses, mask, *rest)

    def store(self, addresses: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        self.stored.append((addresses[mask], self._now()))
        self._functions.store(addresses, value, mask)

    def _now(self) -> int:
        """Return how many accesses there were before this one."""
        x, y, z = interpreter.interpreter_builder.grid_idx
        _, down, deep = interpreter.interpreter_builder.grid_dim
        self._programs.append((x * down + y) * deep + z)
        return len(self._programs) - 1

    def programs(self, times: np.ndarray) -> np.ndarray:
        """Return which programs had the accesses of these times."""
        return np.array(self._programs, int)[times]


def _joined(accesses: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return addresses, and for each when it was accessed."""
    addresses = np.concatenate([np.zeros(0, np.uint64), *(found for found, _ in accesses)])
    times = np.array([time for _, time in accesses], int)
    return addresses, np.repeat(times, [len(found) for found, _ in accesses])


def _tensors(arguments: Iterable[Any]) -> Iterable[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def _stray(addresses: np.ndarray, tensors: Iterable[torch.Tensor]) -> int:
    """Return how many addresses are in no tensor's storage."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    bounds = [bound for start in sorted(storages) for bound in (start, start + storages[start])]
    places = np.searchsorted(np.array(bounds, np.uint64), addresses, side="right")
    return int((places % 2 == 0).sum())


def _check(name: str, watch: Watch, tensors: list[torch.Tensor]) -> None:
    loaded, loaded_at = _joined(watch.loaded)
    stored, stored_at = _joined(watch.stored)
    for what, addresses in (("loads", loaded), ("stores", stored)):
        stray = _stray(addresses, tensors)
        assert not stray, f"{name} {what} {stray} values outside of its tensors"
    if not len(stored):
        return
    order = np.argsort(stored)
    stored, stored_at = stored[order], stored_at[order]
    twice = int((stored[1:] == stored[:-1]).sum())
    assert not twice, f"{name} stores {twice} values over values that it stored"
    place = np.minimum(np.searchsorted(stored, loaded), len(stored) - 1)
    both = stored[place] == loaded
    before, after = loaded_at[both], stored_at[place[both]]
    raced = int(((watch.programs(before) != watch.programs(after)) | (before > after)).sum())
    assert not raced, f"{name} loads {raced} values where it stores"


def _checked(run: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(run)
    def checked(launch: Any, *args: Any, **kwargs: Any) -> None:
        functions = interpreter._interpreter
        watch = Watch(functions)
        interpreter._interpreter = watch
        try:
            run(launch, *args, **kwargs)
        finally:
            interpreter._interpreter = functions
        _check(launch.fn.__name__, watch, list(_tensors([*args, *kwargs.values()])))

    return checked


def pytest_configure() -> None:
    interpreter.GridExecutor.__call__ = _checked(interpreter.GridExecutor.__call__)
    torch.use_deterministic_algorithms(True, warn_only=True)  # so torch.empty is filled
