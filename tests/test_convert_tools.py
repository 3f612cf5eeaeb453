"""Fused models in the hands of others: tracers, exporters, parametrizations, FSDP, swaps."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrize

import resnet_fused as rf
from resnet_fused.models import create_model

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return create_model("cifar_resnet20").eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def groups(model):
    return len(rf.fusion_report(model).fused)


def test_a_fused_model_can_be_traced():
    """By what its classes' forwards call, as without fusing."""
    plain, traced = net(), fx.symbolic_trace(rf.fuse(net()))
    assert not any("resnet_fused" in str(node.target) for node in traced.graph.nodes)
    with torch.no_grad():
        close(traced(X), plain(X))


def test_a_traced_model_can_be_fused():
    """A GraphModule writes its forward into its class, and each copy has a class of its own."""
    plain, fused = net(), rf.fuse(fx.symbolic_trace(net()))
    assert groups(fused) == 19
    copied = copy.deepcopy(fused)
    assert groups(copied) == groups(fused) == 19
    with torch.no_grad():
        expected = plain(X)
        close(fused(X), expected)
        close(copied(X), expected)
        fused.recompile()
        assert groups(fused) == 0
        close(fused.train().eval()(X), expected)
        close(rf.fuse(fused)(X), expected)


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


def test_a_fused_model_can_be_scripted():
    plain = Scripted().eval()
    with torch.no_grad():
        close(torch.jit.script(rf.fuse(plain))(X), plain(X))


def test_an_onnx_export_has_torchs_ops(monkeypatch):
    plain = net()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    exported = torch.export.export(rf.fuse(plain), (X,))
    assert not any("resnet_fused" in str(node.target) for node in exported.graph.nodes)


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_parameters_can_be_swapped(swapping):
    """Which torch does with none that somebody refers to, as what is derived from them is kept."""
    plain, fused = net(), rf.fuse(net())
    with torch.no_grad():
        fused(X)
        close(fused.double()(X.double()), plain.double()(X.double()))
        state = {name: value + 0.01 for name, value in plain.state_dict().items()}
        for model in (plain, fused):
            model.load_state_dict(state)
        close(fused(X.double()), plain(X.double()))


class Registry(nn.Module):
    known: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, tag, **kwargs):
        super().__init_subclass__(**kwargs)
        Registry.known.append(tag)


class Registered(Registry, tag="one"):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


def test_a_class_that_registers_its_subclasses():
    fused = rf.fuse(Registered().eval())
    assert groups(fused) == 1
    assert Registry.known == ["one"]


def test_a_class_derived_since_stays_derived():
    """As by FSDP or a parametrization: what was mixed in goes, what came later stays."""
    plain = Scripted().eval()
    fused = rf.fuse(plain)
    fused.gain = nn.Parameter(torch.ones(()))
    parametrize.register_parametrization(fused, "gain", nn.Tanh())
    assert fused.gain.item() < 1
    unfused = rf.unfuse(fused)
    assert groups(unfused) == 0
    assert type(unfused).__name__ == "ParametrizedScripted"
    assert type(unfused).__bases__ == (Scripted,)
    assert unfused.gain.item() < 1
    with torch.no_grad():
        close(unfused(X), plain(X))
    assert groups(rf.fuse(unfused)) == 1
