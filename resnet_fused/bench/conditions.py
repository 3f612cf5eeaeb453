"""The conditions that the numbers of a run hold under."""

from __future__ import annotations

import datetime
from typing import Any

from resnet_fused import env
from resnet_fused.bench.options import Settings

#: The clocks when the last case was done, beside "clocks", which are those before the first.
CLOCKS_AFTER = "clocks_after"


def of(settings: Settings, command: str) -> dict[str, Any]:
    """Return this machine and installation, and what was asked for, ready for JSON."""
    found = env.collect()
    return {
        **found,
        "device_kind": settings.device,
        "device": found["cpu"] if settings.device == "cpu" else found["gpus"][0],
        "threads": settings.threads,
        "backend": settings.backend,
        "seed": settings.seed,
        "command": command,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
