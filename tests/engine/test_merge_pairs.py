"""Two convolutions become one call where that was measured to be faster, and nowhere else.

The backend that runs both whole is made up, and so are the times.
"""

import types

import pytest
import torch
import torch.nn.functional as F
from nets import image
from torch import nn

import resnet_fused as rf
from resnet_fused.backends import ORDER, _tuned, choose, measured
from resnet_fused.engine.capture import capture, fill
from resnet_fused.engine.merge import PAIR, merge, pairs
from resnet_fused.models import create_model
from resnet_fused.ops import OPS
from resnet_fused.tuning import tune_calls
from resnet_fused.tuning.calls import Call, draw, harvest, harvest_merged

CPU, NAME = torch.device("cpu"), "conv_bn_act_conv_bn_act"
X = image(2, 3, 12, 12)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut, projected in the first of a stage."""

    def __init__(self, c, width) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(c, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2, self.bn3 = nn.BatchNorm2d(width), nn.BatchNorm2d(out)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.project = None
        if c != out:
            self.project = nn.Sequential(nn.Conv2d(c, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.project is None else self.project(x)))


def network() -> nn.Module:
    return nn.Sequential(Bottleneck(3, 4), Bottleneck(16, 4)).eval()


def captured(model: nn.Module):
    with torch.no_grad():
        return capture(rf.fuse(model), X)


def merged(model: nn.Module) -> int:
    return [call.target for call in merge(captured(model)).calls].count(PAIR)


@pytest.fixture
def whole(monkeypatch, cache):
    """A backend, last in the order, that runs both in one call and has no other op."""
    module = types.ModuleType("whole")
    module.ADVICE, module.ran = "none", []
    module.available = lambda: None
    module.supports = lambda op, *args: None

    def run(*args):
        module.ran.append(args)
        return OPS[NAME].reference(*args)

    setattr(module, NAME, run)
    monkeypatch.setitem(choose.__globals__, "ORDER", {**ORDER, "whole": module})
    yield module
    _tuned.forget()


def tuned(model: nn.Module, seconds: float):
    """Tune on a clock that gives the made-up backend ``seconds`` and all others 1."""

    def clock(run):
        return seconds if getattr(run.func, "__name__", "") == "run" else 1.0

    calls = [*harvest(model, X), *harvest_merged(model, X, CPU)]
    return tune_calls(calls, CPU, clock=clock)


def test_merged_where_it_was_faster(whole):
    model = network()
    assert merged(model) == 0, "nothing was measured"
    apart = rf.freeze(model, X)(X)
    report = tuned(model, 0.8)
    found = {str(row.call): row for row in report.rows if row.call.op == NAME}
    assert list(found) == [f"2x4x12x12 {NAME} 3x3 to 4 then 1x1 to 16 add relu"]
    (row,) = found.values()
    assert (row.call.count, row.choice[:2]) == (2, ("whole", "default"))
    assert row.choice.margin == 1.25
    assert merged(model) == 2
    engine = rf.freeze(model, X)
    whole.ran.clear()
    torch.testing.assert_close(engine(X), apart)
    assert len(whole.ran) == 2


def test_apart_where_it_was_slower(whole):
    model = network()
    report = tuned(model, 1.2)
    chosen = [row.choice.backend for row in report.rows if row.call.op == NAME]
    assert chosen == ["reference"]
    assert merged(model) == 0
    whole.ran.clear()
    rf.freeze(model, X)(X)
    assert not whole.ran
    # Whoever asks for the op itself has what was faster, too.
    (_, call), *_ = pairs(captured(model))
    args = draw(Call(NAME, fill(call.args, list(captured(model).examples))), CPU)
    assert measured(NAME, *args) == rf.explain(NAME, *args).chosen == "reference"
    getattr(torch.ops.resnet_fused, NAME)(*args)
    assert not whole.ran


def test_it_is_weighed_against_the_fastest_of_each(whole, monkeypatch):
    """The two run as they were tuned just before, not as plain torch."""
    fast = []

    def quick(*args):
        fast.append(args)
        return OPS["conv_bn_act"].reference(*args)

    monkeypatch.setattr(whole, "conv_bn_act", quick, raising=False)
    model, during = network(), []

    def clock(run):
        fast.clear()
        run()
        if getattr(run.func, "__name__", "") == "decomposition":
            during.append(len(fast))
        return 0.5 if run.func is quick else 1.0

    tune_calls([*harvest(model, X), *harvest_merged(model, X, CPU)], CPU, clock=clock)
    assert set(during) == {2}


def test_not_merged_for_a_backend_asked_for_by_name(whole):
    model = network()
    tuned(model, 0.8)
    passed = captured(model)
    for name, expected in (("reference", 0), ("whole", 0), ("auto", 2)):
        with rf.use_backend(name):
            assert [call.target for call in merge(passed).calls].count(PAIR) == expected


def test_a_choice_that_no_longer_runs_merges_nothing(whole):
    model = network()
    tuned(model, 0.8)
    whole.supports = lambda op, *args: "not today"
    assert merged(model) == 0


class Chain(nn.Module):
    """Two convolutions with BatchNorm and ReLU, and what ``rule`` makes of them."""

    def __init__(self, rule, kernel=1, stride=1, padding=0, groups=1, first_groups=1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1, groups=first_groups)
        self.conv2 = nn.Conv2d(8, 8, kernel, stride, padding, groups=groups)
        self.bn1, self.bn2, self.rule = nn.BatchNorm2d(8), nn.BatchNorm2d(8), rule
        self.stem = nn.Conv2d(3, 4, 1)

    def first(self, x):
        return F.relu(self.bn1(self.conv1(self.stem(x))))

    def second(self, y):
        return F.relu(self.bn2(self.conv2(y)))

    def forward(self, x):
        return self.rule(self, x)


def in_a_row(m, x):
    return m.second(m.first(x))


def residual_between(m, x):
    z = m.stem(x)
    return m.second(F.relu(m.bn1(m.conv1(z)) + z.repeat(1, 2, 1, 1)))


def read_twice(m, x):
    y = m.first(x)
    return m.second(y) + y


def returned(m, x):
    y = m.first(x)
    return m.second(y), y


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Chain(in_a_row), 1),
        (Chain(in_a_row, kernel=3, padding=1), 0),
        (Chain(in_a_row, stride=2), 0),
        (Chain(in_a_row, padding=1), 0),
        (Chain(in_a_row, groups=2), 0),
        (Chain(in_a_row, first_groups=2), 0),
        (Chain(residual_between), 0),
        (Chain(read_twice), 0),
        (Chain(returned), 0),
        (Chain(lambda m, x: m.second(F.avg_pool2d(m.first(x), 2))), 0),
    ],
)
def test_what_can_be_one_call(model, expected):
    found = list(pairs(captured(model.eval())))
    assert len(found) == expected


def test_a_merged_call_computes_what_the_two_do():
    passed = captured(network())
    values = list(passed.examples)
    for first, call in pairs(passed):
        second = next(c for c in passed.calls if c.out == call.out)
        args = draw(Call(NAME, fill(call.args, values)), CPU)
        x, weight, scale, shift, weight2, scale2, shift2, residual, *geometry, act, act2 = args
        z = first.target(x, weight, scale, shift, None, *geometry, 1, act)
        y = second.target(z, weight2, scale2, shift2, residual, *second.args[5:9], act2)
        assert (first.args[9], second.args[9]) == (act, act2)
        torch.testing.assert_close(call.target(*args), y)


def test_harvest_finds_the_pairs_of_a_resnet50(whole):
    model = create_model("resnet50").eval()
    merged = harvest_merged(model, torch.empty(2, 3, 64, 64), CPU)
    found = [call for call in merged if call.op == NAME]
    assert len(found) == 7
    assert sum(call.count for call in found) == 16
    assert rf.fusion_report(model).fused == []


def test_nothing_to_harvest_where_nobody_runs_both_or_no_engine_is(whole):
    model = network()
    assert harvest_merged(model, X, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert not harvest_merged(model, X, CPU)
    assert not harvest_merged(network().train(), X, CPU)
    whole.supports = lambda op, *args: "not today"
    assert not harvest_merged(model, X, CPU)
