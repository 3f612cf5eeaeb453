"""The backend asked for: on its own, so that backends can read it without their registry."""

from __future__ import annotations

import os

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
