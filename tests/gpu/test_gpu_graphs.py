"""freeze on a real GPU: what the fake of tests/engine cannot show."""

import threading

import pytest
import torch
from nets import ConvBnRelu, SmallNet, calibrate, image
from torch import nn

import resnet_fused as rf
from resnet_fused.freeze import MAX_PLANS


@pytest.fixture
def net(device) -> nn.Module:
    return calibrate(SmallNet(), image(4, 3, 32, 32)).to(device)


def draw(device, n: int, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, device=device)


def stepwise(frozen, x: torch.Tensor) -> torch.Tensor:
    """The same kernels without a graph."""
    with torch.no_grad():
        return frozen.plan(x).run_steps(x)


def test_replays_are_the_steps_bit_for_bit(net, device):
    frozen = rf.freeze(net, draw(device, 4))
    frozen(draw(device, 3))
    assert "CUDA graphs: 2" in repr(frozen), repr(frozen)
    for n in (4, 3, 4):
        x = draw(device, n)
        assert torch.equal(frozen(x), stepwise(frozen, x))


def test_a_fused_model_s_streams_and_graphs_follow_the_weights(net, device):
    fused, x = rf.fuse(net), draw(device, 4)
    streams = [torch.cuda.Stream(device) for _ in range(3)]
    with torch.no_grad():
        for round_ in range(3):
            for parameter in fused.parameters():
                parameter.mul_(1.01)
            torch.cuda._sleep(10_000_000)
            results = []
            for stream in streams:
                stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(stream):
                    results.append(fused(x))
            torch.cuda.synchronize(device)
            assert all(torch.equal(y, fused(x)) for y in results), round_
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fused(x)
        for _ in range(2):
            for parameter in fused.parameters():
                parameter.mul_(1.01)
            graph.replay()
            torch.testing.assert_close(y, fused(x))


def test_results_are_the_caller_s_own(net, device):
    frozen, inputs = rf.freeze(net, draw(device, 2)), [draw(device, 2) for _ in range(5)]
    results = [frozen(x) for x in inputs]
    for x, y in zip(inputs, results, strict=True):
        assert torch.equal(y, stepwise(frozen, x))


@pytest.mark.parametrize("shapes", [(4,), (4, 3, 2)])
def test_streams_meet(net, device, shapes):
    """Streams of different speed share inputs, outputs and the pool of one engine."""
    frozen = rf.freeze(net, draw(device, shapes[0]))
    inputs = [draw(device, shapes[i % len(shapes)]) for i in range(60)]
    expected = [stepwise(frozen, x) for x in inputs]
    streams = [torch.cuda.Stream(device) for _ in range(3)]
    torch.cuda.synchronize(device)
    results = []
    for i, x in enumerate(inputs):
        with torch.cuda.stream(streams[i % 3]):
            if i % 7 == 0:
                torch.cuda._sleep(1_000_000)
            results.append(frozen(x))
    torch.cuda.synchronize(device)
    assert all(torch.equal(y, e) for y, e in zip(results, expected, strict=True))


def test_threads(net, device):
    """New shapes are recorded while other threads replay."""
    frozen = rf.freeze(net, draw(device, 1))
    faults: list[object] = []

    def work(seed: int) -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            with torch.cuda.stream(torch.cuda.Stream(device)):
                for i in range(20):
                    n = 1 + (seed + i) % 6
                    x = torch.randn(n, 3, 32, 32, generator=generator).to(device)
                    if not torch.equal(frozen(x), stepwise(frozen, x)):
                        faults.append(f"thread {seed}, call {i}")
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert "no CUDA graph" not in repr(frozen), repr(frozen)


def test_a_gpu_that_is_not_the_current_one(net, device, other_device):
    frozen = rf.freeze(net.to(other_device), draw(other_device, 2))
    for n in (2, 3):
        x = draw(other_device, n)
        y = frozen(x)
        assert (y.device, torch.cuda.current_device()) == (other_device, device.index)
        assert torch.equal(y, stepwise(frozen, x))
    assert "CUDA graphs: 2" in repr(frozen), repr(frozen)


def test_inside_a_graph_of_the_caller_s(net, device):
    frozen, x = rf.freeze(net, draw(device, 2)), draw(device, 2)
    outer, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.graph(outer, stream=stream):
        y = frozen(x)
    for n in range(2, 5 + MAX_PLANS):
        frozen(draw(device, n))
        x.normal_()
        outer.replay()
        assert torch.equal(y, stepwise(frozen, x))
    new = draw(device, 64)
    said = r"no plan for x of shape \(64, 3, 32, 32\)"
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        y.add_(1)
        with pytest.raises(RuntimeError, match=said):
            frozen(new)


class Ending(nn.Module):
    def __init__(self, rule) -> None:
        super().__init__()
        self.body, self.rule = ConvBnRelu(3, 8), rule

    def forward(self, x):
        return self.rule(self.body(x))


def _masked(y):
    z = y.clone()
    z[z > 1] = 0.5
    return z


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda y: y * torch.rand_like(y), "draws random numbers"),
        (_masked, "reads a mask back to the host"),
        (lambda y: y[:, torch.arange(7, -1, -1)], "has a tensor on cpu"),
    ],
)
def test_what_cannot_be_recorded(rule, said, device):
    frozen = rf.freeze(Ending(rule).eval().to(device), draw(device, 2))
    assert said in repr(frozen)
    assert frozen(draw(device, 2)).isfinite().all()
    # Neither the allocator nor the generator is left in a recording.
    torch.rand(4, device=device).sum().item()
    torch.cuda.empty_cache()


def test_freezing_draws_nothing_and_writes_nothing(net, device):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = draw(device, 2)
    state = torch.cuda.get_rng_state(device)
    rf.freeze(nn.Sequential(net, nn.Dropout()).eval(), x)(x)
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_shapes_share_memory(net, device):
    """Eight plans of one size keep about what one keeps, not eight times that."""
    frozen = rf.freeze(net, draw(device, 64, 64))
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    one = torch.cuda.memory_reserved(device)
    for n in range(57, 64):
        frozen(torch.zeros(n, 3, 64, 64, device=device))
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    inputs = 64 * 3 * 64 * 64 * 4
    # Each keeps its input and output; the allocator gives blocks of 2 MiB at least, or 20.
    assert torch.cuda.memory_reserved(device) - one < 7 * (inputs + 22 * 2**20)
