"""The global average pool of a fused model in training: torch's values, gradients channels_last."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import ConvBnRelu, Residual, image
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_full_backward_hook,
)

import resnet_fused as rf
from resnet_fused.models import create_model
from resnet_fused.nn import train

X = image(4, 3, 32, 32)


def net(pool: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    pool = pool or nn.AdaptiveAvgPool2d(1)
    body = ConvBnRelu(3, 8), Residual(8, 16, 2), Residual(16, 16)
    return nn.Sequential(*body, pool, nn.Flatten(), nn.Linear(16, 5)).train()


def a_map(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = image(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


def is_ours(module: nn.Module, x: Tensor) -> bool:
    """Whether ``module`` of x is differentiated as a fused model does; its value is torch's."""
    y, expected = train.pool(module, x), module(x)
    assert torch.equal(y, expected)
    ours, torchs = type(y.grad_fn).__name__, type(expected.grad_fn).__name__
    assert ours in ("_AveragedBackward", torchs)
    return ours != torchs


@pytest.mark.parametrize("size", [1, (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 16, 7, 7), (3, 5, 4, 6), (1, 40, 3, 1)])
def test_values_and_gradients_are_torchs_bit_for_bit(shape, dtype, size):
    pool, x = nn.AdaptiveAvgPool2d(size), a_map(*shape, dtype=dtype)
    ours, torchs = train.pool(pool, x), pool(x)
    assert torch.equal(ours, torchs)
    assert ours.stride() == torchs.stride()
    assert type(ours.grad_fn).__name__ == "_AveragedBackward"
    seed = image(*ours.shape, dtype=dtype)
    (ours,), (torchs,) = (torch.autograd.grad(y, x, seed) for y in (ours, torchs))
    assert torch.equal(ours, torchs)
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_models_last_map_has_its_gradient_in_channels_last(name, autocast, memory):
    model = rf.fuse(create_model(name, num_classes=4).train(), memory=memory)
    apart = copy.deepcopy(model)
    apart.avgpool.register_forward_hook(lambda *_: None)  # torch's own
    found = []

    def watch(_, __, y: Tensor) -> None:
        y.register_hook(found.append)

    for m in (model, apart):
        m.layer4.register_forward_hook(watch)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = m(image(2, 3, 64, 64))
        result.float().square().sum().backward()
    ours, torchs = found
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert not torchs.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, torchs)
    assert ours.dtype == torchs.dtype
    for a, b in zip(model.parameters(), apart.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_what_is_torchs_stays_torchs():
    pool, x = nn.AdaptiveAvgPool2d(1), a_map(2, 8, 4, 4)
    assert is_ours(pool, x)
    assert not is_ours(copy.deepcopy(pool).eval(), x)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not is_ours(pool, x)
    for other in (x.detach(), x.contiguous(), x[0], a_map(2, 8, 1, 1), a_map(0, 8, 2, 2)):
        assert not is_ours(pool, other)
    for other in (nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d((1, None)), nn.AvgPool2d(4)):
        assert not is_ours(other, x)

    class Doubled(nn.AdaptiveAvgPool2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert not is_ours(Doubled(1), x)


def test_hooks_on_the_pool_fire():
    fused, seen = rf.fuse(net()), []
    expected = torch.autograd.grad(fused(X).sum(), fused[0][0].weight)
    fused[3].register_forward_pre_hook(lambda *_: seen.append("before"))
    fused[3].register_forward_hook(lambda *_: seen.append("after"))
    fused[3].register_full_backward_hook(lambda *_: seen.append("backward"))
    found = torch.autograd.grad(fused(X).sum(), fused[0][0].weight)
    assert seen == ["before", "after", "backward"]
    assert torch.equal(found[0], expected[0])


def test_hooks_on_all_modules_see_the_pool():
    fused, seen = rf.fuse(net()), []
    handles = [
        register_module_forward_hook(lambda m, *_: seen.append(("after", type(m)))),
        register_module_full_backward_hook(lambda m, *_: seen.append(("backward", type(m)))),
    ]
    try:
        fused(X).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert {("after", nn.AdaptiveAvgPool2d), ("backward", nn.AdaptiveAvgPool2d)} <= set(seen)


def test_a_map_that_others_read_too():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pool = net()[:3], nn.AdaptiveAvgPool2d(1)
            self.conv, self.bn = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.pool(x).sum() + self.bn(self.conv(x)).square().mean((0, 2, 3))[0]

    model = Net().train()
    fused = rf.fuse(model)
    for m in (model, fused):
        m(X).backward()
    for a, b in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_double_backward_through_the_pool():
    pool, x = nn.AdaptiveAvgPool2d(1), a_map(2, 3, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: train.pool(pool, x).square(), x)
    assert torch.autograd.gradgradcheck(lambda x: train.pool(pool, x).square(), x)


def test_compiled_without_a_break():
    torch._dynamo.reset()
    model = net()
    fused = rf.fuse(model)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for m in (compiled, model):
        m(X).square().mean().backward()
    for a, b in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_traced_by_torch_jit():
    fused = rf.fuse(net())
    with rf.use_backend("reference"):
        traced = torch.jit.trace(fused, X, check_trace=False)
        a, b = (F.mse_loss(m(X), torch.ones(4, 5)) for m in (traced, fused))
    torch.testing.assert_close(a, b)
