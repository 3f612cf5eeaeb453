"""Which calls of a captured pass become one, and which stay apart."""

import pytest
import torch
import torch.nn.functional as F
from nets import ConvBnRelu, assert_same_model, image
from torch import nn

import resnet_fused as rf
from resnet_fused.backends import ORDER
from resnet_fused.engine.capture import capture
from resnet_fused.engine.merge import merge

X = image(2, 3, 16, 16)
HEAD = torch.ops.resnet_fused.avg_pool_linear.default
CONV = torch.ops.resnet_fused.conv_bn_act.default
MAX_POOL = torch.ops.aten.max_pool2d.default


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
