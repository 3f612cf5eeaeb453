"""Fused models in training mode: torch's gradients, buffers and loss curves, with less kept."""

import copy
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from nets import ConvBnRelu, Residual, SmallNet, image
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.backends import _requested, _tuned, cpu
from resnet_fused.backends._requested import becoming_a_graph
from resnet_fused.nn.fused import program_of
from resnet_fused.nn.program import Program
from resnet_fused.testing import gradient_metrics, max_error

X = image(4, 3, 32, 32)
TARGET = torch.tensor([0, 1, 2, 3])
#: Calls of the fused ops of training in one forward of SmallNet, by op.
CALLS = {"conv_bn_stats": 4, "bn_act_conv_bn_stats": 2, "bn_act_max_pool": 1, "bn_act": 1,
         "dual_bn_act": 1, "bn_update_stats": 6}  # fmt: skip


KINDS = ["auto", "cpu", "reference"] if cpu.available() is None else ["auto", "reference"]


@pytest.fixture(params=KINDS, autouse=True)
def _backend(request):
    with rf.use_backend(request.param):
        yield


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return SmallNet().train()


def ops_called(model: nn.Module, x: Tensor) -> dict[str, int]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    events = {e.key.removeprefix("resnet_fused::"): e.count for e in profile.key_averages()}
    return {name: events[name] for name in CALLS if name in events}


def step(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = F.cross_entropy(model(x).float(), TARGET[: len(x)])
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def relative(a: Tensor, b: Tensor) -> float:
    return max_error(a, b) / max(float(b.abs().max()), 1e-12)


def test_which_ops_run(request):
    """Between two convolutions of a block nothing is written, nor in front of the pool.

    Where no backend has a chain of ops whole, it is these.
    """
    expected = dict(CALLS)
    if request.node.callspec.params["_backend"] == "reference":
        for part in ("bn_act", "conv_bn_stats"):
            expected[part] += CALLS["bn_act_conv_bn_stats"]
    assert ops_called(rf.fuse(small_net()), X) == expected


@pytest.mark.skipif("cpu" not in KINDS, reason="about the native kernels")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_the_cpu_16_bits_train_fused(dtype, autocast):
    model = rf.fuse(small_net() if autocast else small_net().to(dtype))
    x = X if autocast else X.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast), rf.use_backend("auto"):
        assert ops_called(model, x).keys() == CALLS.keys()


@pytest.mark.skipif("cpu" not in KINDS, reason="about the native kernels")
def test_small_maps_train_as_torch(monkeypatch):
    """Of the two convolutions, the one with as many multiply-adds as pay is fused, by name both."""
    monkeypatch.setattr(cpu, "FASTER_IN_TRAINING", {torch.float32: 4 * 4 * 32 * 32 * 8 * 9})
    model = rf.fuse(nn.Sequential(ConvBnRelu(3, 8), ConvBnRelu(8, 4)).train())
    with rf.use_backend("auto"):
        assert ops_called(model, X).get("conv_bn_stats") == 1
        assert ops_called(model, X[:3]) == {}
    with rf.use_backend("cpu"):
        assert ops_called(model, X[:3])["bn_update_stats"] == 2


@pytest.mark.skipif("cpu" not in KINDS, reason="stands in for a GPU's")
def test_what_is_faster_in_a_graph_alone_trains_there_alone(monkeypatch):
    monkeypatch.setattr(cpu, "FASTER_IN_TRAINING", {})
    least = {torch.float32: 4 * 4 * 32 * 32 * 8 * 9}
    monkeypatch.setattr(cpu, "FASTER_IN_A_GRAPH", least, raising=False)
    model = rf.fuse(nn.Sequential(ConvBnRelu(3, 8), ConvBnRelu(8, 4)).train())
    with rf.use_backend("auto"):
        for _ in range(2):  # either is remembered
            assert ops_called(model, X) == {}
            with becoming_a_graph():
                assert ops_called(model, X).get("conv_bn_stats") == 1
                assert ops_called(model, X[:3]) == {}


@pytest.mark.skipif("cpu" not in KINDS, reason="stands in for a GPU's")
def test_where_nothing_of_ours_is_faster_the_classs_own_forward_runs(monkeypatch):
    """Small networks on a GPU wait for Python: steps all torch's took 10 and 17 % longer."""
    monkeypatch.setattr(cpu, "FASTER_IN_TRAINING", {})
    model = rf.fuse(Residual(8, 8).train())
    ran = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda *args: ran.append(args) or run(*args))
    x = torch.randn(2, 8, 6, 6)
    with rf.use_backend("auto"):
        model(x)
        assert not ran
        model.bn1.eval()  # frozen: a scale and a shift
        model(x)
        assert len(ran) == 1
        model.bn1.train()
        model(x)
        assert len(ran) == 1
        with rf.use_backend("cpu"):
            model(x)
        assert len(ran) == 2
        assert program_of(model).bind(model, (x,), {}) is None
        with monkeypatch.context() as shared:  # SyncBatchNorm's is ours anywhere
            shared.setattr("resnet_fused.nn.train.sharing_group", lambda bn: object())
            assert program_of(model).bind(model, (x,), {})
        model.eval()(x)
        assert len(ran) == 3


@pytest.mark.skipif("cpu" not in KINDS, reason="about the native kernels")
def test_what_the_convolutions_get_decides_not_what_comes_in():
    """A forward may convert its input."""

    class Photo(ConvBnRelu):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float() / 255)

    model = rf.fuse(Photo(3, 64).train())
    x = torch.randint(256, (8, 3, 64, 64), dtype=torch.uint8)
    with rf.use_backend("auto"):
        assert ops_called(model, x)["conv_bn_stats"] == 1


def test_compiled_in_eval_before_any_device_was_looked_at(monkeypatch):
    """As in a process that loads a fused model and compiles it."""
    model = rf.fuse(small_net().eval())
    monkeypatch.setattr(sys.modules["resnet_fused.backends"], "_trains", {})
    _tuned.forget()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))


@pytest.mark.skipif("cpu" not in KINDS, reason="stands in for a GPU's")
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_compiled_model_trains_fused_in_a_graph_too(monkeypatch, backend):
    """What may train is asked before it is traced, for within a graph as well."""
    monkeypatch.setattr(cpu, "FASTER_IN_TRAINING", {})
    monkeypatch.setattr(cpu, "FASTER_IN_A_GRAPH", {torch.float32: 0}, raising=False)
    with rf.use_backend(backend):
        model = rf.fuse(nn.Sequential(ConvBnRelu(3, 8)).train())
        compiled = torch.compile(model, backend="aot_eager")

        def fused() -> int:
            compiled(X)  # traced
            return ops_called(compiled, X).get("conv_bn_stats", 0)

        with becoming_a_graph():
            assert fused() == 1
        assert fused() == (backend == "cpu")


def test_recordings_may_overlap():
    """In two threads, the first of which ends first."""
    first, second = becoming_a_graph(), becoming_a_graph()
    assert not _requested.for_a_graph()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _requested.for_a_graph()
    second.__exit__(None, None, None)
    assert not _requested.for_a_graph()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_and_buffers(dtype, layout):
    turns: list[list[float]] = [[], []]
    for seed in range(4):
        model = small_net(seed).to(dtype)
        x = image(4, 3, 32, 32, dtype=dtype).contiguous(memory_format=layout)
        fused, oracle = rf.fuse(model), copy.deepcopy(model).double()
        ours, eager, exact = (step(m, t) for m, t in ((fused, x), (model, x), (oracle, x.double())))
        assert ours.keys() == exact.keys()
        assert all(grad.dtype == dtype for grad in ours.values())
        for grads, found in zip((ours, eager), turns, strict=True):
            found += [1 - gradient_metrics(grads[n], exact[n]).cosine for n in exact]
        for (name, a), b, c in zip(
            fused.named_buffers(), model.buffers(), oracle.buffers(), strict=True
        ):
            assert a.dtype == b.dtype
            assert relative(a, c) <= 2 * relative(b, c) + 1e-5, name
    # Over parameters and seeds: a flip at ReLU's kink turns one gradient by more than rounding.
    assert sum(turns[0]) <= 2 * sum(turns[1]) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Statistics stay float32; gradients are as near to float32's as eager torch's are."""
    if dtype == torch.float16 and cpu.available() is None:
        pytest.skip("fused training in float16 is for GPUs")
    model = small_net()
    fused, exact = rf.fuse(model), copy.deepcopy(model)
    ours, eager, oracle = step(fused, X, dtype), step(model, X, dtype), step(exact, X)
    for name, grad in ours.items():
        assert grad.dtype == torch.float32
        assert relative(grad, oracle[name]) <= 3 * relative(eager[name], oracle[name]) + 2e-2, name
    assert fused.bn1.running_var.dtype == torch.float32
    assert relative(fused.bn1.running_var, exact.bn1.running_var) < 2e-2


def train_steps(model: nn.Module, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Train, and return all losses, all parameters and all buffers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    generator, losses = torch.Generator().manual_seed(5), []
    for _ in range(steps):
        x = torch.randn(8, 3, 32, 32, generator=generator)
        target = torch.randint(5, (8,), generator=generator)
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    parameters, buffers = (
        torch.cat([t.detach().double().flatten() for t in tensors])
        for tensors in (model.parameters(), model.buffers())
    )
    return torch.stack(losses).double(), parameters, buffers


def test_twenty_steps_stay_as_close_as_two_eager_runs_do():
    """The yardstick is eager in the other layout, which sums in another order."""
    model = small_net()
    rival = copy.deepcopy(model).to(memory_format=torch.channels_last)
    fused = rf.fuse(model)
    ours, eager, others = (train_steps(m, 20) for m in (fused, model, rival))
    for name, a, b, c in zip(("losses", "parameters", "buffers"), ours, eager, others, strict=True):
        assert 0 < float((a - b).norm()) <= 2 * float((c - b).norm()), name


def test_the_same_seed_gives_the_same_bits():
    runs = []
    for _ in range(2):
        model = rf.fuse(small_net())
        train_steps(model, 3)
        runs.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in runs), strict=True))


# --- BatchNorm's options -------------------------------------------------------------------------


def assert_trains_alike(model: nn.Module, x: Tensor = X) -> None:
    model.train()
    fused = rf.fuse(model)
    for m in (fused, model):
        m.zero_grad()
        y = m(x)
        (y * image(*y.shape)).sum().backward()
    for (name, a), b in zip(fused.named_parameters(), model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or relative(a.grad, b.grad) < 1e-3, name
    for (name, a), b in zip(fused.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def one_block(**options) -> nn.Module:
    conv, bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, **options)
    return nn.Sequential(conv, bn, nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}],
    ids=str,
)
def test_options(options):
    assert_trains_alike(one_block(**options))


class Biased(Residual):
    """A block whose convolutions have a bias, projection included."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__(channels, out, stride)
        for conv in [m for m in self.modules() if isinstance(m, nn.Conv2d)]:
            conv.bias = nn.Parameter(torch.linspace(-2, 2, out))


def without_biases(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The bias in front of a BatchNorm has no gradient but what rounding leaves."""
    for name in [n for n in grads if n.endswith(("conv1.bias", "conv2.bias", "downsample.0.bias"))]:
        assert float(grads.pop(name).abs().max()) < 1e-5
    return grads


def test_convolutions_with_a_bias():
    """It moves the running mean, and nothing else."""
    torch.manual_seed(0)
    model = nn.Sequential(Biased(3, 8, 2), Biased(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    fused = rf.fuse(model.train())
    assert ops_called(fused, X).keys() == CALLS.keys() - {"bn_act_max_pool"}
    fused.load_state_dict(model.state_dict())
    ours, eager = (without_biases(step(m, X)) for m in (fused, model))
    assert ours.keys() == eager.keys()
    assert all(relative(grad, eager[name]) < 1e-3 for name, grad in ours.items())
    for a, b in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    fused[0].conv1.bias.requires_grad_(False)
    fused.zero_grad()
    assert "0.conv1.bias" not in step(fused, X)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bias_that_is_not_finite(value):
    torch.manual_seed(0)
    model = Biased(3, 8).train()
    with torch.no_grad():
        model.conv1.bias[2] = value
    fused = rf.fuse(model)
    assert torch.equal(fused(X).isnan(), model(X).isnan())
    for a, b in zip(fused.buffers(), model.buffers(), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


def test_compile_with_a_bias():
    torch._dynamo.reset()
    model = Biased(3, 8).train()
    fused = rf.fuse(model)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    ours, eager = (step_of_a_map(m) for m in (compiled, model))
    assert all(relative(a, b) < 1e-3 for a, b in zip(ours, eager, strict=True))


def step_of_a_map(model: nn.Module) -> list[Tensor]:
    model(X).square().mean().backward()
    return [p.grad for n, p in model.named_parameters() if p.dim() > 1]


@pytest.mark.parametrize("stride", [1, 2])
def test_blocks(stride):
    assert_trains_alike(nn.Sequential(ConvBnRelu(3, 8), Residual(8, 12, stride), Residual(12, 12)))


@pytest.mark.parametrize("pool", [
    nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(2, dilation=2), nn.AvgPool2d(2),
    nn.MaxPool2d(20, 1),
])  # fmt: skip
def test_pools_behind_a_group(pool):
    assert_trains_alike(nn.Sequential(*ConvBnRelu(3, 8), pool, *ConvBnRelu(8, 4)))


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("options", [
    {}, {"stride": 2}, {"padding": 1}, {"dilation": 2, "padding": 2}, {"groups": 3},
    {"padding": "valid"},
])  # fmt: skip
def test_geometries(kernel, options):
    first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
    second = nn.Conv2d(6, 9, kernel, bias=False, **options)
    norms = nn.BatchNorm2d(6), nn.BatchNorm2d(9)
    assert_trains_alike(nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU()))


def test_one_value_per_channel_is_refused_before_anything_changes():
    eager = one_block().train()
    model = rf.fuse(eager)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel when training") as theirs:
        eager(torch.randn(1, 3, 3, 3))
    with pytest.raises(ValueError, match=f"^{re.escape(str(theirs.value))}$"):
        model(torch.randn(1, 3, 3, 3))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_train_and_eval_in_turns():
    model = small_net()
    fused = rf.fuse(model)
    for mode in (True, False, True, True, False):
        fused.train(mode)
        model.train(mode)
        a, b = fused(X), model(X)
        assert relative(a, b) < 1e-4
    for a, b in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_norm_among_live_ones():
    model = small_net()
    model.layer1[0].bn1.eval()
    fused = rf.fuse(model)
    ours, eager = step(fused, X), step(model, X)
    assert all(relative(g, eager[n]) < 1e-3 for n, g in ours.items())
    assert int(fused.layer1[0].bn1.num_batches_tracked) == 0


# --- the ways people train -----------------------------------------------------------------------


def test_parts_without_gradients():
    model = small_net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer1.1" in name or "fc" in name)
    fused = rf.fuse(model)
    ours, eager = step(fused, X), step(model, X)
    assert ours.keys() == eager.keys()
    assert all(relative(g, eager[n]) < 1e-3 for n, g in ours.items())


def test_no_grad_calibrates():
    model = small_net()
    fused = rf.fuse(model)
    with torch.no_grad():
        assert relative(fused(X), model(X)) < 1e-4
    for a, b in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_accumulation():
    model = small_net()
    fused = rf.fuse(model)
    for m in (fused, model):
        for part in X.split(2):
            step(m, part)
    for a, b in zip(fused.parameters(), model.parameters(), strict=True):
        assert relative(a.grad, b.grad) < 1e-3


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.stem, self.block = ConvBnRelu(3, 8), block

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, self.stem(x), use_reentrant=False)

    torch.manual_seed(0)
    assert_trains_alike(Checkpointed(Residual(8, 8)))


def test_hooks_fire_in_training():
    model, seen = small_net(), []
    fused = rf.fuse(model)
    handle = fused.layer1[0].conv2.register_forward_hook(lambda *_: seen.append("conv2"))
    ours, eager = step(fused, X), step(model, X)
    assert seen == ["conv2"]
    assert all(relative(g, eager[n]) < 1e-3 for n, g in ours.items())
    handle.remove()


def test_double_backward_is_refused():
    model = rf.fuse(small_net())
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value):
    x = X.clone()
    x[0, 1, 3, 4] = value
    model = small_net()
    fused = rf.fuse(model)
    a, b = fused(x), model(x)
    assert torch.equal(a.isnan(), b.isnan())
    for p, q in zip(fused.buffers(), model.buffers(), strict=True):
        assert torch.equal(p.isnan(), q.isnan())


def test_compile_without_a_break_inside_blocks():
    torch._dynamo.reset()
    model = nn.Sequential(ConvBnRelu(3, 8), Residual(8, 8)).train()
    fused = rf.fuse(model)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for m in (compiled, model):
        m(X).square().mean().backward()
    for a, b in zip(fused.parameters(), model.parameters(), strict=True):
        assert relative(a.grad, b.grad) < 1e-3
    for a, b in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)
