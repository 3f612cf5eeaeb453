"""Forwards that a graph of their ops would not stand for: they are left alone, or followed."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
SEEN = []
DRAWS = random.Random(0)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class WithoutAutocast(Plain):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class WithoutGradients(Plain):
    def forward(self, x):
        with torch.no_grad():
            y = super().forward(x)
        return y


class Decorated(Plain):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class AsksForGradients(Plain):
    def forward(self, x):
        y = super().forward(x)
        return y if torch.is_grad_enabled() else 2 * y


class AsksForAutocast(Plain):
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if torch.is_autocast_enabled("cpu") else y


class AsksForType(Plain):
    def forward(self, x):
        return super().forward(2 * x if type(x) is torch.Tensor else x)


class DrawsByNumpy(Plain):
    def forward(self, x):
        return super().forward(x) * float(np.random.rand())


class DrawsByItsOwn(Plain):
    def __init__(self, source):
        super().__init__()
        self.source = source

    def forward(self, x):
        draw = getattr(self.source, "random", None)
        drawn = draw() if draw else float(torch.rand((), generator=self.source))
        return super().forward(x) * drawn


class DrawsByAGlobal(Plain):
    def forward(self, x):
        return super().forward(x) * DRAWS.random()


class Remembers(Plain):
    def forward(self, x):
        SEEN.append(y := super().forward(x))
        return y


class Meter:
    def __init__(self):
        self.values = []

    def update(self, value):
        self.values.append(value)


class Measures(Plain):
    def __init__(self):
        super().__init__()
        self.meter = Meter()

    def forward(self, x):
        y = super().forward(x)
        self.meter.update(y.detach())
        return y


class Hides(Plain):
    """Where nobody looks for it: among the attributes of a function."""

    def forward(self, x):
        y = super().forward(x)
        _hide(y)
        return y


def _hide(value):
    _hide.value = value


LEFT_ALONE = {
    "another grad mode or autocast": [WithoutAutocast, WithoutGradients, Decorated],
    "depends on the grad mode": [AsksForGradients, AsksForAutocast],
    "the type of a value": [AsksForType],
    "random numbers": [DrawsByNumpy, DrawsByAGlobal, lambda: DrawsByItsOwn(random.Random(0)),
                       lambda: DrawsByItsOwn(np.random.default_rng(0)),
                       lambda: DrawsByItsOwn(torch.Generator())],
    "forward changes SEEN": [Remembers],
    "forward changes meter.values": [Measures],
    "beside its result": [Hides],
}  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "make"), [(reason, make) for reason, made in LEFT_ALONE.items() for make in made]
)
def test_left_alone(reason, make):
    before = len(SEEN), DRAWS.getstate(), np.random.get_state()[1].tolist()
    fused = rf.fuse(make().eval())
    (skipped,) = rf.fusion_report(fused).skipped
    assert reason in skipped.reason
    assert before == (len(SEEN), DRAWS.getstate(), np.random.get_state()[1].tolist())
    _hide.value = None


def test_what_is_left_alone_does_what_it_did():
    plain = WithoutGradients().train()
    fused = rf.fuse(plain)
    assert not fused(X).requires_grad
    plain = WithoutAutocast().eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert rf.fuse(plain)(X).dtype == plain(X).dtype == torch.float32
    measuring = rf.fuse(Measures().eval())
    measuring(X)
    assert [type(value) for value in measuring.meter.values] == [torch.Tensor]


class AsksForAMask(Plain):
    def forward(self, x):
        mask = getattr(x, "mask", None)
        if mask is not None or hasattr(x, "tensors"):
            x = x * mask
        return super().forward(x)


def test_an_attribute_that_no_tensor_has():
    """The default is taken, as of a tensor."""
    plain = AsksForAMask().eval()
    fused = rf.fuse(plain)
    assert len(rf.fusion_report(fused).fused) == 1
    torch.testing.assert_close(fused(X), plain(X))


def test_tracing_leaves_modes_as_they_are():
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), torch.autocast("cpu", torch.bfloat16):
            rf.fuse(AsksForGradients())
            assert torch.is_grad_enabled() is enabled
            assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cuda")
