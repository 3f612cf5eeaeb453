"""``freeze`` refuses what would repeat the planning example's values, and takes what only may."""

import dataclasses
import random
import types
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from nets import ConvBnRelu, assert_same_model, calibrate, image
from torch import nn
from torch.nn.utils import prune

import resnet_fused as rf

X = image(2, 3, 16, 16)


class Model(nn.Module):
    """A convolution, state of all kinds, and a rule for what to return."""

    def __init__(self, rule, conv=None):
        super().__init__()
        self.conv, self.rule = conv or ConvBnRelu(3, 4), rule
        self.calls, self.cached, self.tensor = 0, None, torch.zeros(())

    def forward(self, x):
        return self.rule(self, self.conv(x))


@dataclasses.dataclass
class Plain:
    maps: torch.Tensor


@pytest.mark.parametrize(
    ("result", "named"),
    [
        (lambda m, y: Plain(y), "test_capture_refuses.Plain"),
        (lambda m, y: types.SimpleNamespace(maps=y), "types.SimpleNamespace"),
        (lambda m, y: {"maps": [y, {y}]}, "builtins.set"),
        (lambda m, y: (y, np.zeros(2)), "numpy.ndarray"),
    ],
)
def test_results_in_which_tensors_hide(result, named):
    with pytest.raises(TypeError, match=rf"returns {named}.*accepted are tensors"):
        rf.freeze(Model(result).eval(), X)


def _counted(m, y):
    m.calls += 1
    return y * m.calls


def _turned(m, y):
    m.cached = not m.cached
    return y if m.cached else -y


def _last(m, y):
    last, m.cached = m.cached, y.detach()
    return y if last is None else y + last


LEAVING = {
    "data": lambda m, y: y.data * 2,
    "data written": lambda m, y: (y.data.clamp_(max=1), y)[1] * 2,
    "tolist": lambda m, y: y + torch.tensor(y.tolist()),
    "numbers": lambda m, y: y.tolist(),
    "numpy": lambda m, y: y * float(y.detach().numpy().max()),
    "from numpy": lambda m, y: torch.from_numpy(y.detach().numpy()),
    "dlpack": lambda m, y: torch.from_dlpack(y.detach()),
    "counted": _counted,
    "turned": _turned,
    "last": _last,
    "a branch": lambda m, y: y if y.detach().numpy().mean() > 0 else -y,
    "own generator": lambda m, y: y * GENERATOR.normal(),
}
GENERATOR = np.random.default_rng(0)


@pytest.mark.parametrize("example", ["drawn", "zeros"])
@pytest.mark.parametrize("how", LEAVING)
def test_values_that_leave_the_trace(how, example):
    model = Model(LEAVING[how], nn.Conv2d(3, 4, 1)).eval()
    with pytest.raises(ValueError, match=r"out of the trace|other constants for other values"):
        rf.freeze(model, X if example == "drawn" else torch.zeros_like(X))


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_numbers_drawn_outside_of_torch(draw):
    rules = (lambda m, y: y * draw(), lambda m, y: y if draw() < 2 else -y)
    for rule in rules:
        with pytest.raises(ValueError, match="random numbers of Python or NumPy"):
            rf.freeze(Model(rule, nn.Conv2d(3, 4, 1)).eval(), X)


def test_a_tensor_that_counts():
    def rule(m, y):
        m.tensor += 1
        return y * m.tensor

    with pytest.raises(ValueError, match="its own tensor: an engine holds constants"):
        rf.freeze(Model(rule).eval(), X)


def test_a_shape_that_came_later_is_asked_too():
    model = calibrate(Model(lambda m, y: y.data if y.shape[2] > 16 else y), X)
    frozen = rf.freeze(model, X)
    with pytest.raises(ValueError, match=r"out of the trace by \.data"):
        frozen(image(2, 3, 32, 32))
    assert_same_model(frozen, model, X, reduced=27)


# What looks alike and is right


def _lazy(m, y):
    if m.cached is None:
        m.cached = torch.arange(4.0).view(4, 1, 1) + 1
    return y * m.cached


def _noted(m, y):
    m.calls += 1
    m.cached = y
    return y


TAKEN = {
    "a table made at the first call": _lazy,
    "notes of calls and activations": _noted,
    "constants made anew": lambda m, y: y * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1),
    "a constant that is no number": lambda m, y: (y, y * torch.tensor(float("nan")), float("nan")),
    "values of constants": lambda m, y: y * sum((torch.arange(3) * 2).tolist()),
    "other containers": lambda m, y: OrderedDict(
        maps=y, size=y.shape, dtype=y.dtype, where=y.device
    ),
}


@pytest.mark.parametrize("how", TAKEN)
def test_what_is_taken(how):
    model = calibrate(Model(lambda m, y: y), X)
    model.rule = TAKEN[how]
    for example in (X, X[:0], torch.full_like(X, float("nan"))):
        frozen = rf.freeze(model, example)
        with torch.no_grad():
            result, wanted = frozen(X), model(X)
        for value, want in zip(
            *map(torch.utils._pytree.tree_leaves, (result, wanted)), strict=True
        ):
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, want.detach(), equal_nan=True)
            else:
                assert value == want or value != value


def test_the_second_run_stays_within_the_example_s_range():
    """A forward may take no other values: here they are places in a table."""
    table = torch.arange(6.0)

    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(table[x.long()])

    x = torch.arange(6.0).repeat(2, 3, 6, 1)
    model = Places().eval()
    torch.testing.assert_close(rf.freeze(model, x)(x), model(x).detach())


# Hooks


def test_hooks_are_warned_of():
    model, seen = calibrate(Model(lambda m, y: y), X), []
    model.conv[0].register_forward_hook(lambda module, inputs, y: seen.append(y))
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    with pytest.warns(UserWarning, match="forward hooks of the model itself, conv.0 run while"):
        frozen = rf.freeze(model, X)
    count = len(seen)
    y = frozen(X)
    assert len(seen) == count
    torch.testing.assert_close(y, model(X).detach())


def test_hooks_of_torch_itself_are_not():
    model = calibrate(Model(lambda m, y: y), X)
    with torch.no_grad():  # with a gradient, torch cannot copy what it computes from the mask
        prune.l1_unstructured(model.conv[0], "weight", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        frozen = rf.freeze(model, X)
    torch.testing.assert_close(frozen(X), model(X).detach())
