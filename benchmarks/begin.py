"""Options of the commands that measure, checked, and the beginning of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from benchmarks import report, runner, suite
from benchmarks.suite import Suite
from resnet_fused.bench import conditions, options, results, terminal
from resnet_fused.bench.options import Settings, UsageError
from resnet_fused.bench.results import COLD, CONVOLUTION, EPOCH, LEVELS, TRAINING, Record
from resnet_fused.bench.timing import CACHES, FED, HOT

PROGRAM = "python -m benchmarks"


def caches(asked_for: str | None, levels: tuple[str, ...]) -> Mapping[str, str]:
    """Return what calls find in the caches: what was asked for, at the levels that can have it."""
    if asked_for is None:
        return suite.CACHES
    kind = options.one_of("--cache", asked_for, CACHES)
    # A start and an epoch find what they find, convolutions are timed fed alone, and a step's input
    # comes from nowhere but memory.
    given = (COLD, EPOCH, CONVOLUTION)
    able = [n for n in LEVELS if n not in given and (n != TRAINING or kind != FED)]
    if not set(levels) & set(able):
        there = f"accepted: {HOT}, cold" if levels == (TRAINING,) else "leave it out"
        raise UsageError(f"--cache: {kind} is nothing that {levels[0]} can have; {there}")
    return {**suite.CACHES, **dict.fromkeys(able, kind)}


def graphs(asked_for: bool | None, device: str) -> bool:
    """Return whether contenders run as CUDA graphs: as asked for, else where there is a GPU."""
    if asked_for and device != "cuda":
        raise UsageError("--graphs: CUDA graphs need --device cuda")
    return device == "cuda" if asked_for is None else asked_for


def seconds(asked_for: float | None, device: str) -> Mapping[str, float]:
    """Return the seconds of timing by level: what was asked for at all of them."""
    if asked_for is None:
        return suite.SECONDS[device]
    return dict.fromkeys(LEVELS, above_zero("--seconds", asked_for))


def budget(minutes: float | None) -> float | None:
    """Return the seconds after which no other case begins, None for no end."""
    return None if minutes is None else 60 * above_zero("--minutes", minutes)


def above_zero(option: str, value: float) -> float:
    """Return a number above 0, or raise `UsageError`."""
    if not value > 0:
        raise UsageError(f"{option}: {value:g} given; accepted: a number above 0")
    return value


def run(wanted: Suite, resume: bool | None, more: dict[str, object]) -> None:
    """Run what is wanted, in a new record or the one that lies there."""
    settings = wanted.settings
    found = {
        **conditions.of(settings, PROGRAM),
        "graphs": wanted.graphs, "caches": dict(wanted.caches), "image_size": wanted.image_size,
        "rounds": settings.rounds, "seconds": dict(wanted.seconds),
        "photographs_from": str(settings.images) if settings.images else "scikit-learn", **more,
    }  # fmt: skip
    _measure(wanted, _begun(settings, found, resume))


def _begun(settings: Settings, found: dict[str, object], resume: bool | None) -> Record:
    """Return the record to go on with, or an empty one.

    Raises:
        UsageError: an unfinished run lies there and it was not said what to do with it, or it was
            measured under other conditions.
    """
    path = settings.out / report.RECORD
    if not path.exists() or resume is False:
        return Record(found, [])
    record = results.load(path)
    if resume:
        return runner.resumed(record, found, path)
    if left := record.conditions.get(runner.UNFINISHED):
        raise UsageError(
            f"{path} holds a run of which {left} cases are left: --resume goes on, --fresh begins "
            "again"
        )
    return Record(found, [])


def _measure(wanted: Suite, begun: Record) -> None:
    path = wanted.settings.out / report.RECORD
    try:
        with terminal.progress() as watch:
            made = runner.Runner(wanted, begun, lambda r: results.save(r, path), watch)
            options.writable_directory("--out", path.parent, report.FILES)
            record = made.run()
    except KeyboardInterrupt:
        typer.echo(f"{PROGRAM}: interrupted; the same command with --resume goes on", err=True)
        raise typer.Exit(130) from None
    try:  # before it is shown, which may fail
        files = report.write(record, wanted.settings.out)
    finally:
        report.show(record, terminal.console())
    _say(files)
    raise typer.Exit(0 if record.right else 1)


def written(record: Record, out: Path) -> None:
    """Write every format of a record, and say so."""
    _say(report.write(record, out))


def _say(files: Sequence[Path]) -> None:
    names = ", ".join(path.name for path in files)
    terminal.console().print(
        f"written to {files[0].parent}: {names}", highlight=False, soft_wrap=True
    )
