"""The backend asked for, and whether for a CUDA graph: on its own, so that backends can read it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

AUTO = "auto"

#: Read once, as this is asked for in every call, and os.environ answers slowly.
_name: str = os.environ.get("RESNET_FUSED_BACKEND", AUTO)


def name() -> str:
    """Return the name that was set last, before that the one in RESNET_FUSED_BACKEND, or "auto"."""
    return _name


def swap(new: str) -> str:
    """Set the name and return the one before."""
    global _name
    old, _name = _name, new
    return old


#: How many are at it, in all threads.
_recordings = 0
_counting = threading.Lock()


def for_a_graph() -> bool:
    """Return whether what runs now is to become a CUDA graph, whose launches cost nothing."""
    return _recordings > 0


@contextlib.contextmanager
def becoming_a_graph() -> Iterator[None]:
    """Run what is recorded, and what runs before it to warm up, as is best for a CUDA graph.

    It holds for the process: a step's parts may run in threads of autograd's. What others train
    meanwhile runs likewise, and is as right.
    """
    global _recordings
    with _counting:
        _recordings += 1
    try:
        yield
    finally:
        with _counting:
            _recordings -= 1
