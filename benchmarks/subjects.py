"""What is measured below a whole model: its distinct ops and blocks, read off the model itself.

An op is a group that `fuse` makes one call of: convolution, BatchNorm, addition and ReLU; the stem
with its pool and the head with its mean are one each, as in an engine. It is put together from
torch's own modules, so that every contender can run it: the package's as well as the peers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from resnet_fused.bench.accuracy import check_batch
from resnet_fused.bench.contenders import (
    FROZEN,
    Build,
    Runner,
    Setup,
    eager,
    frozen,
    own_copy,
    torch_runner,
)
from resnet_fused.bench.networks import (
    CALIBRATION_BATCH,
    CHECKED,
    Network,
    calibrate,
    float64_answers,
)
from resnet_fused.bench.options import UsageError
from resnet_fused.bench.results import OP
from resnet_fused.flops import count
from resnet_fused.functional import avg_pool_linear
from resnet_fused.models import create_model
from resnet_fused.models.resnet import BasicBlock, Bottleneck
from resnet_fused.testing import longest_sum
from resnet_fused.tuning.calls import Call, harvest

#: Different rows of a drawn input; a larger batch repeats them.
DISTINCT = 16


@dataclass
class Layer:
    """A distinct op or block: how to build it, what it reads, how often each model runs it."""

    build: Callable[[], nn.Module]
    #: Channels, height, width.
    input_shape: tuple[int, ...]
    uses: dict[str, int] = field(default_factory=dict)
    #: Who runs it otherwise than a model.
    contenders: Mapping[str, Build] = field(default_factory=dict)


class Group(nn.Module):
    """relu(BN(conv(x)) + residual), the residual a constant of the batch's size, or absent."""

    residual: Tensor | None

    def __init__(self, conv: nn.Conv2d, residual_shape: tuple[int, ...] | None, relu: bool) -> None:
        super().__init__()
        self.conv, self.bn = conv, nn.BatchNorm2d(conv.out_channels)
        self.relu = nn.ReLU() if relu else None
        rows = None if residual_shape is None else torch.randn(CHECKED, *residual_shape)
        self.register_buffer("residual", rows)

    def fit(self, batch: int) -> None:
        """Repeat the residual's first rows as a batch of known answers repeats its images."""
        if self.residual is not None:
            self.residual = check_batch(self.residual[:CHECKED], batch)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.residual is not None:
            y = y + self.residual
        return y if self.relu is None else self.relu(y)


def layers(level: str, models: tuple[str, ...], image_size: int) -> dict[str, Layer]:
    """Return the distinct ops or blocks of the models by their name, in order of their first use.

    Raises:
        UsageError: a model has none, or takes no such images.
    """
    found: dict[str, Layer] = {}
    for model in models:
        for name, layer in _of_model(level, model, image_size).items():
            found.setdefault(name, replace(layer, uses={})).uses.update(layer.uses)
    return found


def network(name: str, layer: Layer, batch: int, seed: int) -> tuple[Network, Tensor]:
    """Return a layer with calibrated statistics and known answers, and the batch it runs on."""
    torch.manual_seed(seed)
    module = layer.build()
    rows = torch.randn(DISTINCT, *layer.input_shape)
    checked = rows[:CHECKED]
    _fit(module, CALIBRATION_BATCH)
    calibrate(module, rows)
    _fit(module, CHECKED)
    counted = count(module, checked.shape)
    answers = float64_answers(module, checked)
    _fit(module, batch)
    macs, reduced = counted.macs // CHECKED, longest_sum(module)
    made = Network(name, module, macs, counted.params, reduced, checked, answers)
    return made, check_batch(rows, batch)


def _fit(module: nn.Module, batch: int) -> None:
    for part in module.modules():
        if isinstance(part, Group):
            part.fit(batch)


@functools.cache
def _of_model(level: str, model: str, image_size: int) -> dict[str, Layer]:
    with torch.device("meta"):
        network = create_model(model).eval()
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        example = torch.empty(1, 3, image_size, image_size)
    example = example.contiguous(memory_format=torch.channels_last)
    found = _ops(model, network, example) if level == OP else _blocks(model, network, example)
    if not found:
        raise UsageError(f"--model: {model} has no {level} to measure; accepted: ResNets")
    return found


def _ops(model: str, network: nn.Module, example: Tensor) -> dict[str, Layer]:
    try:
        calls = harvest(network, example)
    except ValueError:
        raise UsageError(f"--model: {model} makes no fused call; accepted: ResNets") from None
    found: dict[str, Layer] = {}
    for call in calls:
        if call.op != "conv_bn_act":
            continue
        name, build = str(call).partition("x")[2], functools.partial(_group, call)
        if tuple(call.args[0].shape) == tuple(example.shape) and hasattr(network, "maxpool"):
            name, build = f"{name} max pool", functools.partial(_stem, call)
        shape = tuple(call.args[0].shape[1:])
        found[name] = Layer(build, shape, {model: call.count}, {FROZEN: _engine})
    if head := _head(network, example):
        name, layer = head
        found[name] = replace(layer, uses={model: 1})
    return found


def _group(call: Call) -> nn.Module:
    weight, residual = call.argument("weight"), call.argument("residual")
    conv = nn.Conv2d(
        weight.shape[1] * call.argument("groups"), weight.shape[0], tuple(weight.shape[2:]),
        call.argument("stride"), call.argument("padding"), call.argument("dilation"),
        call.argument("groups"), bias=False,
    )  # fmt: skip
    shape = None if residual is None else tuple(residual.shape[1:])
    return Group(conv, shape, call.argument("act") == "relu")


def _engine(setup: Setup) -> Runner:
    """`freeze`, of a group whose residual lies as the layer before has written it in a model."""
    model = copy.deepcopy(setup.model)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return frozen(replace(setup, model=model))


def _stem(call: Call) -> nn.Module:
    return nn.Sequential(_group(call), nn.MaxPool2d(3, 2, 1))


def _head(network: nn.Module, example: Tensor) -> tuple[str, Layer] | None:
    linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
    pooled = _inputs(network, example, nn.AdaptiveAvgPool2d)
    if len(linear) != 1 or len(pooled) != 1:
        return None
    (fc,), ((_, shape),) = linear, pooled
    build = functools.partial(_head_module, fc.in_features, fc.out_features)
    name = f"{'x'.join(map(str, shape))} mean, linear to {fc.out_features}"
    return name, Layer(build, shape, contenders=HEAD)


def _head_module(features: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes))


def _head_op(setup: Setup) -> Runner:
    *_, fc = own_copy(setup).children()
    assert isinstance(fc, nn.Linear)
    return torch_runner(lambda x: avg_pool_linear(x, fc.weight, fc.bias), setup)


#: Without a convolution there is nothing to fuse: `fuse` leaves a head to torch, an engine calls
#: the op.
HEAD: Mapping[str, Build] = {"fused": eager, "cudnn": eager, "frozen": _head_op}


def _blocks(model: str, network: nn.Module, example: Tensor) -> dict[str, Layer]:
    found: dict[str, Layer] = {}
    for block, shape in _inputs(network, example, BasicBlock, Bottleneck):
        convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
        stride = max(max(conv.stride) for conv in convs)
        kind = "basic" if isinstance(block, BasicBlock) else "bottleneck"
        shortcut = "" if block.downsample is None else " projection"
        grouped = max(conv.groups for conv in convs)
        name = (
            f"{'x'.join(map(str, shape))} {kind} {convs[0].out_channels}"
            + (f" groups {grouped}" if grouped > 1 else "")
            + (f" stride {stride}" if stride > 1 else "")
            + shortcut
        )
        build = functools.partial(_real, block)
        layer = found.setdefault(name, Layer(build, shape, {model: 0}))
        layer.uses[model] += 1
    return found


def _real(block: nn.Module) -> nn.Module:
    """Return a meta block with weights drawn as its layers draw them."""
    twin = copy.deepcopy(block).to_empty(device="cpu")
    twin = twin.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in twin.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.reset_parameters()
    return twin


def _inputs(
    network: nn.Module, example: Tensor, *kinds: type[nn.Module]
) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Return the modules of some kinds with the shape, without the batch, of what they read."""
    found: list[tuple[nn.Module, tuple[int, ...]]] = []

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        found.append((module, tuple(args[0].shape[1:])))

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        network(example)
    for hook in hooks:
        hook.remove()
    return found
