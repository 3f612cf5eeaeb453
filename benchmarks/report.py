"""A record for people: tables on the terminal, and JSON, CSV, Markdown, pictures and a page."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks import bn, charts, convolutions, graphs, limits, page, summaries
from benchmarks.cold import STAGES
from benchmarks.peaks import Peaks
from resnet_fused.bench import tables
from resnet_fused.bench.contenders import FUSED, REFERENCE
from resnet_fused.bench.options import SHORT_DTYPES
from resnet_fused.bench.results import (
    BLOCK,
    COLD,
    CONVOLUTION,
    EPOCH,
    INFERENCE,
    LEVELS,
    OK,
    OP,
    PASS,
    SKIPPED,
    TRAINING,
    Record,
    Row,
    cases_of,
    paired,
    save,
    save_text,
)
from resnet_fused.bench.tables import NONE, Grid, conditions_line, ratio_text
from resnet_fused.bench.timing import spread

RECORD = "suite.json"
#: Every file that a record may become.
FILES = (
    RECORD, "suite.csv", "suite.md", "suite.html", "peers.png", "throughput.png", "roofline.png",
    "memory.png",
)  # fmt: skip
CSV_COLUMNS = (
    "level", "model", "layer", "uses", "dtype", "batch", "contender", "verdict", "p20_s", "p50_s",
    "p80_s",
    "img_s", "ratio", "ratio_p20", "ratio_p80", "error", "gmacs", "nbytes", "bound_s", "peak_mib",
    "saved_mib", "note",
)  # fmt: skip
CACHES = (
    "Hot: each call finds what the one before left; fed: its input, just written, and the code, as "
    "a layer in a model does, but weights and residual come from memory; cold: all does."
)
_BOUND = (
    "bound: the longer of operations / peak and bytes / bandwidth, with the peaks of this run: a "
    "matrix product's or, on a CPU, a convolution's, whichever is faster, and a copy's. "
    "Operations are those of direct convolution: Winograd may pass its bound."
)
#: By level, what its tables do not say themselves.
NOTES = {
    OP: _BOUND,
    INFERENCE: _BOUND,
    TRAINING: "training: three times the multiply-adds of a forward; kept MiB: saved for backward; "
    "error: 1 - cosine between the gradient and float64's.",
    COLD: "cold start: import of torch and the package, building, the first image, in a fresh "
    "process with empty compiler caches; the weights are loaded in between, uncounted.",
    EPOCH: "an epoch: a CIFAR ResNet learns scikit-learn's digits, enlarged; data order, batches, "
    "forward, backward and AdamW. right: of 360 images held out, those taken for what they are; "
    "with fewer than 95% of them there is no speed.",
    PASS: "of bandwidth: the bytes that a call must move over its time, beside a large copy's; "
    "more than 100% where the maps lie in a cache. copy: an addition into a third map, as many "
    "bytes as the first pass moves.",
    CONVOLUTION: "convolutions: CPU time of one thread, weights packed anew, no page faulted in; "
    "skipped where torch's own is as fast, which the package then calls. Sums: each shape's median "
    "times how often the model has it, over the shapes that the kernel runs.",
}


def levels(record: Record) -> dict[str, Record]:
    """Return the record's parts by level, in the order of LEVELS."""
    parts = {
        level: replace(record, rows=[r for r in record.rows if r.case.level == level])
        for level in LEVELS
    }
    return {level: part for level, part in parts.items() if part.rows}


def grids(record: Record, most: int | None = limits.MOST) -> list[Grid]:
    """Return all tables of a record."""
    found: list[Grid] = []
    for level, part in levels(record).items():
        if level in (OP, BLOCK):
            found += _layers(level, part.rows)
        elif level == INFERENCE:
            found += tables.grids(part)
        elif level == CONVOLUTION:
            found += [_convolutions(part.rows), *summaries.convolutions(part)]
        else:
            found.append(_OF_LEVEL[level](part.rows))
    return [*found, *limits.grids(record, most)]


def closing_lines(record: Record) -> list[str]:
    """Return what is said under the tables."""
    conditions = record.conditions
    rows = record.rows
    lines = [*tables.faults(rows), *tables.skipped(rows), *tables.noise(rows)]
    lines += [f"absent: {name} {why}" for name, why in conditions.get("absent", {}).items()]
    if peaks := Peaks.of(conditions):
        products = ", ".join(f"{SHORT_DTYPES[d]} {f / 1e12:.3g}" for d, f in peaks.flops.items())
        lines.append(f"peaks as measured: {products} TFLOP/s, {peaks.bandwidth / 1e9:.4g} GB/s")
    if words := graphs.in_words(conditions, rows):
        lines.append(words)
    present = [f"{level} {caches}" for level, caches in limits.caches(record).items()]
    lines.append(f"caches: {', '.join(present) or 'not said'}. {CACHES}")
    if left := conditions.get("unfinished"):
        lines.append(f"UNFINISHED: {left} cases are left; the same command with --resume goes on")
    meant = dict.fromkeys(NOTES[level] for level in levels(record) if level in NOTES)
    return [*lines, *tables.notes(conditions.get("device_kind", "cpu")), *meant]


def show(record: Record, console: Console) -> None:
    """Print the tables, what is said under them, and the conditions."""
    tables.show_grids(grids(record), closing_lines(record), record.conditions, console)


def write(record: Record, out: Path) -> list[Path]:
    """Write every format into a directory and return the files.

    Raises:
        UsageError: a file cannot be written, or matplotlib is missing: all but pictures and page
            are then written.
    """
    save(record, out / RECORD)
    save_text(csv_text(record), out / "suite.csv")
    save_text(markdown(record), out / "suite.md")
    pictures = charts.save(record, out)
    save_text(page.html(record, grids(record, None), closing_lines(record), pictures),
              out / "suite.html")  # fmt: skip
    return [out / RECORD, out / "suite.csv", out / "suite.md", *pictures, out / "suite.html"]


def markdown(record: Record) -> str:
    """Return the record as a Markdown page."""
    head = [
        "# resnet_fused benchmark suite",
        conditions_line(record.conditions),
        f"`{record.conditions.get('command', '')}`",
    ]
    body = [grid.markdown() for grid in grids(record, None)]
    closing = "\n".join(f"- {text}" for text in closing_lines(record))
    return "\n\n".join([*head, *body, closing]) + "\n"


def csv_text(record: Record) -> str:
    """Return a line per row, in plain units: seconds, bytes, MiB."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in record.rows:
        case, speed, ratio = row.case, row.img_s, row.ratio
        of_call = spread(row.seconds) if row.seconds else None
        times = (of_call.p20, of_call.median, of_call.p80) if of_call else ("", "", "")
        writer.writerow([
            case.level, case.model, case.layer,
            " ".join(f"{model}:{count}" for model, count in row.uses.items()),
            case.dtype, case.batch, row.contender, row.verdict, *times,
            speed.median if speed else "",
            *((ratio.median, ratio.p20, ratio.p80) if ratio else ("", "", "")), row.error,
            row.gmacs, row.nbytes, row.bound_s, row.peak_mib, row.saved_mib, row.note,
        ])  # fmt: skip
    return text.getvalue()


def _layers(level: str, rows: Sequence[Row]) -> list[Grid]:
    """Return a table per dtype and batch: a line per layer, a column per contender."""
    settings = dict.fromkeys((row.case.dtype, row.case.batch) for row in rows)
    return [_layer_grid(level, rows, *setting) for setting in settings]


def _layer_grid(level: str, rows: Sequence[Row], dtype: str, batch: int) -> Grid:
    here = [row for row in rows if (row.case.dtype, row.case.batch) == (dtype, batch)]
    found = {(row.case, row.contender): row for row in here}
    names = list(dict.fromkeys(row.contender for row in here if row.verdict != SKIPPED))
    cells = []
    for case in cases_of(here):
        reference = found[case, REFERENCE]
        uses = "/".join(str(n) for n in reference.uses.values())
        runs = [_time(found.get((case, name))) for name in names]
        cells.append([case.layer, uses, *runs])
    models = "/".join(dict.fromkeys(model for row in here for model in row.uses))
    return Grid(
        f"{level}s {SHORT_DTYPES[dtype]} batch {batch}: us a call (ratio to {REFERENCE}); "
        f"times: in {models}",
        (level, "times", *names),
        cells,
        left=(level,),
    )


def _time(row: Row | None) -> str:
    text = _microseconds(row)
    if row is None or not row.seconds or row.contender == REFERENCE:
        return text
    return f"{text} ({ratio_text(row.ratio)})"


def _microseconds(row: Row | None) -> str:
    if row is None or not row.seconds:
        return NONE if row is None else row.verdict
    return f"{statistics.median(row.seconds) * 1e6:.1f}"


def _passes(rows: Sequence[Row]) -> Grid:
    """Return a line per pass: how many times faster than each other contender the kernel is."""
    found = {(row.case, row.contender): row for row in rows}
    others = [n for n in dict.fromkeys(row.contender for row in rows) if n != bn.KERNEL]
    cells = []
    for case in cases_of(rows):
        kernel = found[case, bn.KERNEL]
        ratios = [_against(found.get((case, name)), kernel) for name in others]
        reached = (
            f"{kernel.bound_s / statistics.median(kernel.seconds):.0%}"
            if kernel.bound_s and kernel.seconds
            else NONE
        )
        cells.append([case.layer, SHORT_DTYPES[case.dtype], str(case.batch), _microseconds(kernel),
                      reached, *ratios])  # fmt: skip
    columns = ("pass", "dtype", "batch", "kernel us", "of bandwidth", *others)
    title = "BatchNorm's passes in training: time of each other over the kernel's (p20-p80)"
    return Grid(title, columns, cells, left=("pass", "dtype"))


def _convolutions(rows: Sequence[Row]) -> Grid:
    found = {(row.case, row.contender): row for row in rows}
    cells = []
    for case in cases_of(rows):
        eager, kernel = (found.get((case, name)) for name in (REFERENCE, convolutions.KERNEL))
        speeds = [
            f"{row.gflop_s / 1e3:.3f}" if row and row.gflop_s else NONE for row in (eager, kernel)
        ]
        ratio = ratio_text(kernel.ratio if kernel else None, spread=True)
        cells.append([
            case.layer, SHORT_DTYPES[case.dtype], str(case.batch), _microseconds(eager),
            _microseconds(kernel), *speeds, ratio,
        ])  # fmt: skip
    columns = ("convolution", "dtype", "batch", "torch us", "kernel us", "torch TFLOP/s",
               "kernel TFLOP/s", "torch / kernel (p20-p80)")  # fmt: skip
    title = "Convolutions of a training step: torch's own and the kernels"
    return Grid(title, columns, cells, left=("convolution", "dtype"))


def _against(other: Row | None, own: Row | None) -> str:
    """Return how many times faster the package's own contender is than another."""
    if other is None or own is None or not other.seconds or not own.seconds:
        return NONE if other is None or other.verdict == OK else other.verdict
    return ratio_text(paired(other, own), spread=other is not own)


def _starts(rows: Sequence[Row]) -> Grid:
    cells = [
        [
            row.case.model, SHORT_DTYPES[row.case.dtype], str(row.case.batch), row.contender,
            *(f"{row.stages[stage]:.2f}" if row.stages else NONE for stage in STAGES),
            f"{sum(row.stages.values()):.2f}" if row.stages else row.verdict,
        ]
        for row in rows
        if row.verdict != SKIPPED
    ]  # fmt: skip
    columns = ("model", "dtype", "batch", "run", *STAGES, "in all")
    return Grid("Cold start, seconds", columns, cells, left=("model", "dtype", "run"))


def _training(rows: Sequence[Row]) -> Grid:
    found = {(row.case, row.contender): row for row in rows}
    cells = [
        [
            row.case.model, SHORT_DTYPES[row.case.dtype], str(row.case.batch), row.contender,
            f"{row.img_s.median:.2f}" if row.img_s else row.verdict,
            f"{row.img_s.p20:.2f}-{row.img_s.p80:.2f}" if row.img_s else NONE,
            ratio_text(row.ratio, spread=True),
            _against(row, found.get((row.case, FUSED))),
            NONE if row.error is None else f"{row.error:.1e}",
            NONE if row.saved_mib is None else f"{row.saved_mib:.1f}",
            NONE if row.peak_mib is None else f"{row.peak_mib:.0f}",
        ]
        for row in rows
        if row.verdict != SKIPPED
    ]  # fmt: skip
    columns = ("model", "dtype", "batch", "run", "img/s", "p20-p80", "ratio (p20-p80)",
               "fused / it", "error", "kept MiB", "peak MiB")  # fmt: skip
    return Grid("A training step", columns, cells, left=("model", "dtype", "run"))


def _epochs(rows: Sequence[Row]) -> Grid:
    found = {(row.case, row.contender): row for row in rows}
    cells = [
        [
            row.case.model, SHORT_DTYPES[row.case.dtype], str(row.case.batch), row.contender,
            f"{statistics.median(row.seconds):.3f}" if row.seconds else row.verdict,
            f"{row.img_s.median:.0f}" if row.img_s else NONE,
            ratio_text(row.ratio, spread=True),
            _against(row, found.get((row.case, FUSED))),
            NONE if row.error is None else f"{1 - row.error:.1%}",
        ]
        for row in rows
        if row.verdict != SKIPPED
    ]  # fmt: skip
    columns = ("model", "dtype", "batch", "run", "epoch s", "img/s", "ratio (p20-p80)",
               "fused / it", "right")  # fmt: skip
    return Grid("An epoch of training", columns, cells, left=("model", "dtype", "run"))


_OF_LEVEL = {COLD: _starts, TRAINING: _training, EPOCH: _epochs, PASS: _passes}
