"""The pictures of a record: throughput by batch, all beside eager, the roofline, memory."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import limits
from benchmarks.peaks import Peaks
from resnet_fused.bench import chart
from resnet_fused.bench.chart import COLOURS
from resnet_fused.bench.contenders import FROZEN, REFERENCE
from resnet_fused.bench.options import SHORT_DTYPES
from resnet_fused.bench.results import INFERENCE, OP, TRAINING, Record, Row, write_file
from resnet_fused.bench.tables import conditions_line


def save(record: Record, out: Path) -> list[Path]:
    """Draw what the record has rows for; return the files.

    Raises:
        UsageError: matplotlib is missing.
    """
    chart.figure_class()
    drawn = []
    timed = [row for row in record.rows if row.case.level == INFERENCE and row.img_s]
    if timed:
        inference = [row for row in record.rows if row.case.level == INFERENCE]
        chart.save(replace(record, rows=inference), out / "peers.png")
        drawn.append(out / "peers.png")
    if len({row.case.batch for row in timed}) > 1:
        drawn.append(_throughput(record, timed, out / "throughput.png"))
    if ops := [row for row in record.rows if row.case.level == OP and row.seconds]:
        drawn.append(_roofline(record, ops, out / "roofline.png"))
    training = [row for row in record.rows if row.case.level == TRAINING and row.saved_mib]
    if training:
        drawn.append(_memory(record, training, out / "memory.png"))
    return drawn


def _throughput(record: Record, rows: Sequence[Row], path: Path) -> Path:
    """Images a second over the batch size: a panel per model and dtype, a line per contender."""
    panels = list(dict.fromkeys((row.case.model, row.case.dtype) for row in rows))

    def draw(axes: Any, panel: tuple[str, str]) -> None:
        here = [row for row in rows if (row.case.model, row.case.dtype) == panel]
        for name in dict.fromkeys(row.contender for row in here):
            points = sorted(
                (row.case.batch, row.img_s.median)
                for row in here
                if row.contender == name and row.img_s
            )
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=name,
                      color=COLOURS[name])  # fmt: skip
        axes.set_xscale("log", base=2)
        sizes = sorted({row.case.batch for row in here})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_ylim(bottom=0)
        axes.set(title=f"{panel[0]} {SHORT_DTYPES[panel[1]]}", xlabel="batch", ylabel="img/s")

    return _panels(record, "Throughput over the batch size (higher is better)", panels, draw, path)


def _roofline(record: Record, rows: Sequence[Row], path: Path) -> Path:
    """Every op by its operations per byte and its speed, under the roof that was measured."""
    peaks = Peaks.of(record.conditions)
    reached = limits.reached(rows, peaks)
    panels = list(dict.fromkeys((r.row.case.dtype, r.row.case.batch) for r in reached))

    def draw(axes: Any, panel: tuple[str, int]) -> None:
        assert peaks is not None
        here = [r for r in reached if (r.row.case.dtype, r.row.case.batch) == panel]
        least = min(r.intensity for r in here) / 2
        most = max(*(r.intensity for r in here), peaks.flops[panel[0]] / peaks.bandwidth) * 2
        ridge = peaks.flops[panel[0]] / peaks.bandwidth
        roof = [min(x * peaks.bandwidth, peaks.flops[panel[0]]) / 1e9 for x in (least, ridge, most)]
        axes.plot((least, ridge, most), roof, color="#333", linewidth=1, label="measured roof")
        for name in (REFERENCE, FROZEN):
            points = [(r.intensity, r.flops / r.seconds / 1e9) for r in here
                      if r.row.contender == name]  # fmt: skip
            if points:
                axes.scatter(*zip(*points, strict=True), s=16, label=name, color=COLOURS[name])
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s",
                 title=f"ops {SHORT_DTYPES[panel[0]]} batch {panel[1]}")  # fmt: skip

    caches = limits.caches(record).get(OP, "unknown")
    title = f"Ops under the roof that was measured ({caches} caches; Winograd may pass it)"
    return _panels(record, title, panels, draw, path)


#: What a training step takes, by the row's field.
MEMORY = {"saved_mib": "kept for backward", "peak_mib": "highest point of a step"}


def _memory(record: Record, rows: Sequence[Row], path: Path) -> Path:
    """What a training step keeps and what it takes: a panel each, per dtype and batch."""
    settings = dict.fromkeys((row.case.dtype, row.case.batch) for row in rows)
    panels = [(*setting, kind) for setting in settings for kind in MEMORY]

    def draw(axes: Any, panel: tuple[str, int, str]) -> None:
        *setting, kind = panel
        here = [
            row
            for row in rows
            if [row.case.dtype, row.case.batch] == setting and getattr(row, kind) is not None
        ]
        models = list(dict.fromkeys(row.case.model for row in here))
        names = list(dict.fromkeys(row.contender for row in here))
        for place, name in enumerate(names):
            of_name = [row for row in here if row.contender == name]
            x = [models.index(row.case.model) + (place + 0.5) / len(names) * 0.8 for row in of_name]
            axes.bar(x, [getattr(row, kind) for row in of_name], 0.76 / len(names), label=name,
                     color=COLOURS[name])  # fmt: skip
        axes.set_xticks([index + 0.4 for index in range(len(models))], models)
        axes.set(title=f"{SHORT_DTYPES[panel[0]]} batch {panel[1]}: {MEMORY[kind]}", ylabel="MiB")

    return _panels(record, "Memory of a training step (lower is better)", panels, draw, path, 2)


def _panels(
    record: Record,
    title: str,
    panels: Sequence[Any],
    draw: Callable[[Any, Any], None],
    path: Path,
    most: int = 3,
) -> Path:
    """Draw panels in rows of `most`, under them one legend for all and the conditions."""
    across = min(most, len(panels))
    down = -(-len(panels) // across)
    figure = chart.figure_class()(figsize=(max(7.5, 4.2 * across + 0.6), 3.2 * down + 1.4),
                                  dpi=140, layout="constrained")  # fmt: skip
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        draw(axes, panel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#ececec")
        axes.set_axisbelow(True)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles = {
        label: handle
        for axes in grid
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    conditions = textwrap.fill(conditions_line(record.conditions), int(20 * figure.get_figwidth()))
    legend = figure.legend(
        handles.values(), handles, loc="outside lower center", frameon=False, fontsize=8,
        ncols=min(len(handles), int(figure.get_figwidth() / 1.2)), title=conditions,
        title_fontproperties={"size": 6.5},
    )  # fmt: skip
    legend.get_title().set(color="#555", ha="center")
    figure.suptitle(title)
    write_file(path, lambda temporary: figure.savefig(temporary))
    return path
