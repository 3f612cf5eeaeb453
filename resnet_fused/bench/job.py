"""The job itself: the plan of cases, and for each the building, checking and timing."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fused.bench import accuracy, memory, networks, photos, timing
from resnet_fused.bench.contenders import OWN, REFERENCE, Build, Runner, Setup
from resnet_fused.bench.networks import CALIBRATION_BATCH, CALIBRATION_PASSES, Network
from resnet_fused.bench.options import DTYPES, Settings
from resnet_fused.bench.peers import PEERS
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import FAILED, OK, SKIPPED, WRONG, Case, Record, Row

#: Seconds that all cases together may take per contender, building and checking included. The
#: cases share what is left, so that what the small ones do not need goes to the large ones.
BUDGET_S = 40.0


@dataclass
class Entry:
    """A contender in one case: what is known of it so far."""

    row: Row
    runner: Runner | None = None
    input: Any = None


def plan(settings: Settings) -> list[Case]:
    """Return all cases, those of a model together so that it is built once."""
    return [
        Case(model, dtype, batch)
        for model in settings.models
        for dtype in settings.dtypes
        for batch in settings.batches
    ]


def run(settings: Settings, conditions: dict[str, Any], watch: Watch) -> Record:
    """Run every case and return the record.

    The process is left as it was, but for torch's number of threads.
    """
    import resnet_fused as rf

    torch.set_num_threads(settings.threads)
    pictures, names = _pictures(settings)
    cases = plan(settings)
    watch.begin(len(cases))
    rows: list[Row] = []
    network: Network | None = None
    # The reference on a GPU deserves cuDNN's measured choice, as a person in earnest would set it.
    with (
        tempfile.TemporaryDirectory() as scratch,
        rf.use_backend(settings.backend),
        torch.backends.cudnn.flags(enabled=True, benchmark=True),
    ):
        ends = time.perf_counter() + BUDGET_S * len(_contenders(settings.peers))
        for index, case in enumerate(cases):
            if network is None or network.name != case.model:
                watch.doing(f"{case.model}: calibrating, float64 answers")
                network = networks.build(case.model, pictures, seed=settings.seed)
            setup = _setup(network, case, settings, pictures, Path(scratch))
            begin = time.perf_counter()
            share_ends = begin + (ends - begin) / (len(cases) - index)
            done = run_case(network, case, setup, settings, share_ends, watch)
            rows += done
            watch.case_done(case, done)
    return Record({**conditions, "photographs": names}, rows)


def rounds_for(asked: int | None, ends: float) -> timing.Rounds:
    """Return exactly the rounds asked for, or else as many as end by `ends` on the wall clock."""
    if asked is not None:
        return timing.Rounds(asked, asked)
    return timing.Rounds(seconds=ends - time.perf_counter())


def run_case(
    network: Network,
    case: Case,
    setup: Setup,
    settings: Settings,
    ends: float,
    watch: Watch,
) -> list[Row]:
    """Build, check, time and check again, by `ends` if the number of rounds was left open.

    A contender whose answer is wrong before the timing is not timed, and one whose answer is wrong
    after it (a reused buffer, say) loses its times.
    """
    check = accuracy.check_batch(network.checked, case.batch)
    entries: list[Entry] = []
    eager_error = math.inf
    for name, build in _contenders(settings.peers).items():
        watch.doing(f"{describe(case)}: building {name}")
        entry = _enter(name, build, network, case, setup)
        if entry.runner:
            error = _error(entry.runner, check, network.answers)
            eager_error = error if name == REFERENCE else eager_error
            entry.row = _judged(entry.row, error, eager_error, network, setup)
        entries.append(entry)

    rounds = rounds_for(settings.rounds, ends)
    seconds = _time(case, [e for e in entries if e.row.verdict == OK], setup, rounds, watch)
    for entry in entries:
        if entry.row.verdict == OK and entry.runner:
            error = max(entry.row.error or 0.0, _error(entry.runner, check, network.answers))
            entry.row = _judged(entry.row, error, eager_error, network, setup)
    right = {e.row.contender: seconds[e.row.contender] for e in entries if e.row.verdict == OK}
    return [with_speed(entry.row, right) for entry in entries]


def describe(case: Case) -> str:
    """Return the case in a few words."""
    return f"{case.model} {case.dtype} batch {case.batch}"


def with_speed(row: Row, seconds: dict[str, list[float]]) -> Row:
    """Return the row with the speeds that its seconds per call give, if it has any.

    GFLOP/s counts two operations per multiply-add of the convolutions and linear layers. `ratio`
    is taken round by round against the reference and is above 1 for what is quicker.
    """
    own, reference = seconds.get(row.contender), seconds.get(REFERENCE)
    if own is None:
        return row
    img_s = timing.spread([row.case.batch / value for value in own])
    return replace(
        row,
        img_s=img_s,
        gflop_s=2 * row.gmacs * img_s.median,
        ratio=timing.paired_ratio(reference, own) if reference else None,
        seconds=own,
    )


def _pictures(settings: Settings) -> tuple[Tensor, list[str]]:
    count = max(*settings.batches, CALIBRATION_BATCH * CALIBRATION_PASSES)
    loaded, names = photos.load(settings.images, count)
    return photos.batch(loaded, count, seed=settings.seed), names


def _setup(
    network: Network, case: Case, settings: Settings, pictures: Tensor, scratch: Path
) -> Setup:
    return Setup(
        name=network.name,
        model=network.model,
        example=pictures[: case.batch],
        dtype=DTYPES[case.dtype],
        device=settings.device,
        threads=settings.threads,
        scratch=scratch,
    )


def _contenders(peers: tuple[str, ...]) -> dict[str, Build]:
    return {**OWN, **{name: PEERS[name].build for name in peers}}


def _enter(name: str, build: Build, network: Network, case: Case, setup: Setup) -> Entry:
    """Build a contender and run it twice, the second time for its peak memory."""
    row = Row(case, name, OK, network.macs / 1e9, network.params / 1e6)
    declined = PEERS[name].declines(setup.dtype, setup.device) if name in PEERS else None
    if declined:
        return Entry(replace(row, verdict=SKIPPED, note=declined))
    meter = memory.meter_for(setup.device)
    before = meter.now()
    try:
        runner = build(setup)
        example = runner.prepare(setup.example)
        with torch.inference_mode():
            runner.run(example)
            meter.restart()
            runner.run(example)
    # Whatever a contender dies of is its own result; the others must still be measured.
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return Entry(replace(row, verdict=FAILED, note=f"{type(error).__name__}: {reason[0]}"))
    peak = memory.growth_mib(before, meter.peak())
    return Entry(replace(row, peak_mib=peak), runner, example)


def _error(runner: Runner, check: Tensor, answers: Tensor) -> float:
    with torch.inference_mode():
        return accuracy.relative_error(runner.read(runner.run(runner.prepare(check))), answers)


def _judged(row: Row, error: float, eager_error: float, network: Network, setup: Setup) -> Row:
    allowed = accuracy.allowed_error(eager_error, setup.dtype, network.reduced)
    finite = math.isfinite(error)
    if error <= allowed:
        verdict, note = OK, ""
    elif finite:
        verdict, note = WRONG, f"error {error:.1e}, allowed {allowed:.1e}"
    else:
        verdict, note = WRONG, "output of the wrong shape or not finite"
    return replace(
        row, verdict=verdict, error=error if finite else None, allowed_error=allowed, note=note
    )


def _time(
    case: Case, entries: list[Entry], setup: Setup, rounds: timing.Rounds, watch: Watch
) -> dict[str, list[float]]:
    if not entries:
        return {}

    def on_round(done: int) -> None:
        watch.doing(f"{describe(case)}: round {done}")

    runs = {entry.row.contender: _call(entry) for entry in entries}
    with torch.inference_mode():
        return timing.interleave(
            runs, rounds, clock=timing.clock_for(setup.device), on_round=on_round
        )


def _call(entry: Entry) -> Any:
    runner, example = entry.runner, entry.input
    assert runner is not None
    return lambda: runner.run(example)
