"""Which calls of a captured pass become one, and which stay apart."""

import types

import pytest
import torch
import torch.nn.functional as F
from nets import ConvBnRelu, assert_same_model, image
from torch import nn

import resnet_fused as rf
from resnet_fused.backends import ORDER, _tuned, choose
from resnet_fused.engine import merge as merging
from resnet_fused.engine.capture import capture
from resnet_fused.engine.merge import merge
from resnet_fused.ops import OPS
from resnet_fused.tuning import tune_calls
from resnet_fused.tuning.calls import harvest, harvest_merged

X = image(2, 3, 16, 16)
HEAD = torch.ops.resnet_fused.avg_pool_linear.default
CONV = torch.ops.resnet_fused.conv_bn_act.default
MAX_POOL = torch.ops.aten.max_pool2d.default
STEM_NAME = "conv_bn_act_max_pool"
STEM = torch.ops.resnet_fused.conv_bn_act_max_pool.default


class Head(nn.Module):
    """A stem and a head that reads the pooled features by ``rule``."""

    def __init__(self, rule=None, bias: bool = True) -> None:
        super().__init__()
        self.body, self.pool = ConvBnRelu(3, 8), nn.MaxPool2d(3, 2, 1)
        self.fc, self.rule = nn.Linear(8, 5, bias=bias), rule

    def forward(self, x):
        y = F.adaptive_avg_pool2d(self.pool(self.body(x)), 1)
        return self.fc(torch.flatten(y, 1)) if self.rule is None else self.rule(self, y)


def targets(model: nn.Module) -> list:
    with torch.no_grad():
        return [call.target for call in merge(capture(rf.fuse(model.eval()), X)).calls]


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_is_one_call_and_the_stem_two(bias):
    assert targets(Head(bias=bias)) == [CONV, MAX_POOL, HEAD]


RULES = {
    "pooled read twice": lambda m, y: (m.fc(torch.flatten(y, 1)), y),
    "flattened from 2": lambda m, y: m.fc(torch.flatten(y, 2).transpose(1, 2)),
    "one row of weights": lambda m, y: F.linear(torch.flatten(y, 1), m.fc.weight[0]),
    "bias of one": lambda m, y: F.linear(torch.flatten(y, 1), m.fc.weight, m.fc.bias[:1]),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_the_op_does_not_take_stays_apart(rule):
    assert HEAD not in targets(Head(RULES[rule]))


@pytest.mark.parametrize("backend", [b.name for b in rf.backends() if b.available])
def test_a_backend_without_the_op_still_freezes_a_head(backend):
    model = Head().eval()
    with rf.use_backend(backend):
        has = backend not in ORDER or hasattr(ORDER[backend], "avg_pool_linear")
        assert (HEAD in targets(model)) == has
        assert_same_model(rf.freeze(model, X), model, X, reduced=8 * 64)


@pytest.mark.parametrize("backend", ["auto", *(b.name for b in rf.backends() if b.available)])
def test_on_the_cpu_a_stem_stays_two_calls(backend):
    with rf.use_backend(backend):
        assert targets(Head())[:2] == [CONV, MAX_POOL]


def test_a_stem_is_one_call_where_one_kernel_runs_it(monkeypatch):
    """As if a backend had one; the op itself runs here as ever."""
    asked = []
    monkeypatch.setattr(merging, "choose", lambda op, *args: asked.append((op, args)) or print)
    model = Head().eval()
    assert targets(model) == [STEM, HEAD]
    ((op, args),) = asked
    assert (op, args[0].shape, args[0].device) == ("conv_bn_act_max_pool", X.shape, X.device)
    assert args[9:] == ((3, 3), (2, 2), (1, 1))
    assert_same_model(rf.freeze(model, X), model, X, reduced=8 * 64)


@pytest.fixture
def whole(monkeypatch, cache):
    """A backend, first in the order, that runs a stem in one kernel and has no other op."""
    module = types.ModuleType("whole")
    module.ADVICE, module.available = "none", lambda: None
    module.supports = lambda op, *args: None
    module.conv_bn_act_max_pool = in_one = lambda *args: OPS[STEM_NAME].reference(*args)
    monkeypatch.setitem(choose.__globals__, "ORDER", {"whole": module, **ORDER})
    yield in_one
    _tuned.forget()


@pytest.mark.parametrize(("seconds", "merges"), [(0.8, True), (1.2, False)])
def test_a_stem_is_one_call_unless_its_parts_were_measured_to_be_faster(whole, seconds, merges):
    """Against the convolution on the backend just found fastest for it, and the pool."""
    model, parts = Head().eval(), []
    assert targets(model)[0] is STEM, "nothing was measured"

    def clock(run):
        parts.append(run.func is OPS[STEM_NAME].decomposition)
        return seconds if run.func is whole else 1.0

    calls = [*harvest(model, X), *harvest_merged(model, X, X.device)]
    assert [call.op for call in calls] == ["conv_bn_act", STEM_NAME, "avg_pool_linear"]
    report = tune_calls(calls, X.device, clock=clock)
    assert any(parts)
    assert (report.rows[1].choice.backend == "whole") == merges
    assert (targets(model)[0] is STEM) == merges
    assert_same_model(rf.freeze(model, X), model, X, reduced=8 * 64)


def test_where_the_engine_runs_a_stem_in_two_it_is_not_timed_as_one(cache):
    assert [call.op for call in harvest_merged(Head().eval(), X, X.device)] == ["avg_pool_linear"]


class Stem(Head):
    def forward(self, x):
        return self.rule(self, x)


STEMS = {
    "the map is returned too": lambda m, x: (lambda y: (m.pool(y), y))(m.body(x)),
    "the pool rounds up": lambda m, x: F.max_pool2d(m.body(x), 2, 2, ceil_mode=True),
    "the pool is dilated": lambda m, x: F.max_pool2d(m.body(x), 2, 2, dilation=2),
    "something between": lambda m, x: m.pool(m.body(x) * 2),
    "a residual": lambda m, x: m.pool(
        torch.relu(m.body[1](m.body[0](x)) + torch.cat([x, x, x], 1)[:, :8])
    ),
}


@pytest.mark.parametrize("rule", STEMS)
def test_what_keeps_a_stem_apart(rule, monkeypatch):
    monkeypatch.setattr(merging, "choose", lambda *args: print)
    assert STEM not in targets(Stem(STEMS[rule]))
