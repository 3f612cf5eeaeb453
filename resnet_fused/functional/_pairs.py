"""Arguments given as one integer for both directions, or as two."""

from __future__ import annotations

from collections.abc import Sequence

Pair = int | Sequence[int]

#: The arguments that are pairs, in any op.
NAMES = ("stride", "padding", "dilation", "pool_size", "pool_stride", "pool_padding")


def pairs(op: str, **given: Pair) -> list[list[int]]:
    """Return each as a pair; what the integers may be, the op checks.

    Raises:
        ValueError: one is neither an integer nor two.
    """
    found = []
    for name, value in given.items():
        pair = list(value) if isinstance(value, Sequence) else [value, value]
        if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
            raise ValueError(f"{op}: {name} must be one or two integers, got {value!r}")
        found.append(pair)
    return found
