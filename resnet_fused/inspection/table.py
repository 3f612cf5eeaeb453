"""What was compiled, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from resnet_fused.backends.triton.aot import Compiled


class Row(NamedTuple):
    """One config of one problem on one architecture."""

    given: str
    kernel: str
    #: How often the model makes the call.
    calls: int
    capability: int
    config: str
    kernels: list[Compiled]


def table(title: str, rows: Sequence[Row]) -> Table:
    """Return the table; what a row shares with the one above it is left blank."""
    shown = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in ("input", "kernel", "calls", "sm", "config"):
        shown.add_column(column, no_wrap=True)
    for column in ("regs", "spilled", "KiB"):
        shown.add_column(column, justify="right")
    for column in ("products", "loads"):
        shown.add_column(column)
    above: tuple[str, ...] = ("",) * 4
    for row in rows:
        head = (row.given, row.kernel, str(row.calls), str(row.capability))
        same = head[:3] == above[:3]
        first = ("", "", "", head[3] if head != above else "") if same else head
        above = head
        for i, made in enumerate(row.kernels):
            place = (*first, row.config) if i == 0 else ("",) * 4 + (f"+ {made.kernel}",)
            figures = (str(made.registers), str(made.spilled), f"{made.shared / 1024:.1f}")
            shown.add_row(*place, *figures, made.instruction, _widths(made.loads))
    return shown


def _widths(loads: Iterable[str]) -> str:
    """Return kinds of loads with their widths, the widest first, such as "async 16+8, load 4"."""
    kinds: dict[str, list[int]] = {}
    for load in loads:
        kind, *width = load.split()
        kinds.setdefault(kind, []).extend(map(int, width))
    words = (
        f"{kind} {'+'.join(map(str, sorted(widths, reverse=True)))}".strip()
        for kind, widths in kinds.items()
    )
    return ", ".join(words)


def summary(rows: Sequence[Row]) -> str:
    """Return how many kernels spill, and what the columns count."""
    kernels = [kernel for row in rows for kernel in row.kernels]
    spilling = sum(kernel.spilled > 0 for kernel in kernels)
    return (
        f"{spilling} of {len(kernels)} kernels spill. regs: of a thread, 255 at most; spilled: "
        "bytes of a thread; KiB: shared memory of a block; loads: of global memory, by width in "
        "bytes, async and tma into shared memory; + r: with a residual"
    )
