"""Bottlenecks whose end is one op in training: where `tune` measured it to be faster."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import bottlenecks as network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resnet_fused as rf
from resnet_fused.backends import APART, REFERENCE, _tuned, cpu
from resnet_fused.backends._tuned_file import Choice
from resnet_fused.nn import identity, pointwise
from resnet_fused.ops import OPS, _direct
from resnet_fused.testing import gradient_metrics
from resnet_fused.tuning import tune_calls
from resnet_fused.tuning.calls import draw, harvest, with_parts
from resnet_fused.tuning.measure import measure

CPU = torch.device("cpu")
END, BACKWARD = pointwise.OP, pointwise.OP + "_backward"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    _tuned.forget()
    with rf.use_backend("auto"):
        yield
    _tuned.forget()


@pytest.fixture
def taken(monkeypatch):
    """Have every end that fits be one op, as if it had been measured to be faster."""
    monkeypatch.setattr(pointwise, "faster_together", lambda *args: True)
    monkeypatch.setattr(identity, "node", lambda *args: None)  # as where anything was measured


def images(dtype: torch.dtype = torch.float32, size: int = 24) -> Tensor:
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def step(model: nn.Module, x: Tensor, *, bf16: bool = True) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = model(x)
    generator = torch.Generator().manual_seed(2)
    y.float().backward(torch.randn(y.shape, generator=generator))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def called(model: nn.Module, x: Tensor, **how: bool) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(model, x, **how)
    events = {e.key.removeprefix("resnet_fused::"): e.count for e in profile.key_averages()}
    assert (END in events) == (BACKWARD in events)
    return events.get(BACKWARD, 0)


def test_ends_in_16_bits_are_one_op(taken):
    model = rf.fuse(network())
    assert called(model, images()) == 5  # and the first block's end with its projection
    assert called(model, images(), bf16=False) == 0
    assert called(rf.fuse(network(), memory="low"), images()) == 0


def test_unmeasured_they_are_not():
    assert called(rf.fuse(network()), images()) == 0


def test_gradients_and_statistics_are_as_near_as_torchs(taken):
    model, x = network(), images()
    fused, exact = rf.fuse(model), copy.deepcopy(model).double()
    ours, eager, oracle = step(fused, x), step(model, x), step(exact, x.double(), bf16=False)
    assert ours.keys() == oracle.keys()
    far = [
        sum(1 - gradient_metrics(g[name], oracle[name]).cosine for name in oracle)
        for g in (ours, eager)
    ]
    assert far[0] <= 1.5 * far[1]
    for (name, a), b, c in zip(
        fused.named_buffers(), model.buffers(), exact.buffers(), strict=True
    ):
        a, b, c = a.double(), b.double(), c.double()
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 1e-3, name


def curve(model: nn.Module, steps: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Train, and return all losses, all parameters and all buffers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    generator, losses = torch.Generator().manual_seed(5), []
    x = torch.randn(4, 16, 3, 16, 16, generator=generator)
    target = torch.randint(512, (4, 16), generator=generator)
    for i in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x[i % 4]).mean((2, 3))
        loss = F.cross_entropy(y.float(), target[i % 4])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    parameters, buffers = (
        torch.cat([t.detach().double().flatten() for t in tensors])
        for tensors in (model.parameters(), model.buffers())
    )
    return torch.stack(losses).double(), parameters, buffers


def test_twenty_steps_stay_as_close_as_two_eager_runs_do(taken):
    """The yardstick is eager in the other layout, which sums in another order."""
    rival = network()
    model = copy.deepcopy(rival).to(memory_format=torch.contiguous_format)
    ours, eager, others = (curve(m) for m in (rf.fuse(rival), model, rival))
    for name, a, b, c in zip(("losses", "parameters", "buffers"), ours, eager, others, strict=True):
        assert 0 < float((a - b).norm()) <= 2 * float((c - b).norm()), name
    assert ours[0][-1] < 0.7 * ours[0][0]


def test_the_same_seed_gives_the_same_bits(taken):
    runs = [step(rf.fuse(network()), images()) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in runs), strict=True))


def test_less_is_kept(monkeypatch):
    monkeypatch.setattr(identity, "node", lambda *args: None)
    kept = []
    for takes in (False, True):
        monkeypatch.setattr(pointwise, "faster_together", lambda *args, takes=takes: takes)
        saved: dict[int, int] = {}

        def pack(t: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        model = rf.fuse(network())
        keep = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast("cpu", torch.bfloat16),
        ):
            y = model(images(size=48))
        kept.append(sum(n for address, n in saved.items() if address not in keep))
        del y
    # Of each the output goes, 2 bytes a value, and the bits; its input stays, a quarter as large.
    values = 4 * (2 * 256 * 48**2 + 2 * 512 * 24**2)
    last = 4 * 512 * 24**2 * 2  # no convolution behind saves this one's result
    projection = 4 * 256 * 48**2 * 2
    less = values * (2 + 1 / 8 - 1 / 2) - last + projection
    assert kept[0] - kept[1] == pytest.approx(less, rel=0.05)


@pytest.mark.parametrize("what", ["frozen gamma", "frozen weight", "input", "no momentum"])
def test_parts(what, taken):
    model, x = network(), images()
    block = model[4]
    if what == "frozen gamma":
        block.bn3.weight.requires_grad_(False)
    elif what == "frozen weight":
        block.conv3.weight.requires_grad_(False)
    elif what == "no momentum":
        block.bn3.momentum = None
    fused, exact = rf.fuse(model), copy.deepcopy(model).double()
    found = []
    for each, bf16 in ((fused, True), (model, True), (exact, False)):
        given = x if bf16 else x.double()
        given = given.detach().requires_grad_(what == "input")
        found.append(step(each, given, bf16=bf16))
        if what == "input":
            found[-1]["x"] = given.grad
    ours, eager, oracle = found
    assert ours.keys() == oracle.keys()
    for name in oracle:
        far = [1 - gradient_metrics(g[name], oracle[name]).cosine for g in (ours, eager)]
        assert far[0] <= 2 * far[1] + 1e-2, name
    assert fused[4].bn3.num_batches_tracked == 1


@pytest.mark.parametrize("why", ["sync", "bias", "stride", "eval", "hook"])
def test_what_does_not_fit_goes_the_other_way(why, taken):
    """Or, of a hook's module, torch's own."""
    block = network()[4]
    if why == "sync":
        block.bn3 = nn.SyncBatchNorm.convert_sync_batchnorm(block.bn3)
    elif why == "bias":
        block.conv3.bias = nn.Parameter(torch.zeros(256))
    elif why == "stride":
        block.conv3.padding = (1, 1)
        block.conv2.padding = (0, 0)
    elif why == "eval":
        block.bn3.eval()
    elif why == "hook":
        block.conv3.register_forward_hook(lambda *args: None)
    model, x = (
        rf.fuse(block),
        torch.randn(4, 256, 9, 9).contiguous(memory_format=torch.channels_last),
    )
    assert called(model, x) == 0


def test_activation_checkpointing(taken):
    model = rf.fuse(network())
    again = copy.deepcopy(model)
    plain = step(model, images())
    again[4].forward = lambda x, f=again[4].forward: checkpoint(f, x, use_reentrant=False)
    found = step(again, images())
    assert all(torch.equal(plain[name], found[name]) for name in plain)


# --- tune ----------------------------------------------------------------------------------------


def test_tune_finds_both_ways():
    with torch.autocast("cpu", torch.bfloat16):
        calls = with_parts(harvest(network(), images()))
    ops = [call.op for call in calls]
    assert ops.count(END) == 3  # ends of both stages, and the projection
    assert sum(call.count for call in calls if call.op == END) == 5
    assert ops.count(BACKWARD) == 3  # all but the last block's have a gradient past ReLU
    assert ops.count("relu_conv_backward_data") == 3
    assert set(ops[-3:]) == {END}
    assert {"bn_act_conv_bn_stats", "bn_act_conv_backward", "channel_covariance"} <= set(ops)
    x = images()
    assert END not in {call.op for call in harvest(network(), x)}, "float32"
    frozen = network().eval().bfloat16()
    assert END not in {call.op for call in harvest(frozen, x.bfloat16())}, "inference"


@pytest.mark.parametrize("faster", ["together", "apart"])
def test_what_was_measured_decides(faster):
    model, x = network(), images()
    with torch.autocast("cpu", torch.bfloat16):
        calls = [call for call in harvest(model, x) if call.op == END]
        clocked = []

        def clock(run) -> float:
            clocked.append(run.__qualname__.split(".")[0])
            run()
            return 1.0 if clocked[-1].endswith(faster) else 2.0

        report = tune_calls(calls, CPU, clock=clock)
    assert report.ok
    both = ("together", "apart")
    assert set(clocked) == {*both, *(f"_projection_{how}" for how in both)}
    chosen = {row.choice.candidate for row in report.rows}
    assert chosen == {"default" if faster == "together" else APART}
    count = 5 if faster == "together" else 0
    assert called(rf.fuse(model), x) == count
    with rf.use_backend("cpu" if cpu.available() is None else "reference"):
        assert called(rf.fuse(model), x) == 0


def test_an_end_that_is_wrong_is_not_taken(monkeypatch):
    from resnet_fused.backends import _pointwise

    right = _pointwise.pointwise_bn_act

    def wrong(*args):
        y, *moments = right(*args)
        return y + 1, *moments

    with torch.autocast("cpu", torch.bfloat16):
        (call, *_) = (call for call in harvest(network(), images()) if call.op == END)
    monkeypatch.setattr(
        type(OPS[END]), "decomposition", property(lambda op: lambda *a: wrong(_direct.call, *a))
    )
    row = tune_calls([call], CPU, clock=lambda run: 1.0).rows[0]
    assert row.choice.candidate == APART
    assert "wrong: error" in row.faults["reference/default"]


def test_a_choice_stands_for_the_op_where_it_is_called_itself():
    x = torch.randn(2, 8, 4, 4).bfloat16()
    weight = torch.randn(16, 8, 1, 1).bfloat16()
    args = (x, weight, None, None, None, 1e-5, None)
    expected = getattr(torch.ops.resnet_fused, END)(*args)
    for candidate in ("default", APART):
        key = _tuned.signature(END, args)
        _tuned.remember(CPU, {key: Choice(REFERENCE, candidate, 1.0, None)})
        for a, b in zip(getattr(torch.ops.resnet_fused, END)(*args), expected, strict=True):
            assert torch.equal(a, b)


def test_what_is_drawn_belongs_together():
    with torch.autocast("cpu", torch.bfloat16):
        calls = with_parts(harvest(network(), images()))
    with_covariance = [call for call in calls if call.argument("x_cov") is not None]
    assert len(with_covariance) == 7
    for call in with_covariance:
        outcome = measure(call.op, draw(call, CPU), lambda run: 1.0)
        assert not outcome.faults, call
