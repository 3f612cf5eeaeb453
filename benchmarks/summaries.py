"""What the documents show: a line per case, with eager torch and the best peer.

Of convolutions, which are many, a line per kind: a model's sum.
"""

from __future__ import annotations

import operator
import statistics

from benchmarks import convolutions as conv
from benchmarks import limits
from resnet_fused.bench.contenders import FROZEN, FUSED, FUSED_LOW, REFERENCE
from resnet_fused.bench.options import SHORT_DTYPES
from resnet_fused.bench.results import (
    BLOCK,
    Case,
    PeerCell,
    Record,
    Row,
    against_peers,
    cases_of,
)
from resnet_fused.bench.tables import NONE, Grid, mean_text, ratio_text

Found = dict[tuple[Case, str], Row]


def inference(record: Record) -> list[Grid]:
    """Return images a second of the package and of the best peer."""
    found = _by_contender(record)
    cells = against_peers(record.rows)
    rows = [
        [
            *_where(cell.case), *_speeds(found, cell.case, REFERENCE, FUSED, FROZEN),
            *_best(cell),
        ]
        for cell in cells
    ]  # fmt: skip
    mean = mean_text([cell.ratio.median for cell in cells if cell.ratio])
    rows.append(["geometric mean", *[""] * 6, f"**{mean}**"])
    columns = (
        "model", "dtype", "batch", "eager", "fused", "frozen", "best peer", "frozen / peer",
    )  # fmt: skip
    return [Grid("images a second", columns, rows, left=("model", "dtype", "best peer"))]


def training(record: Record) -> list[Grid]:
    """Return a training step's speed against eager and the best peer, and its memory."""
    found = _by_contender(record)
    peers = {cell.case: cell for cell in against_peers(record.rows, FUSED)}
    own = (REFERENCE, FUSED, FUSED_LOW)
    rows = [
        [
            *_where(case), *_speeds(found, case, REFERENCE),
            *_ratios(found, case, FUSED, FUSED_LOW),
            *(_best(peers[case]) if case in peers else (NONE, NONE)),
            *(_memory(found, case, name, kind) for kind in ("saved_mib", "peak_mib")
              for name in own),
        ]
        for case in cases_of(record.rows)
    ]  # fmt: skip
    columns = (
        "model", "dtype", "batch", "eager img/s", "fused", "low", "best peer", "fused / peer",
        *(f"{what} MiB {name}" for what in ("kept", "peak") for name in ("eager", "fused", "low")),
    )  # fmt: skip
    return [Grid("training steps", columns, rows, left=("model", "dtype", "best peer"))]


def blocks(record: Record) -> list[Grid]:
    """Return a block's time against eager and the best peer, and how often each model runs it."""
    found = _by_contender(record)
    peers = {cell.case: cell for cell in against_peers(record.rows)}
    cases = cases_of(record.rows)
    rows = [
        [
            case.layer, _uses(found, case), SHORT_DTYPES[case.dtype], str(case.batch),
            _microseconds(found.get((case, REFERENCE))), *_ratios(found, case, FUSED, FROZEN),
            *(_best_time(peers[case]) if case in peers else (NONE, NONE)),
        ]
        for case in cases
    ]  # fmt: skip
    of_peers = mean_text([cell.ratio.median for cell in peers.values() if cell.ratio])
    fused, frozen = (_mean_ratio(found, cases, name) for name in (FUSED, FROZEN))
    rows.append(["geometric mean", *[""] * 4, fused, frozen, "", of_peers])
    columns = ("block", "times in", "dtype", "batch", "eager us", "fused", "frozen", "best peer us",
               "frozen / peer")  # fmt: skip
    left = ("block", "times in", "dtype", "best peer us")
    kind = limits.caches(record).get(BLOCK, "unknown")
    return [Grid(f"residual blocks, each with {kind} caches", columns, rows, left=left)]


def convolutions(record: Record) -> list[Grid]:
    """Return what torch and the kernels take for all of a model's convolutions of a kind."""
    found = _by_contender(record)
    cases = [case for case in cases_of(record.rows) if _took(found, case, REFERENCE)]
    settings = dict.fromkeys(
        (model, case.dtype, case.batch) for case in cases for model in found[case, REFERENCE].uses
    )
    kinds = dict.fromkeys(conv.part_of(case.layer)[0] for case in cases)
    rows = [
        line
        for setting in settings
        for kind in kinds
        for what in conv.PASSES
        if (line := _sums(found, cases, *setting, (kind, what)))
    ]
    columns = ("model", "dtype", "batch", "convolution", "pass", "shapes", "torch ms", "kernel ms",
               "torch / kernel", "by shape")  # fmt: skip
    left = ("model", "dtype", "convolution", "pass")
    title = "convolutions of a training step, CPU time of one thread, sums over a model"
    return [Grid(title, columns, rows, left=left)]


def _sums(
    found: Found, cases: list[Case], model: str, dtype: str, batch: int, part: tuple[str, str]
) -> list[str]:
    """Return a line over the shapes that the kernel runs, nothing where it runs none."""
    every = [
        case
        for case in cases
        if (case.dtype, case.batch, conv.part_of(case.layer)) == (dtype, batch, part)
        and model in found[case, REFERENCE].uses
    ]
    here = [case for case in every if _took(found, case, conv.KERNEL)]
    if not here:
        return []
    uses = [found[case, REFERENCE].uses[model] for case in here]
    torchs, kernels = (
        [_took(found, case, name) for case in here] for name in (REFERENCE, conv.KERNEL)
    )
    sums = [sum(map(operator.mul, uses, seconds)) for seconds in (torchs, kernels)]
    ratios = list(map(operator.truediv, torchs, kernels))
    return [
        model, SHORT_DTYPES[dtype], str(batch), *part, f"{len(here)} of {len(every)}",
        *(f"{seconds * 1e3:.1f}" for seconds in sums), f"{sums[0] / sums[1]:.2f}x",
        f"{min(ratios):.2f}-{max(ratios):.2f}",
    ]  # fmt: skip


def _took(found: Found, case: Case, name: str) -> float:
    """Return the median seconds of a call, 0 where there are none."""
    row = found.get((case, name))
    return statistics.median(row.seconds) if row and row.seconds else 0.0


def _by_contender(record: Record) -> Found:
    return {(row.case, row.contender): row for row in record.rows}


def _where(case: Case) -> list[str]:
    return [case.model, SHORT_DTYPES[case.dtype], str(case.batch)]


def _speeds(found: Found, case: Case, *names: str) -> list[str]:
    rows = [found.get((case, name)) for name in names]
    return [f"{row.img_s.median:.1f}" if row and row.img_s else NONE for row in rows]


def _ratios(found: Found, case: Case, *names: str) -> list[str]:
    rows = [found.get((case, name)) for name in names]
    return [ratio_text(row.ratio) if row else NONE for row in rows]


def _mean_ratio(found: Found, cases: list[Case], name: str) -> str:
    rows = [found.get((case, name)) for case in cases]
    return mean_text([row.ratio.median for row in rows if row and row.ratio])


def _uses(found: Found, case: Case) -> str:
    uses = next((row.uses for (of, _), row in found.items() if of == case and row.uses), {})
    return ", ".join(f"{model} {count}" for model, count in uses.items())


def _microseconds(row: Row | None) -> str:
    return f"{statistics.median(row.seconds) * 1e6:.1f}" if row and row.seconds else NONE


def _best(cell: PeerCell) -> tuple[str, str]:
    return f"{cell.peer} {cell.peer_img_s:.1f}", ratio_text(cell.ratio)


def _best_time(cell: PeerCell) -> tuple[str, str]:
    return f"{cell.peer} {cell.case.batch / cell.peer_img_s * 1e6:.1f}", ratio_text(cell.ratio)


def _memory(found: Found, case: Case, name: str, kind: str) -> str:
    row = found.get((case, name))
    value = None if row is None else getattr(row, kind)
    return NONE if value is None else f"{value:.0f}"
