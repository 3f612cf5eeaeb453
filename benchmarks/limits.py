"""How near each layer and model comes to what the device could do, and where the time is lost.

The bound is the roofline with the peaks of the run itself: the longer of the times that a layer's
operations and its bytes take. Operations are those of the direct sum, so a Winograd convolution may
pass its bound of arithmetic.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.peaks import Peaks
from resnet_fused.bench.contenders import FROZEN, FUSED, REFERENCE
from resnet_fused.bench.options import SHORT_DTYPES
from resnet_fused.bench.results import INFERENCE, OP, Case, Record, Row
from resnet_fused.bench.tables import NONE, Grid

#: Rows of the table of losses; the rest are in the CSV file.
MOST = 12
#: Whose faster one shows what a layer loses: `fused` may pack weights at every call, and an engine
#: of one layer copies its input, neither of which a layer inside a whole engine does.
OWN = (FUSED, FROZEN)


@dataclass(frozen=True)
class Reached:
    """A row beside its bound."""

    row: Row
    flops: float
    nbytes: int
    bound_s: float
    seconds: float
    bound: str

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.nbytes

    @property
    def share(self) -> float:
        """The share of the device's speed that was reached."""
        return self.bound_s / self.seconds

    def lost(self, model: str) -> float:
        """Seconds that a forward of the model spends in the layer beyond the bound."""
        return self.row.uses[model] * (self.seconds - self.bound_s)


def reached(rows: Sequence[Row], peaks: Peaks | None) -> list[Reached]:
    """Return those of the rows that were timed and have a bound."""
    found = []
    for row in rows:
        if row.bound_s is None or row.nbytes is None or not row.seconds or peaks is None:
            continue
        flops = 2e9 * row.gmacs * row.case.batch
        compute = flops / peaks.flops[row.case.dtype] > row.nbytes / peaks.bandwidth
        seconds = statistics.median(row.seconds)
        kind = "compute" if compute else "memory"
        found.append(Reached(row, flops, row.nbytes, row.bound_s, seconds, kind))
    return found


def grids(record: Record, most: int | None = MOST) -> list[Grid]:
    """Return the tables: time lost by layer, predictions, models beside their bound."""
    peaks = Peaks.of(record.conditions)
    timed = reached(record.rows, peaks)
    ops = _fastest([r for r in timed if r.row.case.level == OP and r.row.contender in OWN])
    settings = dict.fromkeys(
        (model, r.row.case.dtype, r.row.case.batch) for r in ops for model in r.row.uses
    )
    tables = [_losses(ops, *setting, most) for setting in settings]
    models = [r for r in timed if r.row.case.level == INFERENCE]
    kind = caches(record).get(OP, "unknown")
    return [*tables, *_predictions(record.rows, kind), *_models(models)]


def caches(record: Record) -> dict[str, str]:
    """Return what calls found in the caches, for the levels that the record has rows of."""
    found: dict[str, str] = record.conditions.get("caches", {})
    present = {row.case.level for row in record.rows}
    return {level: kind for level, kind in found.items() if level in present}


def _fastest(ops: list[Reached]) -> list[Reached]:
    found: dict[Case, Reached] = {}
    for r in ops:
        other = found.setdefault(r.row.case, r)
        found[r.row.case] = min(other, r, key=lambda one: one.seconds)
    return list(found.values())


def _losses(ops: list[Reached], model: str, dtype: str, batch: int, most: int | None) -> Grid:
    here = [
        r
        for r in ops
        if model in r.row.uses and (r.row.case.dtype, r.row.case.batch) == (dtype, batch)
    ]
    here.sort(key=lambda r: -r.lost(model))
    total = sum(r.row.uses[model] * r.seconds for r in here)
    rows = [
        [
            r.row.case.layer, str(r.row.uses[model]), f"{r.flops / 1e9:.3g}",
            f"{r.nbytes / 1e6:.3g}", f"{r.intensity:.0f}", r.bound, f"{r.bound_s * 1e6:.1f}",
            r.row.contender, f"{r.seconds * 1e6:.1f}", f"{r.share:.0%}",
            f"{r.lost(model) * 1e6:.1f}", f"{r.lost(model) / total:.1%}",
        ]
        for r in here[:most]
    ]  # fmt: skip
    kept = f", the first {most} of {len(here)}" if most and len(here) > most else ""
    return Grid(
        f"{model} {SHORT_DTYPES[dtype]} batch {batch}: time lost by layer, the faster of "
        f"{' and '.join(OWN)}{kept}",
        ("layer", "times", "GFLOP", "MB", "FLOP/B", "bound", "bound us", "run", "us", "reached",
         "lost us", "of model"),
        rows,
        left=("layer", "bound", "run"),
    )  # fmt: skip


def predicted(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Return the rows of whole models with the seconds that their ops alone add up to.

    A model is left out where an op of its was not measured for that contender.
    """
    found = []
    for whole in rows:
        case = whole.case
        if case.level != INFERENCE or not whole.seconds:
            continue
        parts = [
            row
            for row in rows
            if (row.case.level, row.case.dtype, row.case.batch) == (OP, case.dtype, case.batch)
            and row.contender == whole.contender
            and case.model in row.uses
        ]
        if parts and all(row.seconds for row in parts):
            times = (row.uses[case.model] * statistics.median(row.seconds) for row in parts)
            found.append((whole, sum(times)))
    return found


def _predictions(rows: Sequence[Row], kind: str) -> list[Grid]:
    cells = [
        [
            *_where(row), row.contender, f"{seconds * 1e3:.2f}",
            f"{statistics.median(row.seconds) * 1e3:.2f}",
            f"{statistics.median(row.seconds) / seconds:.2f}",
        ]
        for row, seconds in predicted(rows)
    ]  # fmt: skip
    columns = ("model", "dtype", "batch", "run", "sum of ops ms", "measured ms", "measured / sum")
    title = f"Whole models beside the sum of their ops, each op with {kind} caches"
    return [Grid(title, columns, cells, left=("model", "dtype", "run"))] if cells else []


def _models(models: list[Reached]) -> list[Grid]:
    cells = [
        [
            *_where(r.row), r.row.contender, f"{r.flops / 1e9:.4g}", f"{r.nbytes / 1e6:.4g}",
            f"{r.intensity:.0f}", f"{r.row.case.batch / r.bound_s:.1f}",
            f"{r.row.case.batch / r.seconds:.1f}", f"{r.share:.0%}",
        ]
        for r in models
        if r.row.contender in (REFERENCE, FROZEN)
    ]  # fmt: skip
    columns = ("model", "dtype", "batch", "run", "GFLOP", "MB", "FLOP/B", "bound img/s", "img/s",
               "reached")  # fmt: skip
    title = "Whole models beside the bound of their layers"
    return [Grid(title, columns, cells, left=("model", "dtype", "run"))] if cells else []


def _where(row: Row) -> list[str]:
    return [row.case.model or NONE, SHORT_DTYPES[row.case.dtype], str(row.case.batch)]
