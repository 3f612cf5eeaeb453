"""The chart: throughput against eager, bars with p20-p80, the conditions right under it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_fused.bench.contenders import FROZEN, FUSED, FUSED_LOW, REFERENCE
from resnet_fused.bench.options import SHORT_DTYPES, UsageError
from resnet_fused.bench.results import OK, SKIPPED, Case, Record, Row, cases_of, write_file
from resnet_fused.bench.tables import conditions_line

COLOURS = {
    REFERENCE: "#b8bcc4",
    FUSED: "#f2a65a",
    FUSED_LOW: "#d98e4a",
    FROZEN: "#c8553d",
    "inductor": "#6b8fb3",
    "onnxruntime": "#4f7a5b",
    "openvino": "#7d6aa8",
    "inductor-default": "#9db8d1",
    "inductor-max-autotune": "#3f6a96",
    "eager-nchw": "#8d929c",
    "cudnn": "#3b8f8a",
    "jax": "#b0894f",
}
GROUP_WIDTH = 0.86

#: Inches: above and below the panels, of each panel with the gap under it, of a contender's name.
TOP, BOTTOM, PANEL, LEGEND = 0.75, 1.25, 2.6, 1.25


def save(record: Record, path: Path) -> None:
    """Draw the record into a PNG file: a panel per dtype, a group of bars per model and batch.

    Raises `UsageError` where matplotlib is missing, or the file cannot be written.
    """
    figure_of = figure_class()
    dtypes = list(dict.fromkeys(case.dtype for case in cases_of(record.rows)))
    contenders = list(dict.fromkeys(r.contender for r in record.rows if r.verdict != SKIPPED))
    bars = max(len(_cases(record.rows, dtype)) for dtype in dtypes) * len(contenders)
    height = TOP + BOTTOM + PANEL * len(dtypes)
    width = max(7.5, 1.5 + 0.36 * bars, 0.8 + LEGEND * len(contenders))
    figure = figure_of(figsize=(width, height), dpi=140)
    panels = figure.subplots(
        len(dtypes), 1, squeeze=False,
        gridspec_kw={"top": 1 - TOP / height, "bottom": BOTTOM / height, "hspace": 0.45},
    )[:, 0]  # fmt: skip
    for axes, dtype in zip(panels, dtypes, strict=True):
        _panel(axes, record.rows, dtype, contenders)
    figure.subplots_adjust(left=0.6 / figure.get_figwidth(), right=0.99)
    figure.suptitle(
        "Throughput against eager torch in channels_last (higher is better)", y=1 - 0.12 / height
    )
    _below(figure, record.conditions, contenders)
    write_file(path, lambda temporary: figure.savefig(temporary))


def figure_class() -> Any:
    """Return matplotlib's Figure, or raise `UsageError` where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError('the chart needs matplotlib: pip install "resnet_fused[bench]"') from None
    return Figure


def _below(figure: Any, conditions: dict[str, Any], contenders: list[str]) -> None:
    from matplotlib.patches import Patch

    height = figure.get_figheight()
    figure.legend(
        handles=[Patch(color=COLOURS[name], label=name) for name in contenders],
        loc="lower center", bbox_to_anchor=(0.5, 0.46 / height), ncols=len(contenders),
        frameon=False, fontsize=9,
    )  # fmt: skip
    text = "bars: median ratio, lines: p20-p80 of the rounds, numbers: img/s · "
    width = int(figure.get_figwidth() * 17)
    wrapped = textwrap.fill(text + conditions_line(conditions), width)
    figure.text(0.5, 0.12 / height, wrapped, ha="center", va="bottom", fontsize=7.5, color="#555")


def _cases(rows: Sequence[Row], dtype: str) -> list[Case]:
    return [case for case in cases_of(rows) if case.dtype == dtype]


def _panel(axes: Any, rows: Sequence[Row], dtype: str, contenders: list[str]) -> None:
    cases = _cases(rows, dtype)
    width = GROUP_WIDTH / len(contenders)
    found = {(row.case, row.contender): row for row in rows}
    axes.axhline(1, color="#555", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
    for place, name in enumerate(contenders):
        shift = (place - (len(contenders) - 1) / 2) * width
        for position, case in enumerate(cases):
            if row := found.get((case, name)):
                _bar(axes, row, position + shift, width * 0.94)
    axes.set_xticks(range(len(cases)), [f"{case.subject}\nbatch {case.batch}" for case in cases])
    axes.set_xlim(-0.5, max(len(cases), 2) - 0.5)
    axes.set_ylim(0, max(1.25, axes.get_ylim()[1]))
    axes.set_ylabel("times eager's img/s")
    axes.set_title(SHORT_DTYPES[dtype], loc="left", fontsize=10, fontweight="bold")
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(True, color="#e8e8e8")
    axes.set_axisbelow(True)


def speed_text(img_s: float) -> str:
    """Return images a second in three digits, large ones whole."""
    return f"{img_s:.0f}" if img_s >= 100 else f"{img_s:.3g}"


def _bar(axes: Any, row: Row, x: float, width: float) -> None:
    """Draw one bar with its img/s written inside; a wrong or failed run gets a word, no bar."""
    text = {"ha": "center", "va": "bottom", "rotation": 90, "fontsize": 8, "zorder": 4}
    if row.img_s is None or row.ratio is None:
        if row.verdict not in (OK, SKIPPED):
            axes.text(x, 0.04, row.verdict, color="#b00020", fontweight="bold", **text)
        return
    axes.bar(x, row.ratio.median, width, color=COLOURS[row.contender])
    if row.contender != REFERENCE:  # its ratio to itself has no spread
        low, high = row.ratio.median - row.ratio.p20, row.ratio.p80 - row.ratio.median
        error = [[low], [high]]
        axes.errorbar(x, row.ratio.median, error, color="#333", elinewidth=1, capsize=2)
    from matplotlib.patheffects import withStroke

    edge = [withStroke(linewidth=2, foreground="white")]  # readable on a bar and beside a short one
    axes.text(x, 0.04, speed_text(row.img_s.median), color="#222", path_effects=edge, **text)
