"""The backend asked for: on its own, so that backends can read it without their registry."""

from __future__ import annotations

import contextlib
import os
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


_for_a_graph = False


def for_a_graph() -> bool:
    """Return whether what runs now is to become a CUDA graph, whose launches cost nothing."""
    return _for_a_graph


@contextlib.contextmanager
def becoming_a_graph() -> Iterator[None]:
    """Run what is recorded, and what runs before it to warm up, as is best for a CUDA graph."""
    global _for_a_graph
    before, _for_a_graph = _for_a_graph, True
    try:
        yield
    finally:
        _for_a_graph = before
