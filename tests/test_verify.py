"""The certificate: a row per fused layer, a verdict that a wrong kernel turns."""

import copy

import pytest
import torch
from nets import image, small_net
from torch import nn

import resnet_fused as rf
from resnet_fused.backends import cpu, onednn
from resnet_fused.verify import verify

X = image(2, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_layer_and_both_outputs(dtype):
    model = small_net().to(dtype)
    before = copy.deepcopy(model.state_dict())
    report = verify(model, X.to(dtype))
    assert report.ok, str(report)
    names = [group.name for group in rf.fusion_report(rf.fuse(model)).fused]
    assert sorted(row.name for row in report.layers) == sorted(names)
    assert [row.name for row in report.outputs] == ["output of fuse", "output of freeze"]
    assert "every row is within it" in str(report)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_fused_model_is_verified_like_its_original():
    model = small_net()
    a, b = verify(model, X), verify(rf.fuse(model), X)
    assert a == b


@pytest.mark.parametrize("share", [1e-3, float("nan")])
def test_a_wrong_kernel_is_found(share, monkeypatch):
    """One channel of one layer off by a thousandth of the largest value."""
    spoiled = []

    def wrong(*args):
        y = right(*args)
        if args[1].shape[0] == 16 and args[1].shape[2] == 3:
            y[:, 3] += share * y.abs().max()
            spoiled.append(args[1])
        return y

    right = rf.ops.OPS["conv_bn_act"].reference
    for module in (cpu, onednn):
        monkeypatch.setattr(module, "conv_bn_act", wrong)
    report = verify(small_net(), X)
    assert spoiled
    assert not report.ok
    wrong_rows = [row.name for row in report.layers if not row.check.ok]
    # A NaN reaches all that conv2 computes, in float64 too: it is conv1 that made it.
    assert wrong_rows[0] == "layer1.1.conv1"
    assert set(wrong_rows) <= {"layer1.1.conv1", "layer1.1.conv2"}
    assert str(report).count("WRONG") >= len(wrong_rows) + 1


def test_what_the_model_returns_may_be_nested():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return {"a": self.net(x), "b": (self.net(x * 2), 3)}

    report = verify(Two().eval(), X)
    assert report.ok
    assert [r.name for r in report.outputs] == [
        f"output {i} of {verb}" for verb in ("fuse", "freeze") for i in (0, 1)
    ]


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        verify(small_net().train(), X)
