"""What a user changes about a fused model afterwards is followed, as by the model itself."""

import copy
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf
from resnet_fused.backends import onednn
from resnet_fused.nn.fused import program_of

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Net(Block):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.act, self.size, self.scales = F.relu, (2, 2), {"x": 2.0}
        self.cfg = types.SimpleNamespace(act=True, sizes=[1, 2])
        self.register_module("extra", None)
        self.register_parameter("gain", None)
        self.register_buffer("mask", None)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        if self.extra is not None:
            x = self.extra(x)
        if self.gain is not None:
            x = x * self.gain
        if self.mask is not None:
            x = x * self.mask
        x = x * self.scales["x"]
        if self.cfg.act:
            x = self.act(x) * self.cfg.sizes[0]
        return F.adaptive_avg_pool2d(x, self.size)


def net():
    torch.manual_seed(0)
    return Net()


EDITS = {
    "nothing": lambda m: None,
    "another block": lambda m: m.blocks.append(copy.deepcopy(m.blocks[0])),
    "a block less": lambda m: m.blocks.pop(-1),
    "a function": lambda m: setattr(m, "act", F.silu),
    "a tuple": lambda m: setattr(m, "size", (3, 3)),
    "a dict's value": lambda m: m.scales.update(x=3.0),
    "a configuration": lambda m: setattr(m.cfg, "act", False),
    "a list of a configuration": lambda m: m.cfg.sizes.__setitem__(0, 5),
    "a module": lambda m: setattr(m, "extra", nn.Tanh()),
    "a parameter": lambda m: setattr(m, "gain", nn.Parameter(torch.tensor(2.0))),
    "a buffer": lambda m: setattr(m, "mask", torch.tensor(3.0)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("training", [False, True])
def test_edits(edit, training):
    plain, fused = net(), rf.fuse(net())
    for model in (plain, fused):
        model.train(training)
        model(X)
        edit(model)
    torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-5)


def test_copies_of_a_model_with_such_attributes_run_fused():
    """What is compared is what they are like, and no object's address."""
    fused = rf.fuse(net().eval())
    for model in [copy.deepcopy(fused), rf.fuse(fused), fused]:
        assert program_of(model).bind(model, (X,), {}) is not None
        model.cfg.act = False
        assert program_of(model).bind(model, (X,), {}) is None


ACTIVE, SCALES, CONFIG = True, {"x": 2.0}, types.SimpleNamespace(double=False)
#: What cannot be pickled, and what does not equal itself.
FUNCTIONS, NOTHING = {"same": lambda x: x}, float("nan")


def tail(x):
    return x * 2 if CONFIG.double else x


class Flagged(Block):
    """Branches on what stands beside it, itself and in what it calls."""

    def forward(self, x):
        x = self.bn(self.conv(x))
        if ACTIVE:
            x = F.relu(x)
        return self.scaled(x)

    def scaled(self, x):
        x = x if NOTHING == 0 else FUNCTIONS["same"](x)
        return tail(x) * sum(scale for scale in (SCALES["x"], 1.0))


FLAGS = {
    "nothing": lambda patch: None,
    "a global": lambda patch: patch.setitem(globals(), "ACTIVE", False),
    "a value of a global": lambda patch: patch.setitem(SCALES, "x", 3.0),
    "an attribute of a global": lambda patch: patch.setattr(CONFIG, "double", True),
    "a global that is gone": lambda patch: patch.delitem(globals(), "ACTIVE"),
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("training", [False, True])
def test_flags_beside_a_module(name, training, monkeypatch):
    torch.manual_seed(0)
    plain = Flagged().train(training)
    fused = rf.fuse(plain)
    for model in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fused):
        torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-5)
        with monkeypatch.context() as patch:
            FLAGS[name](patch)
            runs_fused = program_of(model).bind(model, (X,), {}) is not None
            assert runs_fused == (name == "nothing")
            if name == "a global that is gone":
                with pytest.raises(NameError):
                    model(X)
            else:
                torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-5)
        assert program_of(model).bind(model, (X,), {}) is not None


def test_flags_beside_a_compiled_module(monkeypatch):
    torch.manual_seed(0)
    plain = Flagged().eval()
    compiled = torch.compile(rf.fuse(plain), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), plain(X), rtol=1e-4, atol=1e-5)
    monkeypatch.setitem(SCALES, "x", 3.0)
    torch.testing.assert_close(compiled(X), plain(X), rtol=1e-4, atol=1e-5)


class Patched(Block):
    pass


def test_another_forward_for_the_class(monkeypatch):
    plain, fused = Patched().eval(), rf.fuse(Patched().eval())
    fused.load_state_dict(plain.state_dict())
    fused(X)
    monkeypatch.setattr(Patched, "forward", lambda self, x: self.bn(self.conv(x)))
    torch.testing.assert_close(fused(X), plain(X))
    again = rf.fuse(plain)
    assert [group.pattern for group in rf.fusion_report(again).fused] == ["conv+bn"]
    torch.testing.assert_close(again(X), plain(X))


@pytest.mark.parametrize("value", [2, [2, 2], (2,)], ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_geometry_in_every_form_that_torch_takes(value, training, backend):
    torch.manual_seed(0)
    plain = Block().train(training)
    fused = rf.fuse(plain)
    for model in (plain, fused):
        model.conv.stride = model.conv.padding = model.conv.dilation = value
    with rf.use_backend(backend):
        torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-5)


def test_a_dtype_that_the_weights_have_not():
    fused = rf.fuse(Block().train())
    # By torch, in its words on a processor that computes in bfloat16 and on one that does not.
    computes = onednn.computes_in(torch.bfloat16)
    words = "should be the same" if computes else "expected scalar type"
    with rf.use_backend("reference"), pytest.raises(RuntimeError, match=words):
        fused(X.bfloat16())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("how", ["fused", "foreach"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adagrad"])
def test_steps_of_optimizers_are_seen(kind, how, backend):
    """torch's fused ones move no version counter, and weights are kept packed."""
    torch.manual_seed(0)
    fused = rf.fuse(nn.Sequential(Block(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    optimizer = getattr(torch.optim, kind)(fused.parameters(), lr=0.1, **{how: True})
    with rf.use_backend(backend):
        for _ in range(3):
            fused.eval()
            with torch.no_grad():
                plain = rf.unfuse(copy.deepcopy(fused))
                torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-5)
            optimizer.zero_grad()
            fused.train()
            fused(X).square().sum().backward()
            optimizer.step()


class WritesData(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-0.1)


def test_steps_that_write_through_data_are_seen():
    torch.manual_seed(0)
    fused = rf.fuse(Block().eval())
    optimizer = WritesData(fused.parameters(), lr=0.1)
    for _ in range(2):
        with torch.no_grad():
            plain = rf.unfuse(copy.deepcopy(fused))
            torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-5)
        fused(X).square().sum().backward()
        optimizer.step()
