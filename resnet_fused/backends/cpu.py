"""placeholder"""

from typing import Any

ADVICE = ""


def available() -> str | None:
    return "not yet"


def supports(op: str, *args: Any) -> str | None:
    return None
