"""Values derived from parameters on a GPU: streams wait for them, recordings make their own."""

import copy
import threading

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda
from torch import nn

import resnet_fused as rf
from resnet_fused.backends import _derived

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    with rf.use_backend("reference"), torch.no_grad():
        yield fake_cuda.install(monkeypatch, CPU)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return rf.fuse(nn.Sequential(*parts).eval())


def image() -> torch.Tensor:
    return torch.randn(1, 3, 6, 6)


def plain(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return rf.unfuse(copy.deepcopy(model))(x)


def test_another_stream_waits_once(cuda, model, monkeypatch):
    waits: list[fake_cuda.Stream] = []
    wait = fake_cuda.Stream.wait_event
    monkeypatch.setattr(
        fake_cuda.Stream, "wait_event", lambda self, event: (waits.append(self), wait(self, event))
    )
    a, b = cuda.caller_stream(), cuda.caller_stream()
    for stream in (a, b, a, b):
        with cuda.on(stream):
            model(image())
    assert cuda.races == []
    assert waits == [b]
    scale, shift = next(iter(_derived._cache[id(model[1].running_var)].values())).value
    assert [(id(t), s) for t, s in cuda.held] == [(id(scale), b), (id(shift), b)]


def test_the_detector_sees_a_missing_wait(cuda, model, monkeypatch):
    monkeypatch.setattr(fake_cuda.Stream, "wait_event", lambda self, event: None)
    for stream in (cuda.caller_stream(), cuda.caller_stream()):
        with cuda.on(stream):
            model(image())
    assert cuda.races


def test_a_changed_weight_is_waited_for_anew(cuda, model):
    a, b = cuda.caller_stream(), cuda.caller_stream()
    for _ in range(2):
        for stream in (a, b):
            with cuda.on(stream):
                model(image())
        b.synchronize()
        with cuda.on(a):
            model[1].weight.mul_(2)
        a.synchronize()
    assert cuda.races == []


def test_threads(cuda, model):
    x, seen = image(), []

    def work() -> None:
        with rf.use_backend("reference"), torch.no_grad(), cuda.on(cuda.caller_stream()):
            seen.append(model(x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cuda.races == []
    assert all(torch.equal(y, seen[0]) for y in seen)


def recorded(cuda: FakeCuda, model: nn.Module, x: torch.Tensor):
    outer, stream = fake_cuda.Graph(), cuda.caller_stream()
    with cuda.stream(stream), cuda.graph(outer, stream=stream):
        y = model(x)
    return outer, y


@pytest.mark.parametrize("warm", [False, True])
def test_a_graph_of_the_caller_s_follows_the_weights(cuda, model, warm):
    """It reads nothing that is kept, which may be gone when it is replayed, and keeps nothing."""
    x = image()
    if warm:
        model(x)
    outer, y = recorded(cuda, model, x)
    assert not model(x).isnan().any(), "what a recording derives is not there before a replay"
    for factor in (1, 2, 3):
        model[0].weight.mul_(factor)
        model[1].weight.mul_(factor)
        outer.replay()
        torch.testing.assert_close(y, plain(model, x))
        torch.testing.assert_close(model(x), plain(model, x))


def test_who_knows_better_has_recordings_read(cuda, model):
    x = image()
    model(x)
    with _derived.constant():
        with _derived.constant():
            pass
        short, _ = recorded(cuda, model, x)
    long, _ = recorded(cuda, model, x)
    assert len(short.steps) < len(long.steps)
    with _derived.constant():
        derived = _derived.derived((model[0].weight,), "new", lambda: model[0].weight * 2)
    assert derived is _derived.derived((model[0].weight,), "new", list)


def test_nothing_is_asked_of_the_cpu(model, monkeypatch):
    def fails(*args):
        raise AssertionError("torch.cuda was asked")

    for name in ("current_stream", "is_current_stream_capturing", "Event"):
        monkeypatch.setattr(torch.cuda, name, fails)
    x = image()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
