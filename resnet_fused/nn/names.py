"""What a function's code names: read off its instructions, as one name may be both."""

from __future__ import annotations

import dis
import functools
import types
from typing import NamedTuple


class Names(NamedTuple):
    """Names that code reads, in order, each once."""

    #: What is global or built in.
    globals: tuple[str, ...]
    attributes: tuple[str, ...]


@functools.cache
def names_of(code: types.CodeType) -> Names:
    """Return what the code names, but not the functions written within it."""
    steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
    read = dict.fromkeys(name for op, name in steps if op == "LOAD_GLOBAL")
    attributes = dict.fromkeys(name for op, name in steps if op in ("LOAD_ATTR", "LOAD_METHOD"))
    return Names(tuple(read), tuple(attributes))
