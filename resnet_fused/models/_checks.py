"""Checks of the builders' options: each message names the option, its value, what is accepted."""

from __future__ import annotations

from collections.abc import Sequence


def positive(name: str, value: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is not accepted; accepted: an integer of at least 1")


def one_of(name: str, value: str, accepted: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``accepted``."""
    if value not in accepted:
        names = ", ".join(repr(a) for a in accepted)
        raise ValueError(f"{name}={value!r} is not accepted; accepted: {names}")
