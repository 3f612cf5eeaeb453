"""Reads in Triton's own text whether a copy may write what a product still reads.

A pipelined loop copies blocks ahead into the buffers of an operand, in turn. On sm_90 it may leave
a product running while it starts the next copy: into the buffer that this product reads, where
the operand has no more buffers than copies are ahead.
"""

import re
from typing import NamedTuple

_BUFFERS = re.compile(r"(%\S+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x[bf]")
_VIEW = re.compile(r"(%\S+) = ttg\.memdesc_\w+ (%[^\s\[]+)")
_COPY = re.compile(
    r"async_(?:copy_global_to_local %\S+,|tma_copy_global_to_local .*?\]) (%[^\s,]+)"
)
_DOT = re.compile(r"warp_group_dot (%[^\s,]+), (%[^\s,]+),.*isAsync = true")
_PENDING = re.compile(r"warp_group_dot_wait .*pendings = [1-9]")


class Operand(NamedTuple):
    """Of a product that is left running while its loop goes on."""

    name: str
    #: How many blocks of it shared memory holds.
    buffers: int
    #: How many blocks are copied before the first is multiplied.
    ahead: int

    @property
    def overtaken(self) -> bool:
        """Whether a copy starts into the block that the product reads."""
        return 0 < self.ahead >= self.buffers


def pending_operands(ttgir: str) -> list[Operand]:
    """Return the operands in shared memory of all products that a loop leaves running."""
    lines = ttgir.splitlines()
    buffers = {name: int(number) for name, number in _BUFFERS.findall(ttgir)}
    views = dict(_VIEW.findall(ttgir))

    def source(name: str) -> str:
        while name in views:
            name = views[name]
        return name

    found = []
    for first, line in enumerate(lines):
        if "scf.for" not in line:
            continue
        ending = line[: len(line) - len(line.lstrip())] + "}"
        last = next(i for i in range(first, len(lines)) if lines[i].startswith(ending))
        body = "\n".join(lines[first:last])
        if not _PENDING.search(body):
            continue
        copied = [source(view) for view in _COPY.findall("\n".join(lines[:first]))]
        for dot in _DOT.findall(body):
            names = [name for name in map(source, dot) if name in buffers]
            found += [Operand(name, buffers[name], copied.count(name)) for name in names]
    return found
