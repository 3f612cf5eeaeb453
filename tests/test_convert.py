"""The verbs fuse, unfuse and fusion_report: what they take, what they change, what they refuse."""

import copy

import pytest
import torch
from devices import device_of
from nets import ConvBnRelu, Residual, SmallNet, assert_same_model, fused_calls, image, small_net
from torch import nn

import resnet_fused as rf

X = image(2, 3, 32, 32)
GROUPS = 6  # in SmallNet: the stem, two and two in the blocks, the projection


def test_outputs_and_calls():
    model = small_net()
    fused = rf.fuse(model)
    assert_same_model(fused, model, X, reduced=144)
    assert fused_calls(fused, X) == GROUPS
    assert fused_calls(model, X) == 0


def test_output_of_a_block_is_channels_last():
    fused = rf.fuse(Residual().eval())
    assert fused(image(2, 8, 6, 6)).is_contiguous(memory_format=torch.channels_last)


def test_copy_by_default():
    model = small_net()
    fused = rf.fuse(model)
    assert fused is not model
    assert {id(p) for p in fused.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    assert rf.fusion_report(model).fused == []


def test_inplace_keeps_every_object():
    model = small_net()
    before = [*model.modules(), *model.parameters(), *model.buffers()]
    fused = rf.fuse(model, inplace=True)
    assert fused is model
    assert all(map(id_equal, before, [*model.modules(), *model.parameters(), *model.buffers()]))


def id_equal(a, b) -> bool:
    return a is b


def test_fused_modules_are_instances_of_their_classes():
    fused = rf.fuse(small_net())
    assert isinstance(fused, SmallNet)
    assert isinstance(fused.layer1[0], Residual)
    assert type(fused.conv1) is nn.Conv2d
    assert repr(fused.bn1) == repr(small_net().bn1)


def test_unfuse_gives_the_original_back():
    model = small_net()
    fused = rf.fuse(model)
    fused(X)
    back = rf.unfuse(fused)
    assert back is fused
    for a, b in zip(back.modules(), model.modules(), strict=True):
        assert type(a) is type(b)
        assert a.__dict__.keys() == b.__dict__.keys()
    assert torch.equal(back(X), model(X))
    assert repr(back) == repr(model)


def test_unfuse_of_an_unfused_model_does_nothing():
    model = small_net()
    before = repr(model)
    assert repr(rf.unfuse(model)) == before


def test_fuse_twice_is_fuse_once():
    once = rf.fuse(small_net())
    twice = rf.fuse(once)
    assert rf.fusion_report(twice) == rf.fusion_report(once)
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
    assert torch.equal(twice(X), once(X))


def test_training_mode_can_be_fused():
    fused = rf.fuse(SmallNet().train())
    assert all(m.training for m in fused.modules())
    assert len(rf.fusion_report(fused).fused) == GROUPS


def test_filter_selects_modules():
    asked = []

    def blocks(module, fqn):
        asked.append(fqn)
        return isinstance(module, Residual)

    report = rf.fusion_report(rf.fuse(small_net(), filter_fn=blocks))
    assert asked[0] == ""
    assert {group.name.split(".")[0] for group in report.fused} == {"layer1"}
    assert len(report.fused) == GROUPS - 1
    (stem,) = report.skipped
    assert stem.name == "conv1"
    assert "filter_fn left it out" in stem.reason


def test_filter_by_name():
    fused = rf.fuse(small_net(), filter_fn=lambda module, fqn: fqn != "layer1.1")
    names = {group.name for group in rf.fusion_report(fused).fused}
    # Its projection is a module of its own, and is asked for itself.
    assert names == {"conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.downsample.0"}
    assert_same_model(fused, rf.unfuse(copy.deepcopy(fused)), X, reduced=144)


@pytest.mark.parametrize(
    ("root", "channels", "groups"),
    [
        (lambda: Residual(8, 16, 2), 8, 3),
        (lambda: ConvBnRelu(8, 8), 8, 1),
        (lambda: nn.Sequential(ConvBnRelu(8, 8), ConvBnRelu(8, 4)), 8, 2),
        (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Identity(), nn.BatchNorm2d(8)), 8, 1),
    ],
)
def test_root_that_is_itself_a_block(root, channels, groups):
    model = root().eval()
    fused = rf.fuse(model)
    x = image(2, channels, 8, 8)
    assert fused_calls(fused, x) == groups
    assert_same_model(fused, model, x, reduced=72)


def test_root_that_is_a_convolution():
    fused = rf.fuse(nn.Conv2d(3, 4, 1))
    report = rf.fusion_report(fused)
    assert [entry.name for entry in report.skipped] == [""]
    assert str(report)


def test_report_is_a_table():
    fused = rf.fuse(nn.Sequential(small_net().layer1, nn.Conv2d(16, 3, 1)))
    assert str(rf.fusion_report(fused)).splitlines() == [
        "fused 5 of 6 convolutions",
        "     2  conv+bn+relu",
        "     2  conv+bn+add+relu",
        "     1  conv+bn",
        "left alone:",
        "  1  no BatchNorm follows",
    ]


def test_report_says_where():
    groups = {g.name: g for g in rf.fusion_report(rf.fuse(small_net())).fused}
    assert groups["conv1"].reason == "in the root (SmallNet)"
    assert groups["layer1.1.downsample.0"].reason == "in layer1.1 (Residual)"
    assert groups["layer1.1.conv2"].pattern == "conv+bn+add+relu"


def test_report_of_an_unfused_model():
    report = rf.fusion_report(small_net())
    assert report.fused == []
    assert len(report.skipped) == GROUPS
    assert all("fuse was not called" in entry.reason for entry in report.skipped)


class Opaque(nn.Module):
    """A forward with control flow on values, its convolutions in a list."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))
        self.block = ConvBnRelu(3, 3)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x) if x.sum() > 0 else -x
        return self.block(x)


def test_report_blames_the_forward_that_could_not_be_traced():
    report = rf.fusion_report(rf.fuse(Opaque()))
    assert [group.name for group in report.fused] == ["block.0"]
    assert [entry.name for entry in report.skipped] == ["convs.0", "convs.1"]
    assert all("Opaque.forward cannot be traced" in entry.reason for entry in report.skipped)


@pytest.mark.parametrize("verb", [rf.fuse, rf.unfuse, rf.fusion_report])
@pytest.mark.parametrize("model", [None, "resnet50", nn.ReLU, {}])
def test_a_model_that_is_no_module(verb, model):
    with pytest.raises(TypeError, match="model must be an"):
        verb(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    with pytest.raises(TypeError, match=r"fuse: model must be an eager nn\.Module"):
        rf.fuse(scripted)


def test_a_model_without_convolution():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(ValueError, match="fuse: model Sequential has no Conv2d"):
        rf.fuse(model)


@pytest.mark.parametrize("backend", [b.name for b in rf.backends() if b.available])
def test_every_backend(backend):
    device = device_of(backend)
    model = small_net().to(device)
    fused = rf.fuse(model)
    with rf.use_backend(backend):
        assert_same_model(fused, model, X.to(device), reduced=144)
