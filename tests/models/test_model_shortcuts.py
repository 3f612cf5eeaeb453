"""Shortcut options A, B and C."""

import pytest
import torch
from torch import nn

from resnet_fused.models import create_model
from resnet_fused.models.resnet import BasicBlock
from resnet_fused.models.shortcut import PaddedShortcut, make_shortcut


def downsamples(name: str, **options) -> dict[str, nn.Module]:
    with torch.device("meta"):
        model = create_model(name, **options)
    modules = model.named_modules()
    return {n.removesuffix(".downsample"): m for n, m in modules if n.endswith(".downsample")}


def test_option_a_subsamples_and_pads_with_zeros():
    x = torch.randn(2, 3, 5, 6)
    y = PaddedShortcut(3, 8, 2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert y[:, 3:].abs().max() == 0


def test_option_a_has_no_parameters_and_passes_gradients():
    shortcut = PaddedShortcut(2, 4, 2)
    assert not shortcut.state_dict()
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    shortcut(x).sum().backward()
    assert x.grad.sum() == 2 * 2 * 2


@pytest.mark.parametrize(
    ("name", "option", "where"),
    [
        ("resnet18", "A", ["layer2.0", "layer3.0", "layer4.0"]),
        ("resnet18", "B", ["layer2.0", "layer3.0", "layer4.0"]),
        ("resnet18", "C", [f"layer{s}.{i}" for s in (1, 2, 3, 4) for i in (0, 1)]),
        ("resnet50", "B", ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
        ("cifar_resnet20", "A", ["layer2.0", "layer3.0"]),
    ],
)
def test_where_the_options_put_a_module(name, option, where):
    found = downsamples(name, shortcut=option)
    assert list(found) == where
    kind = PaddedShortcut if option == "A" else nn.Sequential
    assert all(type(m) is kind for m in found.values())


def test_defaults_are_b_for_imagenet_and_a_for_cifar():
    assert all(isinstance(m, nn.Sequential) for m in downsamples("resnet18").values())
    assert all(isinstance(m, PaddedShortcut) for m in downsamples("cifar_resnet20").values())


@pytest.mark.parametrize("option", ["B", "C"])
def test_projection_children_are_named_as_torchvisions(option):
    block = BasicBlock(4, 8, 2, shortcut=option)
    names = [n for n, _ in block.named_parameters() if n.startswith("downsample")]
    assert names == ["downsample.0.weight", "downsample.1.weight", "downsample.1.bias"]


@pytest.mark.parametrize("option", ["A", "B"])
def test_identity_shortcut_where_the_shape_stays(option):
    assert make_shortcut(option, 8, 8, 1) is None
    block = BasicBlock(8, 8, shortcut=option).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x.clone()), torch.relu(x))


def test_block_with_option_a_adds_the_padded_input():
    block = BasicBlock(4, 8, 2, shortcut="A").eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2])
    assert y[:, 4:].abs().max() == 0


@pytest.mark.parametrize("option", ["A", "B", "C"])
def test_forward_does_not_change_its_input(option):
    x = torch.randn(2, 4, 6, 6)
    before = x.clone()
    BasicBlock(4, 8, 2, shortcut=option)(x)
    assert torch.equal(x, before)


def test_unknown_option():
    with pytest.raises(ValueError, match="shortcut='a' is not accepted; accepted: 'A', 'B', 'C'"):
        make_shortcut("a", 4, 8, 2)
