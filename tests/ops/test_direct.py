"""Ops go past the dispatcher, but where somebody has to see them."""

import functools
import itertools
from typing import ClassVar

import pytest
import torch
from devices import device_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import resnet_fused as rf
from resnet_fused.backends import ORDER
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
    for name in ("RUN", "RECORD"):
        monkeypatch.setattr(_direct, name, {op: lambda *args: "direct" for op in OPS})


def test_every_op_can_be_called():
    assert _direct.RUN.keys() == OPS.keys()


def test_without_gradients_it_is_direct(direct):
    with torch.no_grad():
        assert _direct.call("add_relu", *ARGS) == "direct"


def test_in_grad_mode_it_is_not(direct):
    assert torch.equal(_direct.call("add_relu", *ARGS), torch.relu(sum(ARGS)))


def test_a_forward_is_direct_in_grad_mode(direct):
    assert _direct.record("add_relu", *ARGS) == "direct"


each_way = pytest.mark.parametrize("way", [_direct.call, _direct.record])


@each_way
def test_a_mode_sees_it(direct, way):
    with torch.no_grad(), Seen() as seen:
        way("add_relu", *ARGS)
    assert seen.names[0] == "resnet_fused::add_relu"


@each_way
def test_a_function_mode_sees_it(direct, way):
    class Mode(torch.overrides.TorchFunctionMode):
        names: ClassVar[list[str]] = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Mode():
        way("add_relu", *ARGS)
    assert any("add_relu" in name for name in Mode.names)


@each_way
def test_a_profiler_sees_it(direct, way):
    with torch.no_grad(), torch.profiler.profile() as profile:
        way("add_relu", *ARGS)
    assert "resnet_fused::add_relu" in {event.key for event in profile.key_averages()}


@each_way
def test_a_subclass_sees_it(direct, way):
    with torch.no_grad():
        y = way("add_relu", *(t.as_subclass(Subclass) for t in ARGS))
    assert torch.equal(y, torch.relu(sum(ARGS)))


# --- tensors that are the negative of what their memory holds -------------------------------------

BACKENDS = [b.name for b in rf.backends() if b.available]


def negated(args: tuple) -> tuple:
    """The same values, with the other sign in memory."""
    return tuple(
        torch._neg_view(-a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in args
    )


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [name for name, op in OPS.items() if not op.mutates])
def test_values_count_not_what_is_in_memory(op, backend, direct):
    run = _direct.RUN[op] if direct else getattr(torch.ops.resnet_fused, op)
    if backend in ORDER and not hasattr(ORDER[backend], op):
        pytest.skip(f"{backend} has no {op}")
    for args in itertools.islice(OPS[op].samples(device_of(backend), torch.float32), 0, None, 3):
        with rf.use_backend(backend), torch.no_grad():
            if backend in ORDER and ORDER[backend].supports(op, *args):
                continue
            plain, found = run(*args), run(*negated(args))
        results = zip(tree_leaves(found), tree_leaves(plain), strict=True)
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in results)


# --- a recorded forward is what the dispatcher gives ---------------------------------------------

CONV = (torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1)


def leaves(args):
    return [a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]


def test_what_is_recorded_has_the_bits_and_gradients_of_the_op():
    results = []
    for way in (torch.ops.resnet_fused.conv_bn_stats, functools.partial(_direct.record, CONV_NAME)):
        x, weight, *geometry = leaves(CONV)
        y, mean, var = way(x, weight, *geometry)
        assert not mean.requires_grad
        y.square().sum().backward()
        results.append([y, mean, var, x.grad, weight.grad])
    assert all(map(torch.equal, *results))


CONV_NAME = "conv_bn_stats"


def test_a_recorded_forward_checks_its_arguments():
    x, weight, *rest = CONV
    with pytest.raises(ValueError, match="groups=1 does not fit x of 2 channels"):
        _direct.record(CONV_NAME, x[:, :2], weight, *rest)


def test_a_recorded_forward_follows_autocast():
    x, weight, *geometry = leaves(CONV)
    with torch.autocast("cpu", torch.bfloat16):
        y, mean, _ = _direct.record(CONV_NAME, x, weight, *geometry)
    assert (y.dtype, mean.dtype) == (torch.bfloat16, torch.float32)
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_a_recorded_forward_refuses_double_backward():
    x, weight, *geometry = leaves(CONV)
    y, *_ = _direct.record(CONV_NAME, x, weight, *geometry)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_an_op_of_a_backward_has_no_forward_to_record():
    assert "max_pool_backward" not in _direct.RECORD
