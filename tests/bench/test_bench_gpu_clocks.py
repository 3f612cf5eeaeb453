"""What the suite does with torch.cuda, on stand-ins on the CPU: graphs of contenders, clocks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "engine"))

from fake_cuda import Graph, Recording

from benchmarks import graphs
from resnet_fused.bench import contenders, timing
from resnet_fused.bench.contenders import Setup
from resnet_fused.bench.results import COLD, EPOCH, INFERENCE, OK, OP, TRAINING, Case, Row
from resnet_fused.tuning.measure import DOUBLINGS, CudaClock


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


@contextmanager
def on(stream: Stream) -> Iterator[None]:
    yield


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stand_in in (
        ("Stream", Stream), ("current_stream", Stream), ("stream", on), ("CUDAGraph", Graph),
        ("graph", Recording),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.mark.usefixtures("graphed")
def test_a_captured_contender_replays_what_it_recorded_on_each_new_input(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    x, other = torch.randn(2, 2, 3, 8, 8)
    calls: list[int] = []

    def counted(setup: Setup) -> contenders.Runner:
        right = contenders.eager(setup)

        def run(given: torch.Tensor) -> object:
            calls.append(1)
            return right.run(given)

        return right._replace(run=run)

    setup = Setup("m", model, x, torch.float32, "cpu", 1, tmp_path)
    with torch.inference_mode():
        runner = graphs.captured(counted)(setup)
        assert len(calls) == graphs.WARM_UP + 1
        for images in (x, other):
            answer = runner.read(runner.run(runner.prepare(images)))
            torch.testing.assert_close(answer, model(images))
        first = runner.prepare(x)
        assert runner.prepare(other) is first  # the one that the graph reads
    assert len(calls) == graphs.WARM_UP + 1


@pytest.fixture
def early() -> list[bool]:
    """Whether the GPU came to the next calls before Python had launched all of them, last first."""
    return []


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch, early: list[bool]) -> list[str]:
    """What happens on the device, in order; two events are always six milliseconds apart."""
    happened: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("event")

        def synchronize(self) -> None:
            happened.append("wait")

        def query(self) -> bool:
            return bool(early) and early.pop()

        def elapsed_time(self, end: Event) -> float:
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    return happened


def test_events_stand_around_the_calls_alone(order: list[str]) -> None:
    assert timing.elapsed_cuda(lambda: order.append("call"), 3) == pytest.approx(0.002)
    assert order == ["wait", "event", "call", "call", "call", "event", "wait"]


@pytest.fixture
def clock(order: list[str], monkeypatch: pytest.MonkeyPatch) -> CudaClock:
    small = SimpleNamespace(L2_cache_size=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    clock = CudaClock(torch.device("cpu"))
    assert clock._flush.nbytes == 2**28
    order.clear()
    monkeypatch.setattr(clock, "_flush", SimpleNamespace(zero_=lambda: order.append("flush")))
    return clock


def test_a_call_that_the_gpu_came_to_first_is_timed_again_behind_more_flushes(
    clock: CudaClock, order: list[str], early: list[bool]
) -> None:
    early += [False, True, True]
    assert clock(lambda: order.append("call")) == 0.006
    timed = ["event", "call", "event", "wait"]
    assert order == ["flush", *timed, *["flush"] * 2, *timed, *["flush"] * 4, *timed]
    order.clear()
    early += [True] * 99
    clock(lambda: order.append("call"))
    assert order.count("call") == 1 + DOUBLINGS, "a call that waits for the GPU is always late"


def test_emptied_caches_are_fed_before_the_clock_runs(
    clock: CudaClock, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "CudaClock", lambda device: clock)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    emptied = timing.clock_for("cuda", emptied=True)
    assert emptied(lambda: order.append("call"), 1, lambda: order.append("feed")) == 0.006
    assert order == ["flush", "feed", "event", "call", "event", "wait"]


@pytest.mark.parametrize(
    ("conditions", "levels", "words"),
    [
        ({"device_kind": "cpu", "graphs": False}, [INFERENCE], ""),
        ({"device_kind": "cuda", "graphs": False}, [INFERENCE], "without CUDA graphs"),
        ({"device_kind": "cuda", "graphs": True}, [OP, TRAINING], "all under CUDA graphs"),
        ({"device_kind": "cuda", "graphs": True}, [OP, COLD], "of cold starts frozen alone"),
        ({"device_kind": "cuda", "graphs": True}, [OP, EPOCH], "of epochs"),
        ({"device_kind": "cuda", "graphs": True}, [EPOCH], "without CUDA graphs"),
        ({"device_kind": "cuda", "graphs": True}, [COLD], "frozen alone under a CUDA graph"),
    ],
)
def test_a_record_says_what_ran_as_graphs(
    conditions: dict[str, object], levels: list[str], words: str
) -> None:
    rows = [Row(Case("resnet18", "bfloat16", 2, level), "eager", OK, 1, 1) for level in levels]
    told = graphs.in_words(conditions, rows)
    assert words in told
    assert told.startswith("all") == (words == "all under CUDA graphs")


def test_training_in_float16_is_never_captured() -> None:
    assert graphs.can_capture(Case("resnet18", "bfloat16", 2, TRAINING))
    assert not graphs.can_capture(Case("resnet18", "float16", 2, TRAINING))
    assert graphs.can_capture(Case("resnet18", "float16", 2, INFERENCE))
