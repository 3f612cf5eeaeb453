"""Names, options, parameter counts, initialisation, tracing."""

import inspect
import math

import pytest
import torch
from torch import fx, nn

from resnet_fused.models import MODELS, create_model
from resnet_fused.models.plain import PlainBlock
from resnet_fused.models.resnet import Bottleneck

IMAGENET_PARAMS = {
    "resnet18": 11.69,
    "resnet34": 21.80,
    "resnet50": 25.56,
    "resnet101": 44.55,
    "resnet152": 60.19,
    "resnext50_32x4d": 25.03,
    "wide_resnet50_2": 68.88,
    "vgg16": 138.36,
    "vgg19": 143.67,
}
#: He et al. (arXiv 1512.03385), table 6, as rounded there.
CIFAR_PARAMS = {20: "0.27", 32: "0.46", 44: "0.66", 56: "0.85", 110: "1.7", 1202: "19.4"}


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "millions"), IMAGENET_PARAMS.items())
def test_parameters_of_imagenet_models(name, millions):
    assert round(params(on_meta(name)) / 1e6, 2) == millions


@pytest.mark.parametrize(("layers", "millions"), CIFAR_PARAMS.items())
def test_parameters_and_layers_of_cifar_models(layers, millions):
    model = on_meta(f"cifar_resnet{layers}")
    digits = len(millions.split(".")[1])
    assert f"{params(model) / 1e6:.{digits}f}" == millions
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == layers


@pytest.mark.parametrize("layers", [20, 32, 44, 56])
def test_cifar_plain_has_the_residual_nets_parameters(layers):
    plain, residual = on_meta(f"cifar_plain{layers}"), on_meta(f"cifar_resnet{layers}")
    assert list(plain.state_dict()) == list(residual.state_dict())
    assert params(plain) == params(residual)


@pytest.mark.parametrize("layers", [18, 34])
def test_plain_is_the_resnet_without_shortcuts(layers):
    plain, residual = on_meta(f"plain{layers}"), on_meta(f"resnet{layers}")
    expected = [name for name in residual.state_dict() if "downsample" not in name]
    assert list(plain.state_dict()) == expected
    assert not any(hasattr(m, "downsample") for m in plain.modules())


def test_plain_block_adds_nothing():
    block = PlainBlock(8, 8).eval()
    nn.init.zeros_(block.conv2.weight)
    assert block(torch.randn(1, 8, 4, 4)).abs().max() == 0


@pytest.mark.parametrize("name", MODELS)
def test_num_classes_and_output_shape(name):
    default = 10 if name.startswith("cifar") else 1000
    size = (2, 3, 32, 32) if name.startswith("cifar") else (2, 3, 64, 64)
    x = torch.empty(size, device="meta")
    assert on_meta(name).eval()(x).shape == (2, default)
    assert on_meta(name, num_classes=7).eval()(x).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "plain18", "cifar_resnet20"])
def test_initialisation(name):
    torch.manual_seed(0)
    model = create_model(name)
    assert model.training
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)


@pytest.mark.parametrize("stride_in", ["1x1", "3x3"])
def test_stride_in_places_the_stride(stride_in):
    block = on_meta("resnet50", stride_in=stride_in).layer2[0]
    strides = {"1x1": block.conv1.stride, "3x3": block.conv2.stride}
    assert strides.pop(stride_in) == (2, 2)
    assert set(strides.values()) == {(1, 1)}
    assert block.conv3.stride == (1, 1)


def test_stride_in_changes_no_shape():
    with torch.device("meta"):
        x = torch.empty(1, 8, 9, 7)
        shapes = {Bottleneck(8, 4, 2, stride_in=s)(x).shape for s in ("1x1", "3x3")}
    assert shapes == {(1, 16, 5, 4)}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "plain18", "cifar_resnet20", "vgg16"])
def test_fx_traces_every_forward(name):
    graph = fx.symbolic_trace(on_meta(name)).graph
    convs = [n for n in graph.nodes if n.op == "call_module" and "conv" in str(n.target)]
    assert convs or name == "vgg16"


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20", "cifar_plain20"])
def test_export_gives_the_same_answer(name):
    torch.manual_seed(0)
    model = create_model(name).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet20", "plain18"])
def test_compile_finds_one_graph(name):
    torch.manual_seed(0)
    model = create_model(name).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def test_one_relu_per_block_as_torchvision():
    block = on_meta("resnet50").layer1[0]
    assert [n for n, m in block.named_children() if isinstance(m, nn.ReLU)] == ["relu"]
    assert block.relu.inplace


@pytest.mark.parametrize("name", MODELS)
def test_builders_work_without_create_model(name):
    with torch.device("meta"):
        assert params(MODELS[name]()) == params(create_model(name))
    assert "num_classes" in inspect.signature(MODELS[name]).parameters


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet500", {}, ("resnet500", "resnet50")),
        ("Resnet18", {}, ("resnet18",)),
        ("zzz", {}, ("zzz", "resnet18", "vgg19")),
        ("resnet18", {"stride_in": "1x1"}, ("resnet18", "stride_in", "'1x1'", "'3x3'")),
        ("vgg16", {"shortcut": "A"}, ("vgg16", "shortcut", "'A'", "None")),
        ("plain18", {"shortcut": "B"}, ("plain18", "shortcut", "'B'", "None")),
        ("cifar_plain20", {"stride_in": "1x1"}, ("cifar_plain20", "stride_in")),
        ("resnet50", {"stride_in": "5x5"}, ("resnet50", "stride_in='5x5'", "'3x3', '1x1'")),
        ("resnet50", {"shortcut": "D"}, ("resnet50", "shortcut='D'", "'A', 'B', 'C'")),
        ("resnet18", {"num_classes": 0}, ("num_classes=0", "at least 1")),
        ("vgg16", {"num_classes": 2.0}, ("num_classes=2.0", "integer")),
        ("cifar_resnet20", {"num_classes": True}, ("num_classes=True", "integer")),
    ],
)
def test_errors_name_argument_value_and_what_is_accepted(name, options, words):
    with pytest.raises(ValueError) as caught:
        on_meta(name, **options)
    assert all(word in str(caught.value) for word in words)
