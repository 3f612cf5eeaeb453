"""The record of one benchmark: its rows, its conditions, and the JSON file that keeps both."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_fused.bench.contenders import FROZEN, FUSED_LOW, OWN, REFERENCE
from resnet_fused.bench.options import PRECISIONS, SHORT_DTYPES, UsageError
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
VERDICTS = (OK, SKIPPED, OUT_OF_MEMORY, *FAULTS)

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
    """Write text to a file, whole or not at all, or raise `UsageError`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_file(path, write)


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file, whole or not at all, or raise `UsageError` naming it."""
    try:
        write_atomically(path, write)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None


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
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: not a whole benchmark record ({error!r})") from None


def _row(fields: dict[str, Any]) -> Row:
    nested = {name: Spread(**fields[name]) if fields[name] else None for name in ("img_s", "ratio")}
    row = Row(**{**fields, **nested, "case": Case(**fields["case"])})
    _check_types(row)
    case, spreads = row.case, [s for s in (row.img_s, row.ratio) if s]
    for name, value, accepted in (
        ("dtype", case.dtype, tuple(PRECISIONS)),
        ("level", case.level, LEVELS),
        ("verdict", row.verdict, VERDICTS),
    ):
        if value not in accepted:
            raise ValueError(f"{name} {value!r}")
    if case.batch < 1:
        raise ValueError(f"batch {case.batch}")
    times = [*row.seconds, *(v for s in spreads for v in (s.median, s.p20, s.p80))]
    if not all(0 < value < math.inf for value in times) or (row.img_s and not row.seconds):
        raise ValueError(f"seconds {row.seconds}, {spreads} of {case} {row.contender}")
    return row


_hints: Callable[[type], dict[str, Any]] = functools.cache(typing.get_type_hints)


def _check_types(value: Any) -> None:
    """Raise `TypeError` where a field of a dataclass holds something else than it is annotated."""
    for name, kind in _hints(type(value)).items():
        if not _fits(found := getattr(value, name), kind):
            raise TypeError(f"{name} {found!r}")


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, parts[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, parts[1]) for v in value.values())
    if parts:  # a union
        return any(_fits(value, part) for part in parts)
    if isinstance(value, Case | Spread):
        _check_types(value)
    return isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
