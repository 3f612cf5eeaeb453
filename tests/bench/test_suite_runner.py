"""What the runner makes of a worker's answers: kept cases, lost contenders, smaller batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peaks, runner
from benchmarks.peaks import Peaks
from benchmarks.suite import Suite
from benchmarks.worker import Done, Lost, Raised, Step
from resnet_fused.bench.options import Settings, UsageError
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import (
    CRASHED,
    HUNG,
    INFERENCE,
    OK,
    OUT_OF_MEMORY,
    SKIPPED,
    Case,
    Record,
    Row,
)

PEAKS = Peaks({"float32": 1e11}, 1e10)
#: Says what happens in a case that these contenders are in.
Happens = Callable[[Case, tuple[str, ...]], Any]


def fine(case: Case, names: tuple[str, ...]) -> Done:
    return Done([Row(case, name, OK, 1.0, 1.0, seconds=[0.1]) for name in names])


class Scripted:
    """A worker without a process."""

    def __init__(self, happens: Happens = fine) -> None:
        self.happens = happens
        self.asked: list[tuple[Case, tuple[str, ...]]] = []
        self.closed = False

    def call(self, function: Any, *arguments: Any, **options: Any) -> Any:
        if function is peaks.measured:
            return Done(PEAKS)
        _, case, names, *_ = arguments
        self.asked.append((case, names))
        return self.happens(case, names)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def suite(settings: Settings) -> Suite:
    """Two models at batch 1 and 3, without peers."""
    levels = dict.fromkeys(("op", "block", "inference", "cold", "training"))
    return Suite(
        settings=replace(settings, models=("resnet18", "resnet34")),
        levels=(INFERENCE,),
        peers=dict.fromkeys(levels, ()),
        image_size=32,
        caches=dict.fromkeys(levels, "hot"),
        graphs=False,
        seconds=dict.fromkeys(levels, 1.0),
        limit=10.0,
    )


def run(
    suite: Suite, worker: Scripted, begun: Record | None = None, saved: list[Record] | None = None
) -> Record:
    keep = [] if saved is None else saved
    return runner.Runner(suite, begun or Record({}, []), keep.append, Watch(), worker).run()


def verdicts(record: Record, case: Case) -> dict[str, str]:
    return {row.contender: row.verdict for row in record.rows if row.case == case}


def test_every_case_is_saved_when_it_is_done(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resnet_fused.env.clocks", lambda: {"clocks.sm": "1980 MHz"})
    saved: list[Record] = []
    worker = Scripted()
    record = run(suite, worker, saved=saved)
    assert [len(r.rows) for r in saved] == [3, 6, 9, 12]
    assert [r.conditions.get(runner.UNFINISHED) for r in saved] == [3, 2, 1, None]
    assert record.conditions["peaks"] == PEAKS.to_dict()
    assert record.conditions["clocks_after"] == {"clocks.sm": "1980 MHz"}
    assert worker.closed


def test_an_interrupted_run_goes_on_where_it_was(suite: Suite) -> None:
    saved: list[Record] = []

    def interrupted(case: Case, names: tuple[str, ...]) -> Done:
        if len(saved) == 2:
            raise KeyboardInterrupt
        return fine(case, names)

    worker = Scripted(interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(suite, worker, saved=saved)
    assert worker.closed
    assert saved[-1].conditions[runner.UNFINISHED] == 2

    again = Scripted()
    record = run(suite, again, saved[-1])
    assert [case for case, _ in again.asked] == [
        Case("resnet34", "float32", 1),
        Case("resnet34", "float32", 3),
    ]
    assert len(record.rows) == 12
    assert record.right
    assert runner.UNFINISHED not in record.conditions


def test_a_contender_that_crashes_costs_nobody_else_the_case(suite: Suite) -> None:
    def crashing(case: Case, names: tuple[str, ...]) -> Any:
        if "fused" in names and case.batch == 1:
            return Lost(False, -11, Step("building fused", "fused"))
        return fine(case, names)

    record = run(suite, Scripted(crashing))
    assert verdicts(record, Case("resnet18", "float32", 1)) == {
        "eager": OK,
        "fused": CRASHED,
        "frozen": OK,
    }
    assert verdicts(record, Case("resnet18", "float32", 3))["fused"] == OK
    assert not record.right
    lost = next(row for row in record.rows if row.verdict == CRASHED)
    assert lost.note == "ended by SIGSEGV while building fused"
    assert lost.gmacs == 1.0


def test_each_turn_of_cold_starts_has_the_limit(suite: Suite) -> None:
    """Four starts of a contender that compiles last longer than any other case."""
    case = Case("resnet18", "float32", 1)
    assert suite.limit_of(case) == suite.limit
    assert suite.limit_of(replace(case, level="cold")) == suite.settings.rounds * suite.limit
    usual = replace(suite, settings=replace(suite.settings, rounds=None))
    assert usual.limit_of(replace(case, level="cold")) == 4 * suite.limit


def test_a_gpu_that_is_lost_costs_the_guilty_alone(suite: Suite) -> None:
    def losing(case: Case, names: tuple[str, ...]) -> Any:
        if "fused" in names and case.batch == 1:
            return Lost(False, None, Step("building fused", "fused"), "CUDA error: illegal access")
        return fine(case, names)

    record = run(suite, Scripted(losing))
    found = verdicts(record, Case("resnet18", "float32", 1))
    assert found == {"eager": OK, "fused": CRASHED, "frozen": OK}
    lost = next(row for row in record.rows if row.verdict == CRASHED)
    assert lost.note == "CUDA error: illegal access while building fused"


def test_a_hang_in_the_rounds_costs_its_case_and_the_run_goes_on(suite: Suite) -> None:
    def hanging(case: Case, names: tuple[str, ...]) -> Any:
        return Lost(True, None, Step("round 2", None)) if case.batch == 1 else fine(case, names)

    record = run(suite, Scripted(hanging))
    assert set(verdicts(record, Case("resnet18", "float32", 1)).values()) == {HUNG}
    assert set(verdicts(record, Case("resnet34", "float32", 3)).values()) == {OK}


def test_out_of_memory_halves_the_batch_until_it_fits(suite: Suite) -> None:
    def scarce(case: Case, names: tuple[str, ...]) -> Any:
        if case.batch <= 3:
            return fine(case, names)
        return Raised(MemoryError("CUDA out of memory")) if case.batch > 12 else Lost(
            False, -9, Step("building eager", "eager")
        )  # fmt: skip

    large = replace(suite, settings=replace(suite.settings, models=("resnet18",), batches=(24,)))
    worker = Scripted(scarce)
    record = run(large, worker)
    assert [case.batch for case, _ in worker.asked] == [24, 12, 6, 3]
    found = {row.case.batch: row.verdict for row in record.rows}
    assert found == {24: OUT_OF_MEMORY, 12: OUT_OF_MEMORY, 6: OUT_OF_MEMORY, 3: OK}
    assert record.right


def test_a_halved_batch_is_not_forgotten_by_an_interruption(suite: Suite) -> None:
    large = replace(suite, settings=replace(suite.settings, models=("resnet18",), batches=(4,)))
    rows = [
        Row(Case("resnet18", "float32", 4), name, OUT_OF_MEMORY, 0, 0)
        for name in ("eager", "fused", "frozen")
    ]
    worker = Scripted()
    run(large, worker, Record({}, rows))
    assert [case.batch for case, _ in worker.asked] == [2]


def test_who_had_no_memory_is_not_asked_for_a_larger_batch(suite: Suite) -> None:
    def scarce(case: Case, names: tuple[str, ...]) -> Done:
        rows = fine(case, names).result
        return Done([
            replace(row, verdict=OUT_OF_MEMORY, seconds=[]) if row.contender == "fused" else row
            for row in rows
        ])  # fmt: skip

    record = run(suite, Scripted(scarce))
    assert verdicts(record, Case("resnet18", "float32", 3))["fused"] == SKIPPED
    assert any(row.note == "out of memory at batch 1 already" for row in record.rows)


def test_a_budget_leaves_the_rest_to_another_run(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(runner.time, "monotonic", functools.partial(next, clock))
    record = run(replace(suite, budget=25.0), Scripted())
    assert len(record.rows) == 6
    assert record.conditions[runner.UNFINISHED] == 2


def test_peaks_that_cannot_be_measured_end_the_run(suite: Suite) -> None:
    worker = Scripted()
    worker.call = lambda *args, **options: Lost(False, 1, None)  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="peaks could not be measured: ended with exit code 1"):
        run(suite, worker)


@pytest.mark.parametrize(
    ("name", "other"),
    [("packages", {"jax": "2"}), ("driver", "2"), ("cuda", "14"), ("cudnn", 9), ("rounds", 3),
     ("seconds", {"op": 9.0})],
)  # fmt: skip
def test_another_library_or_another_effort_is_another_run(name: str, other: object) -> None:
    said = {"packages": {"jax": "1"}, "driver": "1", "cuda": "13", "cudnn": 8, "rounds": None,
            "seconds": {"op": 0.5}}  # fmt: skip
    with pytest.raises(UsageError, match=f"another {name}"):
        runner.resumed(Record(said, []), {**said, name: other}, Path("x.json"))


def test_a_run_goes_on_under_the_same_conditions_only() -> None:
    record = Record({"threads": 2, "commit": "abc", "date": "then", "peaks": 1}, [])
    same = runner.resumed(record, {"threads": 2, "commit": "abc", "date": "now"}, Path("x.json"))
    assert same.conditions == {"threads": 2, "commit": "abc", "date": "now", "peaks": 1}
    with pytest.raises(UsageError, match=r"--resume: x.json was measured with another threads: 2"):
        runner.resumed(record, {"threads": 4, "commit": "abc"}, Path("x.json"))
