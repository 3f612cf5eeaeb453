"""The conditions that the numbers of a run hold under."""

from __future__ import annotations

import datetime
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from resnet_fused import env
from resnet_fused.bench.options import Settings

#: The clocks when the last case was done, beside "clocks", which are those before the first.
CLOCKS_AFTER = "clocks_after"


def of(settings: Settings, program: str) -> dict[str, Any]:
    """Return this machine and installation, and what was asked for, ready for JSON."""
    found = env.collect()
    return {
        **found,
        "device_kind": settings.device,
        "device": found["cpu"] if settings.device == "cpu" else found["gpus"][0],
        "threads": settings.threads,
        "backend": settings.backend,
        "seed": settings.seed,
        "command": command(program, sys.argv[1:]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def power_capped_s(conditions: dict[str, Any]) -> float | None:
    """Return for how long of a run the GPU held its clocks down to stay within its power.

    A fast contender is then measured slower than it is, and the faster, the more so.
    """
    both = (conditions.get(name, {}).get(env.POWER_CAPPED, "") for name in ("clocks", CLOCKS_AFTER))
    before, after = (re.match(r"\d+", text) for text in both)  # such as "1200 us"
    return (int(after[0]) - int(before[0])) / 1e6 if before and after else None


def command(program: str, words: Sequence[str]) -> str:
    """Return what was typed but for --out: where its files went bears on no number."""
    kept, rest = program.split(), iter(words)
    for word in rest:
        if word == "--out":
            next(rest, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return shlex.join(kept)
