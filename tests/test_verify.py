"""The certificate: a row per fused layer, a verdict that a wrong kernel turns."""

import copy

import pytest
import torch
from nets import image, small_net
from torch import nn

import resnet_fused as rf
from resnet_fused.backends import cpu, onednn
from resnet_fused.testing import max_error
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


def test_without_batchnorm_the_output_is_allowed_the_rounding_of_its_longest_sum():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7200, 5)).eval()
    report = verify(model, X)
    assert report.layers == []
    for row in report.outputs:
        floor = row.check.allowed - 2 * row.check.eager_error
        assert floor == pytest.approx(row.peak * torch.finfo(torch.float32).eps * (1 + 7200**0.5))


def test_the_larger_error_of_eagers_two_layouts_counts():
    """What an engine runs in channels_last adds in another order than the model as it is given."""
    for seed in range(8):  # the larger is now one's, now the other's
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
        x = torch.randn(2, 64, 16, 16)
        report = verify(model, x)
        with torch.no_grad():
            oracle = copy.deepcopy(model).double()(x.double())
            last = copy.deepcopy(model).to(memory_format=torch.channels_last)
            errors = [max_error(eager(x), oracle) for eager in (model, last)]
        assert errors[0] != errors[1]
        assert [r.check.eager_error for r in report.outputs] == [pytest.approx(max(errors))] * 2


def test_it_tells_how_far_it_is():
    told = []
    report = verify(small_net(), X, on_step=lambda done, of_all: told.append((done, of_all)))
    whole = len(report.layers) + 1
    assert told == [(done, whole) for done in range(whole + 1)]


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
