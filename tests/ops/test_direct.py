"""Ops called by a backward go past the dispatcher, but where somebody has to see them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused.ops import OPS, _direct

ARGS = (torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def direct(monkeypatch) -> None:
    """Make a direct call one that says so."""
    monkeypatch.setattr(_direct, "RUN", {name: lambda *args: "direct" for name in OPS})


def test_every_op_can_be_called():
    assert _direct.RUN.keys() == OPS.keys()


def test_without_gradients_it_is_direct(direct):
    with torch.no_grad():
        assert _direct.call("add_relu", *ARGS) == "direct"


def test_in_grad_mode_it_is_not(direct):
    assert torch.equal(_direct.call("add_relu", *ARGS), torch.relu(sum(ARGS)))


def test_a_mode_sees_it(direct):
    with torch.no_grad(), Seen() as seen:
        _direct.call("add_relu", *ARGS)
    assert seen.names[0] == "resnet_fused::add_relu"


def test_a_profiler_sees_it(direct):
    with torch.no_grad(), torch.profiler.profile() as profile:
        _direct.call("add_relu", *ARGS)
    assert "resnet_fused::add_relu" in {event.key for event in profile.key_averages()}


def test_a_subclass_sees_it(direct):
    with torch.no_grad():
        y = _direct.call("add_relu", *(t.as_subclass(Subclass) for t in ARGS))
    assert torch.equal(y, torch.relu(sum(ARGS)))
