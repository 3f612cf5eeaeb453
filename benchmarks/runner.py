"""Runs the cases one after another in a worker, and keeps every finished one at once."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from benchmarks import levels, peaks
from benchmarks.suite import Suite, plan, planned
from benchmarks.worker import Done, Lost, Raised, Step, Worker
from resnet_fused import env
from resnet_fused.bench.compare import MATTER
from resnet_fused.bench.conditions import CLOCKS_AFTER
from resnet_fused.bench.contenders import REFERENCE
from resnet_fused.bench.measure import failed
from resnet_fused.bench.options import UsageError
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import (
    CRASHED,
    HUNG,
    OK,
    OUT_OF_MEMORY,
    SKIPPED,
    Case,
    Record,
    Row,
    cases_of,
)

#: Seconds for the matrix products and the copy.
PEAKS_LIMIT_S = 300.0
UNFINISHED = "unfinished"
#: Conditions that all parts of one record must share.
SHARED = (*MATTER, "packages", "cuda", "cudnn", "driver", "resnet_fused", "commit", "seed",
          "backend", "graphs", "caches", "image_size", "photographs_from", "rounds",
          "seconds")  # fmt: skip


class Caller(Protocol):
    """What the runner needs of a worker."""

    def call(
        self, function: Callable[..., Any], *arguments: Any, limit: float,
        on_step: Callable[[Step], None] = ...,
    ) -> Done | Raised | Lost:  # fmt: skip
        """Call the function elsewhere."""

    def close(self) -> None:
        """End whatever runs."""


class Runner:
    """One run: the cases still to do, and the record as it grows."""

    def __init__(
        self,
        suite: Suite,
        record: Record,
        save: Callable[[Record], None],
        watch: Watch,
        worker: Caller | None = None,
    ) -> None:
        self._suite, self._save, self._watch = suite, save, watch
        self._worker = worker or Worker()
        self._conditions, self._rows = dict(record.conditions), list(record.rows)
        self._queue = [case for case in plan(suite) if not self._finished(case)]
        #: The smallest batch that a contender had no memory for, by what it ran.
        self._too_large: dict[tuple[Any, ...], int] = {}
        #: Cases of this run, and the seconds that were planned for them.
        self._done, self._spent = 0, 0.0
        for row in self._rows:
            self._learn(row)
        for case in cases_of(self._rows):
            self._decay(case)

    def run(self) -> Record:
        """Measure what is left, saving after each case, and return the record.

        The record is marked as unfinished until its last case is done; where the run has a budget
        of seconds, that may be left to another run.
        """
        ends = time.monotonic() + self._suite.budget if self._suite.budget else float("inf")
        self._watch.begin(len(self._queue))
        with tempfile.TemporaryDirectory() as scratch:
            try:
                self._measure_peaks()
                while self._queue and time.monotonic() < ends:
                    self._one(self._queue.pop(0), Path(scratch))
                if self._done:  # a GPU slows down as it warms up
                    self._conditions[CLOCKS_AFTER] = env.clocks()
            finally:
                self._worker.close()
        return self._kept()

    def _one(self, case: Case, scratch: Path) -> None:
        rows = self._case(case, scratch)
        self._rows = [row for row in self._rows if row.case != case] + rows
        for row in rows:
            self._learn(row)
        self._decay(case)
        self._done += 1
        self._spent += planned(self._suite, case)
        left = sum(planned(self._suite, other) for other in self._queue)
        self._watch.begin(self._done + len(self._queue), self._spent / (self._spent + left))
        self._watch.case_done(case, rows)
        self._save(self._kept())

    def _kept(self) -> Record:
        conditions = {name: v for name, v in self._conditions.items() if name != UNFINISHED}
        if self._queue:
            conditions[UNFINISHED] = len(self._queue)
        return Record(conditions, self._rows)

    def _finished(self, case: Case) -> bool:
        known = {row.contender for row in self._rows if row.case == case}
        return known >= set(self._suite.contenders(case))

    def _measure_peaks(self) -> None:
        """Measure the device's peaks, unless the record that goes on has those of all dtypes."""
        asked = self._suite.settings
        known = peaks.Peaks.of(self._conditions)
        if not self._queue or (known and set(known.flops) >= set(asked.dtypes)):
            return
        outcome = self._worker.call(
            peaks.measured, asked.device, asked.dtypes, asked.threads,
            limit=PEAKS_LIMIT_S, on_step=self._heard,
        )  # fmt: skip
        if not isinstance(outcome, Done):
            why = outcome.error if isinstance(outcome, Raised) else outcome
            raise UsageError(f"the device's peaks could not be measured: {why}")
        self._conditions["peaks"] = outcome.result.to_dict()

    def _case(self, case: Case, scratch: Path) -> list[Row]:
        """Return a row per contender, the case begun anew without each that ends the process."""
        names = list(self._suite.contenders(case))
        rows = {name: row for name in names if (row := self._declined(case, name))}
        while left := [name for name in names if name not in rows]:
            outcome = self._worker.call(
                levels.run_case, self._suite, case, tuple(left), self._conditions.get("peaks"),
                scratch, limit=self._suite.limit_of(case), on_step=self._heard,
            )  # fmt: skip
            if isinstance(outcome, Done):
                rows.update({row.contender: row for row in outcome.result})
                break
            guilty = outcome.step.contender if isinstance(outcome, Lost) and outcome.step else None
            # Without a reference nothing can be judged; and who ended the rounds is not known.
            ended = [guilty] if guilty and guilty != REFERENCE else left
            rows.update({name: _ended(case, name, outcome) for name in ended})
        return _alike([rows[name] for name in names])

    def _heard(self, step: Step) -> None:
        self._watch.doing(step.text, step.contender)

    def _learn(self, row: Row) -> None:
        if row.verdict == OUT_OF_MEMORY:
            key = _key(row.case, row.contender)
            self._too_large[key] = min(row.case.batch, self._too_large.get(key, row.case.batch))

    def _declined(self, case: Case, contender: str) -> Row | None:
        limit = self._too_large.get(_key(case, contender))
        if limit is None or case.batch <= limit:
            return None
        return Row(case, contender, SKIPPED, 0, 0, note=f"out of memory at batch {limit} already")

    def _decay(self, case: Case) -> None:
        """Put half the batch first in the queue where the reference had no memory for it."""
        smaller = replace(case, batch=case.batch // 2)
        known = smaller in self._queue or smaller in cases_of(self._rows)
        limit = self._too_large.get(_key(case, REFERENCE))
        if limit == case.batch and smaller.batch and not known:
            self._queue.insert(0, smaller)


def resumed(found: Record, conditions: dict[str, Any], where: Path) -> Record:
    """Return the record to go on with, under today's conditions.

    Raises:
        UsageError: it was measured under others that bear on its numbers.
    """
    other = [name for name in SHARED if found.conditions.get(name) != conditions.get(name)]
    if other:
        name = other[0]
        raise UsageError(
            f"--resume: {where} was measured with another {name}: {found.conditions.get(name)}, "
            f"now {conditions.get(name)}; --fresh begins again"
        )
    return Record({**found.conditions, **conditions}, found.rows)


def _key(case: Case, contender: str) -> tuple[Any, ...]:
    return case.level, case.subject, case.dtype, contender


def _ended(case: Case, contender: str, outcome: Raised | Lost) -> Row:
    row = Row(case, contender, OK, 0, 0)
    if isinstance(outcome, Raised):
        return failed(row, outcome.error)
    verdict = HUNG if outcome.hung else OUT_OF_MEMORY if outcome.killed else CRASHED
    return replace(row, verdict=verdict, note=str(outcome))


def _alike(rows: list[Row]) -> list[Row]:
    """Give those that did not live to count it the cost and use of the layer that others did."""
    model = next((row for row in rows if row.gmacs), rows[0])
    shared = {name: getattr(model, name) for name in ("gmacs", "mparams", "uses")}
    return [row if row.gmacs else replace(row, **shared) for row in rows]
