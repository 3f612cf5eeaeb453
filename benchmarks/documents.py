"""The documents' tables of results, made from ``benchmarks/results/*.json`` and from nothing else.

A document says where: between ``<!-- results: LEVEL -->`` and ``<!-- end of results -->`` stands
what every kept record holds of that level.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks import graphs, limits, marked, report, summaries
from resnet_fused.bench import chart, options
from resnet_fused.bench.options import UsageError
from resnet_fused.bench.results import (
    BLOCK,
    COLD,
    CONVOLUTION,
    EPOCH,
    INFERENCE,
    OP,
    PASS,
    TRAINING,
    Record,
    against_peers,
    load,
    save_text,
)
from resnet_fused.bench.results import save as save_record
from resnet_fused.bench.tables import Grid, conditions_line, device_name

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- results: {} -->", "<!-- end of results -->"
#: Rows of each table of losses: the next kernels to write.
LOSSES = 5


class Section(NamedTuple):
    """What is shown of a level: which command measures it, its rows, the tables of these."""

    command: str
    levels: tuple[str, ...]
    grids: Callable[[Record], list[Grid]]


SECTIONS = {
    INFERENCE: Section("models", (INFERENCE,), summaries.inference),
    TRAINING: Section("training", (TRAINING,), summaries.training),
    EPOCH: Section("epoch", (EPOCH,), report.grids),
    COLD: Section("cold", (COLD,), report.grids),
    OP: Section("ops", (OP, INFERENCE), functools.partial(limits.grids, most=LOSSES)),
    BLOCK: Section("blocks", (BLOCK,), summaries.blocks),
    PASS: Section("bn", (PASS,), report.grids),
    CONVOLUTION: Section("convolutions", (CONVOLUTION,), summaries.convolutions),
}
#: What there are kernels of on a CPU alone.
ON_CPUS = (PASS, CONVOLUTION)


def filled(text: str, name: str = "the text") -> str:
    """Return a document with every marked section written anew.

    Raises:
        UsageError: no section is marked, or one for a level that has no tables.
    """
    levels = re.findall(BEGIN.format(r"(\w+)"), text)
    if not levels:
        raise UsageError(f"{name}: has no {BEGIN.format('LEVEL')} followed by {END}")
    for level in levels:
        options.one_of(name, level, SECTIONS)
        text = marked.replaced(text, BEGIN.format(level), END, section(level), name)
    return text


def section(level: str) -> str:
    """Return the tables of a level with their conditions, record by record."""
    every = [(path, load(path)) for path in sorted(RESULTS.glob("*.json"))]
    kept = [(path, record) for path, record in every if level in _shown(record)]
    parts = [_of_record(path, record, level) for path, record in kept]
    kinds = {record.conditions.get("device_kind") for _, record in kept}
    devices = {"cpu": "CPU"} if level in ON_CPUS else {"cpu": "CPU", "cuda": "GPU"}
    if missing := [words for kind, words in devices.items() if kind not in kinds]:
        command = f"`python -m benchmarks {SECTIONS[level].command}`, then `keep`"
        parts.append(f"{' and '.join(missing)}: not measured yet ({command}).")
    return "\n\n".join(parts)


def save(document: Path) -> None:
    """Write the marked sections of a document anew.

    Raises:
        UsageError: the file cannot be read or written, or has no such sections.
    """
    try:
        text = document.read_text(encoding="utf-8")
        save_text(filled(text, f"--save-table: {document}"), document)
    except OSError as error:
        raise UsageError(f"--save-table: {document}: {error.strerror}") from None


def keep(record: Record, name: str) -> Path:
    """Put a record, and the chart of its models, where the sections come from; return its file.

    Raises:
        UsageError: the record is unfinished, has nothing to show, or would take the place of one
            that shows other levels; the name is no file's.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(
            f"NAME: {name!r} given; accepted: letters, digits, '.', '_' and '-', one of the first "
            "two at the beginning"
        )
    if left := record.conditions.get("unfinished"):
        raise UsageError(f"{name}: {left} cases of the record are left; --resume measures them")
    levels = _shown(record)
    if not levels:
        raise UsageError(f"{name}: the record has no timed row of {', '.join(SECTIONS)}")
    path = RESULTS / f"{name}.json"
    if path.exists() and (lost := _shown(load(path)) - levels):
        raise UsageError(
            f"{name}: the record kept under it shows {', '.join(sorted(lost))}, this one does not; "
            "another name keeps both"
        )
    try:
        RESULTS.mkdir(exist_ok=True)  # git keeps no empty folder
        if INFERENCE in levels:
            chart.save(_part(record, (INFERENCE,)), path.with_suffix(".png"))
        save_record(record, path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    return path


def _shown(record: Record) -> set[str]:
    """Return the levels of a record that a section can show."""
    timed = {row.case.level for row in record.rows if row.seconds} & set(SECTIONS)
    # `ops` runs whole models only to set the sum of their ops beside them; `all` does not.
    beside_ops = OP in timed and timed <= {OP, INFERENCE}
    compared = against_peers(_part(record, (INFERENCE,)).rows)
    return timed if compared and not beside_ops else timed - {INFERENCE}


def _part(record: Record, levels: Sequence[str]) -> Record:
    return replace(record, rows=[row for row in record.rows if row.case.level in levels])


def _of_record(path: Path, record: Record, level: str) -> str:
    """Return a record's tables with the device in their titles, its chart and its conditions."""
    device, section = device_name(record.conditions), SECTIONS[level]
    grids = section.grids(_part(record, section.levels))
    parts = [replace(grid, title=f"{device}: {grid.title}").markdown() for grid in grids]
    picture = path.with_suffix(".png")
    if level == INFERENCE:
        where = picture.relative_to(RESULTS.parents[1]).as_posix()
        parts.insert(0, f"![Throughput against eager torch]({where})")
    how = graphs.in_words(record.conditions, _part(record, section.levels).rows)
    said = [conditions_line(record.conditions), how, f"`{record.conditions['command']}`"]
    parts.append(" · ".join(filter(None, said)))
    return "\n\n".join(parts)
