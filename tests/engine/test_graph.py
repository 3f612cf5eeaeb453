"""CUDA graphs without a GPU: orders, limits and fallbacks on a fake of torch.cuda's functions.

What a real capture allows and what a real allocator does is for ``tests/gpu``.
"""

import ast
import copy
import gc
import pickle
import re
import sys
import threading
from pathlib import Path

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda
from torch import nn

import resnet_fused as rf
from resnet_fused.engine import graph

CPU = torch.device("cpu")
FREEZE = sys.modules["resnet_fused.freeze"]  # under this name the package has the function


class Net(nn.Module):
    """Fused convolutions, a residual, a head; ``rule`` changes the output."""

    def __init__(self, rule=lambda y: y) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn_a, self.bn_b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        self.rule = rule

    def forward(self, x):
        a = torch.relu(self.bn_a(self.a(x)))
        y = torch.relu(self.bn_b(self.b(a)) + a)
        return self.rule(self.fc(y.mean((2, 3))))


def image(n: int, size: int = 6) -> torch.Tensor:
    return torch.randn(n, 3, size, size)


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    """Make engines on the CPU record graphs with the fake; no kernel escapes torch's dispatch."""
    monkeypatch.setattr(FREEZE, "graphs_on", graph.Graphs)
    with rf.use_backend("reference"):
        yield fake_cuda.install(monkeypatch, CPU)


def expected(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_changed_input_and_results_of_one_s_own(cuda):
    model = Net().eval()
    frozen = rf.freeze(model, image(2))
    inputs = [image(2) for _ in range(4)]
    results = [frozen(x) for x in inputs]
    for x, y in zip(inputs, results, strict=True):
        assert_same(y, expected(model, x))
    assert len(cuda.recordings) == 1, "one recording for a shape"
    assert results[0].data_ptr() != results[1].data_ptr()
    assert "CUDA graphs: 1" in repr(frozen)
    half = rf.freeze(model, image(2), dtype=torch.bfloat16)
    assert_same(half(inputs[0]), half(inputs[0].bfloat16()))


def test_without_graphs_nothing_is_recorded(cuda):
    model = Net().eval()
    frozen = rf.freeze(model, image(2), graphs=False)
    for engine in (frozen, copy.deepcopy(frozen)):
        for n in (2, 3):
            x = image(n)
            assert_same(engine(x), expected(model, x))
        assert "CUDA graphs" not in repr(engine)
    assert not cuda.recordings


def test_without_graphs_streams_do_not_meet(cuda, model):
    """Neither in the input's memory nor in constants of a plan that another stream made."""
    frozen = rf.freeze(model, image(2), graphs=False)
    alternating(cuda, frozen)
    assert cuda.races == []


def test_without_graphs_inside_a_graph_of_the_caller_s(cuda, model, monkeypatch):
    monkeypatch.setattr(FREEZE, "MAX_PLANS", 1)
    frozen, x = rf.freeze(model, image(2), graphs=False), image(2)
    with pytest.raises(RuntimeError, match=r"no plan for x of shape \(5, 3, 6, 6\).*warm-up"):
        inside_a_graph(cuda, frozen, image(5))
    outer, y = inside_a_graph(cuda, frozen, x)
    for n in (3, 4):
        x.normal_()
        frozen(image(n))
        outer.replay()
        assert_same(y, expected(model, x))
    assert {shape[0] for shape in frozen._plans} == {2, 4}, "what a graph reads stays"


def test_it_is_recorded_for_one_thread_in_one_pool_on_one_stream(cuda):
    frozen = rf.freeze(Net().eval(), image(1))
    frozen(image(2))
    first, second = cuda.recordings
    assert first["capture_error_mode"] == "thread_local"
    assert first["pool"] is second["pool"]
    assert first["stream"] is second["stream"]
    rf.freeze(Net().eval(), image(1))
    assert cuda.recordings[-1]["pool"] is not first["pool"]
    assert cuda.recordings[-1]["stream"] is not first["stream"]


def alternating(cuda: FakeCuda, frozen, shapes=(2, 2, 3)) -> None:
    """Call an engine on three streams in turn, the shapes in turn, as one host thread."""
    streams = [cuda.caller_stream() for _ in range(3)]
    for i in range(9):
        with cuda.on(streams[i % 3]):
            frozen(torch.randn(shapes[i % len(shapes)], 3, 6, 6))


@pytest.fixture
def model() -> Net:
    return Net().eval()


def test_streams_wait_for_each_other_on_the_device(cuda, model):
    frozen = rf.freeze(model, image(2))
    frozen(image(3))
    alternating(cuda, frozen)
    assert cuda.races == []


@pytest.mark.parametrize("broken", ["wait_event", "record"])
def test_the_detector_sees_a_missing_wait(cuda, model, broken, monkeypatch):
    frozen = rf.freeze(model, image(2))
    owner = {"wait_event": fake_cuda.Stream, "record": fake_cuda.Event}[broken]
    monkeypatch.setattr(owner, broken, lambda self, other: None)
    alternating(cuda, frozen, (2,))
    assert any("copy_" in race for race in cuda.races), "the input"
    assert any("clone" in race for race in cuda.races), "the outputs"


def test_what_is_made_on_one_stream_is_there_for_all(cuda, model):
    """The plan of a shape is made on the first caller's stream, constants with it."""
    frozen = rf.freeze(model, image(2))
    streams = [cuda.caller_stream() for _ in range(2)]
    for n in (3, 4):
        for stream in streams:
            with cuda.on(stream):
                frozen(image(n))
    assert cuda.races == []


def test_an_error_leaves_the_order_whole(cuda, model, monkeypatch):
    frozen = rf.freeze(model, image(2))
    a, b = cuda.caller_stream(), cuda.caller_stream()

    def replay_and_fail(self) -> None:
        replay(self)
        raise torch.OutOfMemoryError("no memory for the clone")

    replay = fake_cuda.Graph.replay
    monkeypatch.setattr(fake_cuda.Graph, "replay", replay_and_fail)
    with cuda.on(a), pytest.raises(torch.OutOfMemoryError, match="no memory"):
        frozen(image(2))
    monkeypatch.setattr(fake_cuda.Graph, "replay", replay)
    x = image(2)
    with cuda.on(b):
        y = frozen(x)
    assert cuda.races == []
    assert_same(y, expected(model, x))


@pytest.mark.parametrize("shapes", [(2,), (1, 2, 3, 4)])
def test_threads(cuda, model, shapes):
    frozen = rf.freeze(model, image(2))
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        stream = cuda.caller_stream()
        for i in range(6):
            n = shapes[(seed + i) % len(shapes)]
            x = torch.randn(n, 3, 6, 6, generator=generator)
            with rf.use_backend("reference"), cuda.on(stream):
                y = frozen(x)
            if not torch.allclose(y, expected(model, x), rtol=1e-4, atol=1e-5):
                wrong.append(f"thread {seed}, call {i}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cuda.races == []
    assert len(cuda.recordings) == len({2, *shapes})


def test_the_limit(cuda, model, monkeypatch):
    monkeypatch.setattr(FREEZE, "MAX_PLANS", 2)
    frozen = rf.freeze(model, image(1))
    for n in (2, 1, 3):
        frozen(image(n))
    assert {shape[0] for shape in frozen._plans} == {1, 3}
    assert len(cuda.recordings) == 3
    frozen(image(1))
    assert len(cuda.recordings) == 3
    frozen(image(2))
    assert len(cuda.recordings) == 4
    assert "CUDA graphs: 2" in repr(frozen)


def test_a_plan_that_goes_frees_its_graph_at_once(cuda, model, monkeypatch):
    monkeypatch.setattr(FREEZE, "MAX_PLANS", 1)
    gone: list[int] = []
    monkeypatch.setattr(fake_cuda.Graph, "__del__", lambda self: gone.append(1), raising=False)
    frozen = rf.freeze(model, image(1))
    gc.collect()
    gone.clear()
    gc.disable()
    try:
        frozen(image(2))
        assert gone == [1]
    finally:
        gc.enable()


def test_copies_record_their_own(cuda, model):
    frozen = rf.freeze(model, image(2))
    x = image(2)
    for again in (copy.deepcopy(frozen), copy.copy(frozen)):
        assert_same(again(x), frozen(x))
    frozen.__dict__["_source"].rule = None  # a lambda, which pickle does not take
    assert "_graphs" not in frozen.__getstate__()
    assert pickle.dumps({k: v for k, v in frozen.__getstate__().items() if k != "_source"})


def inside_a_graph(cuda: FakeCuda, frozen, x: torch.Tensor):
    """Record a graph around the engine, as a user would; return it and its output."""
    outer, stream = fake_cuda.Graph(), cuda.caller_stream()
    with cuda.stream(stream), cuda.graph(outer, stream=stream):
        y = frozen(x)
    return outer, y


def test_inside_a_graph_of_the_caller_s(cuda, model, monkeypatch):
    monkeypatch.setattr(FREEZE, "MAX_PLANS", 1)
    frozen, x = rf.freeze(model, image(2)), image(2)
    outer, y = inside_a_graph(cuda, frozen, x)
    assert len(cuda.recordings) == 2, "its own and the caller's, none in the other"
    for _ in range(3):
        x.normal_()
        frozen(image(2))  # neither touches the other's memory
        frozen(image(3))
        frozen(image(4))
        outer.replay()
        assert_same(y, expected(model, x))
    assert {shape[0] for shape in frozen._plans} == {2, 4}, "what a graph reads stays"


def test_a_shape_that_is_new_inside_a_graph(cuda, model):
    frozen = rf.freeze(model, image(2))
    with pytest.raises(RuntimeError, match=r"no plan for x of shape \(5, 3, 6, 6\).*warm-up"):
        inside_a_graph(cuda, frozen, image(5))
    assert len(frozen._plans) == 1


def _masked(y):
    z = y.clone()
    z[z > 0] = 0.5
    return z


#: A forward's end on the values, and what is said about it.
FALLBACKS = {
    "random numbers": (lambda y: y * torch.bernoulli(torch.ones_like(y)), "draws random numbers"),
    "a mask": (_masked, "reads a mask back to the host"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_cannot_be_recorded_runs_call_by_call(cuda, case):
    rule, said = FALLBACKS[case]
    model = Net(rule).eval()
    frozen = rf.freeze(model, image(2))
    assert cuda.recordings == []
    assert "CUDA graphs: 0" in repr(frozen)
    assert re.search(rf"no CUDA graph for \(2, 3, 6, 6\): aten::\w+ {said}", repr(frozen)), frozen
    streams = [cuda.caller_stream() for _ in range(2)]
    for i in range(4):
        x = image(2)
        with cuda.on(streams[i % 2]):
            y = frozen(x)
        assert_same(y, expected(model, x))
    assert cuda.races == [], "memory of its own for every call"


#: Passes that no plan holds; the warm-up sees them in torch's operators.
SEEN = {
    "reads a value back to the host": lambda x: {0: x * x.sum().item()},
    "the shape that aten::nonzero returns depends on values": lambda x: {0: x.nonzero()},
    "aten::bernoulli draws random numbers": lambda x: {0: torch.bernoulli(x.sigmoid())},
    "aten::index_put_ reads a mask back to the host": lambda x: {
        0: x.index_put_((x > 0,), x[0, 0])
    },
    "has a tensor on meta": lambda x: {0: x, 1: x.to("meta")},
    "": lambda x: {0: torch.relu(x + 1)},
}


@pytest.mark.parametrize("said", SEEN)
def test_the_warm_up_finds_the_reason(cuda, said):
    recorded, reason = graph.Graphs(CPU).record(SEEN[said], torch.randn(1, 1))
    assert said in reason
    assert bool(reason) == bool(said)
    assert (recorded is None) == bool(said)
    assert len(cuda.recordings) == (not said)


def test_a_recording_that_fails(cuda, model):
    """As one does that another thread's synchronisation of the device breaks."""
    cuda.fault = RuntimeError("operation not permitted when stream is capturing\nCUDA kernel ...")
    stream, x = cuda.caller_stream(), image(2)
    with cuda.on(stream):
        frozen = rf.freeze(model, x)
        with torch.cuda.device(CPU):
            assert torch.cuda.current_stream() is stream
        assert_same(frozen(x), expected(model, x))
    said = "no CUDA graph for (2, 3, 6, 6): CUDA could not record it: operation not permitted when"
    assert said in repr(frozen)
    assert gc.isenabled()
    assert cuda.races == []


def test_the_collector_waits_for_a_recording(cuda):
    seen: list[bool] = []

    def compute(x):
        seen.append(gc.isenabled())
        return {0: x + 1}

    graph.Graphs(CPU).record(compute, torch.randn(1))
    assert seen == [True, False], "the warm-up, the recording"
    assert gc.isenabled()


def test_every_use_is_on_the_engine_s_device(cuda, model):
    """The fake refuses a stream that is asked for on another device."""
    frozen = rf.freeze(model, image(2))
    before = cuda.guards
    frozen(image(2))
    assert cuda.guards > before


def test_recording_and_freezing_change_nothing(cuda):
    model = Net().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    frozen = rf.freeze(model, torch.ones(1, 3, 6, 6))
    frozen(torch.ones(2, 3, 6, 6))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_no_graphs_on_the_cpu(model):
    assert graph.graphs_on(CPU) is None
    frozen = rf.freeze(model, image(2))
    assert "graph" not in repr(frozen)


def test_the_engine_speaks_to_cuda_in_one_file():
    for path in Path(graph.__file__).parent.glob("*.py"):
        names = {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        assert ("torch.cuda" in names) == (path.name == "graph.py"), path
