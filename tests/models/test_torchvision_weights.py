"""torchvision's weights load strictly, ours load into torchvision's, and outputs are equal."""

import pytest
import torch
from torch import nn

from resnet_fused.models import create_model
from resnet_fused.testing import optional_import

SHARED = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "vgg16",
    "vgg19",
)
#: One per kind of block: the deeper ones have the same blocks, and cost seconds each.
RUN = ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg16")


@pytest.fixture(scope="module")
def torchvision_models():
    try:
        return optional_import("torchvision.models")
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")


def randomise_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.2, 0.8)
            nn.init.uniform_(module.bias, -0.2, 0.2)


@pytest.mark.parametrize("name", SHARED)
def test_state_dicts_agree_in_names_order_and_shapes(torchvision_models, name):
    with torch.device("meta"):
        ours, theirs = create_model(name), getattr(torchvision_models, name)()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)


@pytest.mark.parametrize("name", SHARED)
def test_children_have_torchvisions_names_and_order(torchvision_models, name):
    with torch.device("meta"):
        ours, theirs = create_model(name), getattr(torchvision_models, name)()
    names = [[n for n, _ in m.named_modules()] for m in (ours, theirs)]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", RUN)
def test_outputs_are_equal(torchvision_models, name):
    torch.manual_seed(0)
    with torch.device("meta"):
        ours, theirs = create_model(name), getattr(torchvision_models, name)()
    filled = theirs.to_empty(device="cpu").eval()
    for parameter in filled.parameters():
        nn.init.uniform_(parameter, -0.05, 0.05)
    randomise_statistics(filled)
    ours.load_state_dict(filled.state_dict(), strict=True, assign=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = filled(x)
        assert expected.isfinite().all()
        assert torch.equal(ours.eval()(x), expected)


def test_training_step_is_equal(torchvision_models):
    torch.manual_seed(0)
    ours, theirs = create_model("resnet18", num_classes=10), torchvision_models.resnet18()
    theirs.fc = nn.Linear(512, 10)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(a, b), name
