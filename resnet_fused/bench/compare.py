"""Two records side by side: what changed between them, and what is only noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console

from resnet_fused.bench.options import SHORT_DTYPES, UsageError
from resnet_fused.bench.results import OK, SKIPPED, Record, Row
from resnet_fused.bench.tables import NONE, Grid
from resnet_fused.bench.timing import CHANCE, FEW, Spread, spread

FASTER = "faster"
SLOWER = "slower"
SAME = "no difference"
#: Conditions under which two records cannot be expected to agree.
MATTER = ("device", "cpu", "cpu_isa", "threads", "torch")
#: Those that are named as well, where both records have them: which kernels, libraries and inputs.
NAMED = ("backend", "cuda", "cudnn", "driver", "seed", "photographs_from", "packages")
#: Where these differ, another thing was measured under the same name.
REFUSED = ("image_size", "graphs")
#: MiB by which memory must differ to be shown, and the share: what allocators round by.
MEMORY_MIB, MEMORY_SHARE = 8.0, 0.05
KEPT = "kept"


@dataclass(frozen=True)
class Difference:
    """One case and contender in both records; `ratio` is B's img/s over A's, where both have it."""

    before: Row
    after: Row
    ratio: float | None
    verdict: str

    def regressed(self, threshold: float) -> bool:
        """Whether B is wrong where A was right, or slower by more than `threshold` and noise."""
        if self.ratio is None:
            return self.before.verdict == OK
        return self.verdict == SLOWER and self.ratio < 1 - threshold


def differences(before: Record, after: Record) -> list[Difference]:
    """Return the rows that both records have, in B's order.

    Raises `UsageError` where they have none in common.
    """
    old = {(row.case, row.contender): row for row in before.rows if row.verdict != SKIPPED}
    pairs = [
        (old[key], row)
        for row in after.rows
        if row.verdict != SKIPPED and (key := (row.case, row.contender)) in old
    ]
    if not pairs:
        raise UsageError("--compare: the two records have no case in common")
    return [_difference(a, b) for a, b in pairs]


def unlike_conditions(before: Record, after: Record) -> list[str]:
    """Return a line for each condition that differs and bears on speed."""
    a, b = before.conditions, after.conditions
    both = [name for name in NAMED if name in a and name in b]
    return [
        f"{name} differs: {_unlike(a.get(name), b.get(name))}"
        for name in (*MATTER, *both)
        if a.get(name) != b.get(name)
    ]


def refuse_unlike(before: Record, after: Record) -> None:
    """Raise `UsageError` where the two have measured something else under the same names."""
    a, b = before.conditions, after.conditions
    for name in REFUSED:
        if name in a and name in b and a[name] != b[name]:
            raise UsageError(f"compare: {name} differs: {a[name]} / {b[name]}; not comparable")
    levels = [{row.case.level for row in record.rows} for record in (before, after)]
    for level in sorted(levels[0] & levels[1]):
        kinds = [c.get("caches", {}).get(level) for c in (a, b)]
        if None not in kinds and kinds[0] != kinds[1]:
            raise UsageError(
                f"compare: caches of {level} differ: {' / '.join(kinds)}; not comparable"
            )


def missing(before: Record, after: Record) -> list[Row]:
    """Return the rows of A that B has not, or has skipped."""
    there = {(row.case, row.contender) for row in after.rows if row.verdict != SKIPPED}
    return [
        row
        for row in before.rows
        if row.verdict != SKIPPED and (row.case, row.contender) not in there
    ]


class Memory(NamedTuple):
    """MiB of a row in both records: the peak, or what a training step keeps."""

    row: Row
    kind: str
    before: float
    after: float

    def __str__(self) -> str:
        """Return one line."""
        who = f"{self.row.case} {self.row.contender}"
        return f"memory: {who}: {self.kind} {self.before:.0f} / {self.after:.0f} MiB"


def memory(found: Sequence[Difference]) -> list[Memory]:
    """Return where memory differs by more than allocators round by."""
    both = [
        Memory(d.after, kind, getattr(d.before, name), getattr(d.after, name))
        for name, kind in (("peak_mib", "peak"), ("saved_mib", KEPT))
        for d in found
        if getattr(d.before, name) is not None and getattr(d.after, name) is not None
    ]
    return [m for m in both if abs(m.after - m.before) > max(MEMORY_MIB, MEMORY_SHARE * m.before)]


def _unlike(a: object, b: object) -> str:
    """Return two values, of tables what differs in them."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return f"{a} / {b}"
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return ", ".join(f"{name} {a.get(name, NONE)} / {b.get(name, NONE)}" for name in names)


def report(before: Record, after: Record, threshold: float | None, console: Console) -> str:
    """Print how B differs from A; return what to complain of by the threshold, "" for nothing.

    Raises `UsageError` where the two have no case in common, or are not comparable.
    """
    refuse_unlike(before, after)
    found, gone = differences(before, after), missing(before, after)
    show(found, console)
    lines = [f"missing from B: {row.case} {row.contender}" for row in gone]
    changed = memory(found)
    for text in (*map(str, changed), *lines, *unlike_conditions(before, after)):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    if threshold is None:
        return ""
    worse = sum(d.regressed(threshold) for d in found)
    # A CPU's peak is that of the whole process, which varies; what torch counts does not.
    counted = after.conditions.get("device_kind") == "cuda"
    more = sum(m.after > (1 + threshold) * m.before for m in changed if counted or m.kind == KEPT)
    complaints = [
        f"{worse} of {len(found)} slower or wrong in B" if worse else "",
        f"{more} with more memory in B" if more else "",
        f"{len(gone)} missing from B" if gone else "",
    ]
    return ", ".join(filter(None, complaints))


def show(found: Sequence[Difference], console: Console) -> None:
    """Print the table of differences."""
    rows = [_cells(difference) for difference in found]
    colours = {FASTER: "green", SLOWER: "red", SAME: "dim"}
    grid = Grid(
        title="B against A: img/s, and B/A",
        columns=("model", "dtype", "batch", "run", "A", "B", "B/A", "verdict"),
        rows=rows,
        left=("model", "dtype", "run", "verdict"),
        styles={i: colours.get(d.verdict, "bold red") for i, d in enumerate(found)},
    )
    console.print(grid.rich(console.width))
    console.print(
        f"{SAME}: the ranges p20-p80 of the two records overlap, of fewer than {FEW} rounds their "
        f"whole ranges, or there are too few to tell ({CHANCE:.0%} of equal ones would differ).",
        highlight=False,
        markup=False,
    )


def _difference(before: Row, after: Row) -> Difference:
    if before.img_s is None or after.img_s is None:
        verdict = f"{before.verdict} in A" if before.verdict != OK else f"{after.verdict} in B"
        return Difference(before, after, None, verdict)
    ratio = after.img_s.median / before.img_s.median
    if _speed(before).overlaps(_speed(after)):
        return Difference(before, after, ratio, SAME)
    return Difference(before, after, ratio, FASTER if ratio > 1 else SLOWER)


def _speed(row: Row) -> Spread:
    """Return the row's speeds with their number, which the spread of a record of before lacks."""
    return spread([row.case.batch / seconds for seconds in row.seconds])


def _cells(difference: Difference) -> list[str]:
    case = difference.after.case
    speeds = [
        f"{row.img_s.median:.1f}" if row.img_s else row.verdict
        for row in (difference.before, difference.after)
    ]
    ratio = f"{difference.ratio:.3f}" if difference.ratio else NONE
    words = [case.subject, SHORT_DTYPES[case.dtype], str(case.batch), difference.after.contender]
    return [*words, *speeds, ratio, difference.verdict]
