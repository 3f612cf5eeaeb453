"""``fuse`` on the networks people have: torchvision's, timm's and transformers'."""

import copy
from collections import Counter

import pytest
import torch
from nets import assert_same_model, calibrate, image
from torch import nn

import resnet_fused as rf
from resnet_fused.testing import gradient_metrics, two_x_rule

#: How many groups of each pattern a network has: conv+bn, with ReLU, with add and ReLU. But for
#: the first two, stages of one and two blocks stand for the published depths: float64 is slow.
NETWORKS = {
    "torchvision.resnet18": (3, 9, 8),
    "torchvision.resnet50": (4, 33, 16),
    "torchvision.resnext50_32x4d": (4, 11, 5),
    "torchvision.wide_resnet50_2": (4, 11, 5),
    "timm.resnet50d": (4, 13, 5),
    "timm.seresnet50": (9, 11, 0),
    "transformers.bottleneck": (4, 11, 5),
    "transformers.basic": (3, 6, 5),
}
DEPTHS = [1, 2, 1, 1]


def build(name: str, request: pytest.FixtureRequest) -> nn.Module:
    package, _, kind = name.partition(".")
    library = request.getfixturevalue(package)
    resnet = library.models.resnet if package == "torchvision" else None
    if kind == "resnext50_32x4d":
        return resnet.ResNet(resnet.Bottleneck, DEPTHS, groups=32, width_per_group=4)
    if kind == "wide_resnet50_2":
        return resnet.ResNet(resnet.Bottleneck, DEPTHS, width_per_group=128)
    if package == "torchvision":
        return library.models.get_model(kind)
    if package == "timm":
        return library.create_model(kind, layers=DEPTHS)
    sizes = {"bottleneck": [256, 512, 1024, 2048], "basic": [64, 128, 256, 512]}[kind]
    config = library.ResNetConfig(layer_type=kind, depths=DEPTHS, hidden_sizes=sizes)
    return library.ResNetForImageClassification(config)


@pytest.fixture(params=NETWORKS)
def network(request) -> tuple[str, nn.Module]:
    return request.param, build(request.param, request)


X = image(2, 3, 64, 64)
FEATURES = 2048  # what the last layer sums, and the longest sum of all


def test_network(network):
    """One network, one conversion: outputs, state, groups, training, and back."""
    name, model = network
    calibrate(model, X)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fused = rf.fuse(model)

    counts = Counter(group.pattern for group in rf.fusion_report(fused).fused)
    assert (counts["conv+bn"], counts["conv+bn+relu"], counts["conv+bn+add+relu"]) == NETWORKS[name]
    assert list(fused.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in fused.state_dict().items())
    assert isinstance(fused, type(model))

    assert_same_model(fused, model, X, reduced=FEATURES)
    channels_last = X.to(memory_format=torch.channels_last)
    assert_same_model(fused, model, channels_last, reduced=FEATURES)

    _assert_trains_alike(fused, copy.deepcopy(model))
    assert [type(m) for m in rf.unfuse(fused).modules()] == [type(m) for m in model.modules()]


def _assert_trains_alike(fused: nn.Module, model: nn.Module) -> None:
    """Outputs, running statistics and gradients as near to float64 as eager torch's are."""
    oracle = copy.deepcopy(model).double()
    outputs, gradients = [], []
    for m in (fused, model, oracle):
        m.train()
        torch.manual_seed(3)
        y = m(X.to(next(m.parameters()).dtype))
        y = getattr(y, "logits", y)
        y.square().mean().backward()
        outputs.append([y, *(b for b in m.buffers() if b.is_floating_point())])
        gradients.append([p.grad for p in m.parameters()])
    for ours, eager, exact in zip(*outputs, strict=True):
        check = two_x_rule(ours, eager, exact, FEATURES)
        # With few values per channel, statistics make much of each rounding.
        assert check.error <= 4 * check.allowed, check
    ours_turn, eager_turn = (
        sum(1 - gradient_metrics(g, o).cosine for g, o in zip(grads, gradients[2], strict=True))
        for grads in gradients[:2]
    )
    # A value at ReLU's kink turns the gradients of all layers before it, eager's as well.
    assert ours_turn <= 4 * eager_turn + 1e-3 * len(gradients[0]), (ours_turn, eager_turn)


def test_resnet50_has_the_issue_s_counts(torchvision):
    report = rf.fusion_report(rf.fuse(torchvision.models.resnet50()))
    relus = [g for g in report.fused if g.pattern.endswith("relu")]
    adds = [g for g in relus if "add" in g.pattern]
    assert (len(report.fused), len(relus), len(adds)) == (53, 49, 16)
    assert report.skipped == []
    assert str(report).startswith("fused 53 of 53 convolutions")


@pytest.mark.parametrize("name", ["torchvision.resnet18", "timm.resnet50d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_network_in_other_dtypes(name, dtype, request):
    model = calibrate(build(name, request), X)
    fused = rf.fuse(model)
    with torch.no_grad():
        fused(X)  # so that constants of the old dtype are kept
    fused, model = fused.to(dtype), model.to(dtype)
    assert_same_model(fused, model, X.to(dtype), reduced=FEATURES)


def test_network_under_autocast(torchvision):
    model = calibrate(torchvision.models.resnet18(), X)
    fused, twin = rf.fuse(model), copy.deepcopy(model).double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        value, eager = fused(X), model(X)
    with torch.no_grad():
        oracle = twin(X.double())
    assert value.dtype == eager.dtype == torch.bfloat16
    assert (value.double() - oracle).abs().max() <= 2 * (eager.double() - oracle).abs().max()


def test_detection_backbone_with_frozen_norms(torchvision):
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    norm = torchvision.ops.misc.FrozenBatchNorm2d
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=5
    )
    for module in backbone.modules():
        if isinstance(module, norm):
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.2, 0.5)
    fused = rf.fuse(backbone.train())
    assert len(rf.fusion_report(fused).fused) == 20
    x = X[:1, :, :32, :32]
    assert_same_model(fused, backbone, x, reduced=512 * 9)
    losses = []
    for m in (fused, backbone):
        loss = torch.stack([y.square().mean() for y in m(x).values()]).sum()
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1])
    for a, b in zip(fused.parameters(), backbone.parameters(), strict=True):
        assert gradient_metrics(a.grad, b.grad).cosine > 1 - 1e-5
