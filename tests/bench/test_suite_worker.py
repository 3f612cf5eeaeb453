"""The worker's process, for real: what it returns, raises, and how its end is told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from benchmarks.worker import Done, Lost, Raised, Step, Teller, Worker


def double(value: int, *, watch: Teller) -> int:
    watch.doing("doubling", contender="eager")
    return 2 * value


def fail(kind: type[Exception], *, watch: Teller) -> None:
    raise kind("no such kernel")


def crash(number: int, *, watch: Teller) -> None:
    watch.doing("building fused", contender="fused")
    os.kill(os.getpid(), number)


def hang(*, watch: Teller) -> None:
    watch.doing("building frozen", contender="frozen")
    time.sleep(600)


def lose_the_gpu(*, watch: Teller) -> None:
    watch.doing("building fused", contender="fused")
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand a long tail")


def process(*, watch: Teller) -> int:
    return os.getpid()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


def test_it_answers_and_tells_its_steps(worker: Worker) -> None:
    steps: list[Step] = []
    assert worker.call(double, 21, limit=60, on_step=steps.append) == Done(42)
    assert steps == [Step("doubling", "eager")]


def test_an_error_is_told_and_the_process_lives(worker: Worker) -> None:
    outcome = worker.call(fail, ValueError, limit=60)
    assert isinstance(outcome, Raised)
    assert str(outcome.error) == "ValueError: no such kernel"
    full = worker.call(fail, MemoryError, limit=60)
    assert isinstance(full, Raised)
    assert isinstance(full.error, MemoryError)


def test_a_crash_is_named_with_its_signal_and_the_next_call_works(worker: Worker) -> None:
    lost = worker.call(crash, signal.SIGSEGV, limit=60)
    assert isinstance(lost, Lost)
    assert str(lost) == "ended by SIGSEGV while building fused"
    assert lost.step is not None
    assert lost.step.contender == "fused"
    assert not lost.killed
    killed = worker.call(crash, signal.SIGKILL, limit=60)
    assert isinstance(killed, Lost)
    assert killed.killed
    assert worker.call(double, 1, limit=60) == Done(2)


def test_a_hang_is_ended_at_its_limit(worker: Worker) -> None:
    assert worker.call(double, 1, limit=60) == Done(2)  # started, so that the limit is the call's
    begin = time.monotonic()
    lost = worker.call(hang, limit=0.5)
    assert time.monotonic() - begin < 30
    assert isinstance(lost, Lost)
    assert str(lost) == "gave no result within its limit while building frozen"


def test_a_process_without_its_gpu_is_replaced(worker: Worker) -> None:
    """It would live and answer, and fail in every case from then on."""
    before = worker.call(process, limit=60)
    lost = worker.call(lose_the_gpu, limit=60)
    assert isinstance(lost, Lost)
    assert not lost.killed
    assert lost.step is not None
    assert lost.step.contender == "fused"
    assert str(lost) == (
        "RuntimeError: CUDA error: an illegal memory access was encountered while building fused"
    )
    after = worker.call(process, limit=60)
    assert isinstance(after, Done)
    assert after != before
