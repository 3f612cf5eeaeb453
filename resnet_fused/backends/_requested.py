"""The backend asked for: on its own, so that backends can read it without their registry."""

from __future__ import annotations

import os

AUTO = "auto"

_name: str | None = None


def name() -> str:
    """Return the name that was set, else that in RESNET_FUSED_BACKEND, else "auto"."""
    return os.environ.get("RESNET_FUSED_BACKEND", AUTO) if _name is None else _name


def swap(new: str | None) -> str | None:
    """Set the name and return the one set before; None leaves it to the environment."""
    global _name
    old, _name = _name, new
    return old
