"""The README's table of results, made from ``benchmarks/results/*.json`` and from nothing else."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

from resnet_fused.bench import chart
from resnet_fused.bench.contenders import FROZEN, FUSED, REFERENCE
from resnet_fused.bench.options import SHORT_DTYPES, UsageError
from resnet_fused.bench.results import INFERENCE, PeerCell, Record, against_peers, load
from resnet_fused.bench.results import save as save_record
from resnet_fused.bench.tables import Grid, conditions_line

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
COLUMNS = ("model", "dtype", "batch", "eager", "fused", "frozen", "best peer", "frozen / peer")


def section() -> str:
    """Return the section: a chart, a table and its conditions for each device."""
    records = [(path, load(path)) for path in sorted(RESULTS.glob("*.json"))]
    return "\n\n".join(_device(path, record) for path, record in records)


def save(readme: Path) -> None:
    """Put the section between the README's two marks.

    Raises:
        UsageError: the file cannot be read, or has not these two.
    """
    try:
        before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    except OSError as error:
        raise UsageError(f"--save-table: {readme}: {error.strerror}") from None
    _, mark, after = rest.partition(END)
    if not mark:
        raise UsageError(f"--save-table: {readme} has no {BEGIN} followed by {END}")
    text = f"{before}{BEGIN}\n{section()}\n{END}{after}"
    readme.write_text(text, encoding="utf-8")


def keep(record: Record, name: str) -> None:
    """Put a record and its chart where the section comes from.

    Raises:
        UsageError: the record is unfinished, or has no model that a peer ran too.
    """
    if left := record.conditions.get("unfinished"):
        raise UsageError(f"{name}: {left} cases of the record are left; --resume measures them")
    if not against_peers(_inference(record).rows):
        raise UsageError(f"{name}: the record has no model that a peer ran; see `models`")
    RESULTS.mkdir(exist_ok=True)  # git keeps no empty folder
    chart.save(_inference(record), RESULTS / f"{name}.png")
    save_record(record, RESULTS / f"{name}.json")


def _inference(record: Record) -> Record:
    return replace(record, rows=[row for row in record.rows if row.case.level == INFERENCE])


def _device(path: Path, record: Record) -> str:
    record = _inference(record)
    cells = against_peers(record.rows)
    ratios = [cell.ratio.median for cell in cells if cell.ratio]
    mean = f"**{statistics.geometric_mean(ratios):.2f}x**"
    rows = [_row(record, cell) for cell in cells]
    rows.append(["geometric mean", *[""] * (len(COLUMNS) - 2), mean])
    device = record.conditions["device"]
    words = ("model", "dtype", "best peer")
    grid = Grid(f"Images a second on {device}", COLUMNS, rows, left=words)
    picture = path.with_suffix(".png").relative_to(RESULTS.parents[1]).as_posix()
    conditions = f"{conditions_line(record.conditions)} · `{record.conditions['command']}`"
    return f"![Throughput against eager torch]({picture})\n\n{grid.markdown()}\n\n{conditions}"


def _row(record: Record, cell: PeerCell) -> list[str]:
    speeds = {
        row.contender: row.img_s.median
        for row in record.rows
        if row.case == cell.case and row.img_s
    }
    own = [f"{speeds[name]:.1f}" if name in speeds else "-" for name in (REFERENCE, FUSED, FROZEN)]
    ratio = f"{cell.ratio.median:.2f}x" if cell.ratio else "-"
    case = [cell.case.model, SHORT_DTYPES[cell.case.dtype], str(cell.case.batch)]
    return [*case, *own, f"{cell.peer} {cell.peer_img_s:.1f}", ratio]
