"""The record of one benchmark: its rows, its conditions, and the JSON file that keeps both."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_fused.bench.contenders import FROZEN, FUSED_LOW, OWN, REFERENCE
from resnet_fused.bench.options import SHORT_DTYPES, UsageError
from resnet_fused.bench.timing import Spread, paired_ratio
from resnet_fused.files import write_atomically

SCHEMA = "resnet_fused.bench/1"

OK = "ok"
WRONG = "WRONG"
FAILED = "FAILED"
SKIPPED = "skipped"
OUT_OF_MEMORY = "out of memory"
#: The process that ran it died, or had to be ended.
CRASHED = "CRASHED"
HUNG = "HUNG"
#: What makes a run a failed one. Running out of memory is an answer about a batch size.
FAULTS = (WRONG, FAILED, CRASHED, HUNG)

LEVELS = ("op", "block", "inference", "cold", "training", "epoch", "pass", "convolution")
OP, BLOCK, INFERENCE, COLD, TRAINING, EPOCH, PASS, CONVOLUTION = LEVELS


@dataclass(frozen=True)
class Case:
    """One comparison: what runs, torch's name of a dtype (or tf32), and a batch size."""

    #: Empty for an op, a block, a pass or a convolution, which may be part of several.
    model: str
    dtype: str
    batch: int
    level: str = INFERENCE
    #: An op, a block, a pass of BatchNorm or of a convolution by its shape.
    layer: str = ""

    @property
    def subject(self) -> str:
        """Return what is measured: a layer, or a model and what it does."""
        doing = "" if self.level == INFERENCE else f" {self.level}"
        return self.layer or f"{self.model}{doing}"

    def __str__(self) -> str:
        """Return the case in a few words."""
        return f"{self.subject} {SHORT_DTYPES.get(self.dtype, self.dtype)} batch {self.batch}"


@dataclass(frozen=True)
class Row:
    """What one contender did in one case.

    Only a row whose verdict is `ok` has a speed. `error` is max|y - y64| / max|y64| (in training
    1 - cosine of the gradient and float64's, after epochs the share of held-out images that are
    taken for others), None for an output that is not finite; `seconds` holds one value per round,
    per call.
    """

    case: Case
    contender: str
    verdict: str
    gmacs: float
    mparams: float
    error: float | None = None
    allowed_error: float | None = None
    img_s: Spread | None = None
    gflop_s: float | None = None
    ratio: Spread | None = None
    peak_mib: float | None = None
    seconds: list[float] = field(default_factory=list)
    note: str = ""
    #: Bytes that a call must move and seconds that it must last by the roofline of this run.
    nbytes: int | None = None
    bound_s: float | None = None
    #: MiB that a training step keeps for backward.
    saved_mib: float | None = None
    #: Seconds of each step of a cold start, by its name.
    stages: dict[str, float] = field(default_factory=dict)
    #: How often each model runs the op, block or convolution.
    uses: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """All rows of a run and the conditions they hold under."""

    conditions: dict[str, Any]
    rows: list[Row]

    @property
    def right(self) -> bool:
        """Whether no contender gave a wrong answer or failed."""
        return not any(row.verdict in FAULTS for row in self.rows)


@dataclass(frozen=True)
class PeerCell:
    """One of the package's own contenders against the quickest peer that was right, in a case."""

    case: Case
    peer: str
    peer_img_s: float
    own_img_s: float | None
    ratio: Spread | None


def cases_of(rows: Sequence[Row]) -> list[Case]:
    """Return the cases of the rows, each once, in their order."""
    return list(dict.fromkeys(row.case for row in rows))


def paired(reference: Row, other: Row) -> Spread:
    """Return how many times faster `other` is than `reference`, round by round.

    In a record of before, whose spreads do not say of how many rounds they are, the middle three
    fifths decide alone, as they did when it was made.
    """
    ratio = paired_ratio(reference.seconds, other.seconds)
    if other.img_s is not None and other.img_s.rounds is None:
        return dataclasses.replace(ratio, rounds=None, least=None, most=None)
    return ratio


def against_peers(rows: Sequence[Row], contender: str = FROZEN) -> list[PeerCell]:
    """Return one cell per case that a peer ran rightly, with one of the package's own."""
    cells = []
    for case in cases_of(rows):
        runs = {row.contender: row for row in rows if row.case == case and row.img_s}
        peers = [row for name, row in runs.items() if name not in (*OWN, FUSED_LOW)]
        if not peers:
            continue
        best = min(peers, key=lambda row: statistics.median(row.seconds))
        own = runs.get(contender)
        assert best.img_s is not None
        cells.append(
            PeerCell(
                case,
                best.contender,
                best.img_s.median,
                own.img_s.median if own and own.img_s else None,
                paired(best, own) if own else None,
            )
        )
    return cells


def geometric_means(rows: Sequence[Row]) -> dict[str, float]:
    """Return, per contender but the reference, the mean ratio over the cases it ran rightly."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row.ratio and row.contender != REFERENCE:
            ratios.setdefault(row.contender, []).append(row.ratio.median)
    return {name: statistics.geometric_mean(values) for name, values in ratios.items()}


def save(record: Record, path: Path) -> None:
    """Write the record as JSON."""
    content = {"schema": SCHEMA, **dataclasses.asdict(record)}
    save_text(json.dumps(content, indent=1, allow_nan=False) + "\n", path)


def save_text(text: str, path: Path) -> None:
    """Write text to a file, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def load(path: Path) -> Record:
    """Read a record, or raise `UsageError` naming the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise UsageError(f"{path}: its schema is {schema!r}; this version reads {SCHEMA!r}")
    try:
        return Record({**content["conditions"]}, [_row(fields) for fields in content["rows"]])
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a whole benchmark record ({error!r})") from None


def _row(fields: dict[str, Any]) -> Row:
    nested = {name: Spread(**fields[name]) if fields[name] else None for name in ("img_s", "ratio")}
    return Row(**{**fields, **nested, "case": Case(**fields["case"])})
