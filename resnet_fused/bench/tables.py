"""The record as text: rich tables for the terminal, the same tables in Markdown for `bench.md`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resnet_fused.bench import memory
from resnet_fused.bench.conditions import power_capped_s
from resnet_fused.bench.contenders import FROZEN, REFERENCE
from resnet_fused.bench.options import SHORT_DTYPES
from resnet_fused.bench.results import (
    OK,
    SKIPPED,
    Record,
    Row,
    against_peers,
    cases_of,
    geometric_means,
)
from resnet_fused.bench.timing import CHANCE, FEW, Spread

NONE = "-"
#: Before a ratio that may as well be 1.
SAME = "≈"
RULE = (
    f"as its p20-p80 has 1 in it, of fewer than {FEW} rounds their whole range, or there are too "
    f"few to tell; two equal contenders would differ in {CHANCE:.0%} of cases at most"
)
#: From this width on, the columns of the widest table can stand apart.
ROOMY = 96
#: p80 over p20 of a speed above which something else was using the machine.
NOISY = 1.25


@dataclass(frozen=True)
class Grid:
    """A table that is not yet in any format; `breaks` are the rows with a rule after them.

    Columns named in `left` are words, the others numbers. `styles` colours whole rows by index,
    where colours exist.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    left: tuple[str, ...] = ()
    breaks: frozenset[int] = frozenset()
    styles: dict[int, str] | None = None

    def rich(self, width: int) -> Table:
        """Return the table for a terminal of so many columns."""
        gap = 1 if width >= ROOMY else 0
        table = Table(
            title=self.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
            padding=(0, gap, 0, 0), show_edge=False,
        )  # fmt: skip
        for name in self.columns:
            table.add_column(name, justify="left" if name in self.left else "right")
        for index, row in enumerate(self.rows):
            style = (self.styles or {}).get(index)
            table.add_row(*map(escape, row), style=style, end_section=index in self.breaks)
        return table

    def markdown(self) -> str:
        """Return the table as a Markdown section."""
        rule = [":--" if name in self.left else "--:" for name in self.columns]
        lines = ["| " + " | ".join(row) + " |" for row in (self.columns, rule, *self.rows)]
        return "\n".join([f"### {self.title}", "", *lines])


def grids(record: Record) -> list[Grid]:
    """Return the record's tables: one per model, and one against the peers if there were any."""
    models = dict.fromkeys(case.model for case in cases_of(record.rows))
    result = [
        _model_grid(name, [row for row in record.rows if row.case.model == name]) for name in models
    ]
    peers = _peer_grid(record.rows)
    return [*result, peers] if peers else result


def closing_lines(record: Record) -> list[str]:
    """Return what is said under the tables: the means, the failures, what the columns mean."""
    total = len(cases_of(record.rows))
    lines = []
    for name, mean in geometric_means(record.rows).items():
        right = sum(row.contender == name and row.ratio is not None for row in record.rows)
        lines.append(f"{name}: {mean:.2f}x {REFERENCE}, geometric mean of {right} cases of {total}")
    device = record.conditions.get("device_kind", "cpu")
    return [
        *lines,
        *faults(record.rows),
        *skipped(record.rows),
        *noise(record.rows),
        *notes(device),
    ]


def faults(rows: Sequence[Row]) -> list[str]:
    """Return a line for each row that has no time, but for those that were not to run."""
    return [
        f"{row.verdict}: {row.case} {row.contender}: {row.note}"
        for row in rows
        if row.verdict not in (OK, SKIPPED)
    ]


def skipped(rows: Sequence[Row]) -> list[str]:
    """Return a line for each reason why a contender did not run, with the number of cases."""
    reasons = Counter((row.contender, row.note) for row in rows if row.verdict == SKIPPED)
    return [
        f"{SKIPPED}: {name} in {count} cases: {note}" for (name, note), count in reasons.items()
    ]


def noise(rows: Sequence[Row]) -> list[str]:
    """Return a warning where something else was using the machine."""
    noisy = {row.case for row in rows if row.img_s and row.img_s.p80 > NOISY * row.img_s.p20}
    if not noisy:
        return []
    return [
        f"NOISY: in {len(noisy)} of {len(cases_of(rows))} cases a p80 is more than {NOISY - 1:.0%} "
        "above its p20; close other programs and run again."
    ]


def notes(device: str) -> list[str]:
    """Return what the columns mean."""
    return [
        f"{REFERENCE}: the model in plain torch, channels_last. ratio: against {REFERENCE}, paired "
        f"round by round, median. {SAME}: no difference, {RULE}.",
        "GFLOP/s: two operations per multiply-add. error: max|y - y64| / max|y64| against float64; "
        "right is up to twice eager's (the weights are random, so only that comparison counts).",
        memory.NOTES[device] + ".",
    ]


#: Images of this height and width are not mentioned.
USUAL_IMAGE = 224


def device_name(conditions: dict[str, Any]) -> str:
    """Return the device; of a processor with its instructions, as generations share a name."""
    isa = conditions.get("cpu_isa") if conditions.get("device_kind") == "cpu" else None
    return conditions.get("device", "") + (f" ({isa})" if isa else "")


def conditions_line(conditions: dict[str, Any]) -> str:
    """Return the conditions that a number cannot do without, in one line."""
    size = conditions.get("image_size", USUAL_IMAGE)
    capped = power_capped_s(conditions)
    parts = [
        device_name(conditions),
        f"images of {size}x{size}" if size != USUAL_IMAGE else "",
        f"{conditions.get('threads')} threads",
        f"torch {conditions.get('torch')}",
        f"resnet_fused {conditions.get('resnet_fused')}",
        f"commit {conditions['commit']}" if conditions.get("commit") else "",
        f"seed {conditions.get('seed')}",
        str(conditions.get("date", "")),
        f"clocks held down by power for {capped:.0f} s" if capped else "",
    ]
    return " · ".join(part for part in parts if part)


def show(record: Record, console: Console) -> None:
    """Print the tables, what they come to, and the conditions."""
    show_grids(grids(record), closing_lines(record), record.conditions, console)


def show_grids(
    grids: Sequence[Grid], closing: Sequence[str], conditions: dict[str, Any], console: Console
) -> None:
    """Print tables, lines under them, and the conditions."""
    for grid in grids:
        console.print(grid.rich(console.width))
        console.print()
    for text in (*closing, conditions_line(conditions)):
        console.print(text, highlight=False, markup=False)


def markdown(record: Record) -> str:
    """Return the record as a Markdown page."""
    conditions = record.conditions
    head = [
        "# resnet_fused benchmark",
        conditions_line(conditions),
        f"`{conditions.get('command', '')}`",
        "![img/s against eager](bench.png)",
    ]
    tables = [grid.markdown() for grid in grids(record)]
    closing = "\n".join(f"- {text}" for text in closing_lines(record))
    return "\n\n".join([*head, *tables, closing]) + "\n"


def ratio_text(ratio: Spread | None, *, spread: bool = False) -> str:
    """Return a ratio as the tables show it, marked where its range has 1 in it."""
    if ratio is None:
        return NONE
    itself = ratio.p20 == ratio.p80 == 1
    same = SAME if ratio.covers(1) and not itself else ""
    around = f" ({ratio.p20:.2f}-{ratio.p80:.2f})" if spread else ""
    return f"{same}{ratio.median:.2f}x{around}"


def mean_text(ratios: Sequence[float]) -> str:
    """Return the geometric mean of ratios as the tables show it."""
    return f"{statistics.geometric_mean(ratios):.2f}x" if ratios else NONE


def _model_grid(name: str, rows: Sequence[Row]) -> Grid:
    columns = (
        "dtype", "batch", "run", "img/s", "p20-p80", "GFLOP/s", "ratio", "error", "peak MiB",
    )  # fmt: skip
    last_of_case = {row.case: index for index, row in enumerate(rows)}
    cells = [_cells(row, first=_is_first(rows, index)) for index, row in enumerate(rows)]
    return Grid(
        title=_model_title(name, rows),
        columns=columns,
        rows=cells,
        left=("dtype", "run"),
        breaks=frozenset(last_of_case.values()),
        styles={index: _style(row) for index, row in enumerate(rows)},
    )


def _model_title(name: str, rows: Sequence[Row]) -> str:
    counted = next((row for row in rows if row.gmacs), None)
    if counted is None:  # no contender lived to count them
        return name
    return f"{name}: {counted.gmacs:.3f} GMACs an image, {counted.mparams:.2f} M parameters"


def _is_first(rows: Sequence[Row], index: int) -> bool:
    return index == 0 or rows[index].case != rows[index - 1].case


def _cells(row: Row, *, first: bool) -> list[str]:
    case = [SHORT_DTYPES[row.case.dtype], str(row.case.batch)] if first else ["", ""]
    if row.img_s:
        speed = [
            f"{row.img_s.median:.1f}",
            f"{row.img_s.p20:.1f}-{row.img_s.p80:.1f}",
            f"{row.gflop_s:.0f}",
            ratio_text(row.ratio),
        ]
    else:
        speed = [row.verdict, *[NONE] * 3]
    error = NONE if row.error is None else f"{row.error:.1e}"
    memory_cell = NONE if row.peak_mib is None else f"{row.peak_mib:.0f}"
    return [*case, row.contender, *speed, error, memory_cell]


def _style(row: Row) -> str:
    if row.verdict not in (OK, SKIPPED):
        return "bold red"
    return {REFERENCE: "dim", FROZEN: "green"}.get(row.contender, "")


def _peer_grid(rows: Sequence[Row]) -> Grid | None:
    cells = against_peers(rows)
    if not cells:
        return None
    body = [
        [
            cell.case.model,
            SHORT_DTYPES[cell.case.dtype],
            str(cell.case.batch),
            cell.peer,
            f"{cell.peer_img_s:.1f}",
            f"{cell.own_img_s:.1f}" if cell.own_img_s else NONE,
            ratio_text(cell.ratio),
        ]
        for cell in cells
    ]
    ratios = [cell.ratio.median for cell in cells if cell.ratio]
    mean = mean_text(ratios)
    total = f"geometric mean, {len(ratios)} of {len(cells)}"
    return Grid(
        title="frozen against the quickest peer of each case",
        columns=("model", "dtype", "batch", "best peer", "its img/s", "frozen", "ratio"),
        rows=[*body, [total, "", "", "", "", "", mean]],
        left=("model", "dtype", "best peer"),
        breaks=frozenset({len(body) - 1}),
        styles={len(body): "bold"},
    )
