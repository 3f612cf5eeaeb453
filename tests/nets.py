"""Small networks and the comparisons that the tests of ``fuse`` share."""

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_fused.models import create_model
from resnet_fused.testing import max_error, to_float64, two_x_rule


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch as a network sees one after normalisation."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def calibrate(model: nn.Module, x: Tensor) -> nn.Module:
    """Set the running statistics to those of ``x``, as after training; return ``model`` in eval."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = None
        if norm.running_mean is not None:
            norm.reset_running_stats()
        if norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    model.train()
    with torch.no_grad():
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def tensors(outputs) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def assert_close(value, eager, oracle, reduced: int) -> None:
    """Hold each tensor of ``value`` to the 2x rule, and to eager's shape and dtype."""
    values, eagers, oracles = tensors(value), tensors(eager), tensors(oracle)
    assert len(values) == len(eagers) == len(oracles) > 0
    for v, e, o in zip(values, eagers, oracles, strict=True):
        assert (v.shape, v.dtype) == (e.shape, e.dtype)
        check = two_x_rule(v, e, o, reduced)
        assert check.ok, check


def assert_same_model(fused: nn.Module, model: nn.Module, *args: Tensor, reduced: int) -> None:
    """Hold ``fused`` on ``args`` to the 2x rule beside ``model``, an eager model in eval mode.

    A deep network makes much of each rounding, so eager's error is the larger of its two layouts';
    in float64, where eager is the oracle, it is that of float32, scaled.
    """
    with torch.no_grad():
        values, eagers = tensors(fused(*args)), tensors(model(*args))
        oracles = tensors(copy.deepcopy(model).double()(*to_float64(args)))
        ratio = 1.0
        if args[0].dtype == torch.float64:
            ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            model, args = copy.deepcopy(model).float(), tuple(a.float() for a in args)
        others = [
            tensors(model(*(a.contiguous(memory_format=layout) for a in args)))
            for layout in (torch.contiguous_format, torch.channels_last)
        ]
    assert len(values) == len(eagers) > 0
    for v, e, o, *rivals in zip(values, eagers, oracles, *others, strict=True):
        assert (v.shape, v.dtype) == (e.shape, e.dtype)
        allowed = ratio * max(two_x_rule(r, r, o, reduced).allowed for r in rivals)
        assert max_error(v, o) <= allowed, f"{max_error(v, o):.3g}, allowed {allowed:.3g}"


class ConvBnRelu(nn.Sequential):
    def __init__(self, channels: int, out: int, kernel: int = 3, **options) -> None:
        conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False, **options)
        super().__init__(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """A basic block with a projection, as torchvision writes it."""

    def __init__(self, channels: int = 8, out: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class SmallNet(nn.Module):
    """Stem, two blocks, head: every pattern of a ResNet in a tenth of a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Residual(), Residual(8, 16, 2))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        return self.fc(torch.flatten(x.mean((2, 3)), 1))


def small_net() -> nn.Module:
    return calibrate(SmallNet(), image(4, 3, 32, 32))


class Ops(TorchDispatchMode):
    """Counts the package's ops by name, in :attr:`found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("resnet_fused::"):
            self.found[name.removeprefix("resnet_fused::")] += 1
        return func(*args, **(kwargs or {}))


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.resnet_fused.conv_bn_act.default
        return func(*args, **(kwargs or {}))


def fused_calls(model: nn.Module, *args: Tensor) -> int:
    """How many fused ops one forward runs."""
    with torch.no_grad(), _Counter() as counter:
        model(*args)
    return counter.calls


def bottlenecks() -> nn.Module:
    """Return a stem and two stages of bottlenecks, three of them with an identity shortcut."""
    torch.manual_seed(0)
    whole = create_model("resnet50")
    parts = [*whole.layer1[:2], *whole.layer2[:3]]
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), *parts)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return model.to(memory_format=torch.channels_last).train()
