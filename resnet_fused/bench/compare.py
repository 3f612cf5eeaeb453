"""Two records side by side: what changed between them, and what is only noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    return [
        f"{name} differs: {before.conditions.get(name)} / {after.conditions.get(name)}"
        for name in MATTER
        if before.conditions.get(name) != after.conditions.get(name)
    ]


def report(before: Record, after: Record, threshold: float | None, console: Console) -> str:
    """Print how B differs from A; return what to complain of by the threshold, "" for nothing.

    Raises `UsageError` where the two have no case in common.
    """
    found = differences(before, after)
    show(found, console)
    worse = [d for d in found if threshold is not None and d.regressed(threshold)]
    for text in unlike_conditions(before, after):
        console.print(text, highlight=False, markup=False)
    return f"{len(worse)} of {len(found)} slower or wrong in B" if worse else ""


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
