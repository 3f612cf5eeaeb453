"""A block in training as one node of autograd: the same bits as with a node for each op."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resnet_fused as rf
from resnet_fused.backends import _cpu_block, cpu, native
from resnet_fused.models import create_model
from resnet_fused.nn import block, identity

pytestmark = pytest.mark.skipif(
    cpu.available() is not None, reason="nothing of ours trains on this CPU"
)


@pytest.fixture(autouse=True)
def _by_our_kernels():
    with rf.use_backend("cpu"):
        yield


@pytest.fixture
def apart(monkeypatch):
    """Return what makes every op a node of its own again."""
    return lambda: monkeypatch.setattr(block, "_may", lambda x: False)


def network(name: str = "cifar_resnet20", memory: str = "default") -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name).to(memory_format=torch.channels_last).train()
    return rf.fuse(model, memory=memory)


def images(size: int = 16) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


def stage() -> nn.Sequential:
    """Return two blocks, the first with a projection, and nothing else."""
    return network("resnet18").layer2


def nodes(y: Tensor) -> list[object]:
    """Return every node behind ``y`` but those of parameters."""
    found, todo = {}, [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found and "Accumulate" not in type(node).__name__:
            found[node] = True
            todo += [before for before, _ in node.next_functions]
    return list(found)


def is_one(node: object) -> bool:
    return type(node).__name__ in ("NodeBackward", "_IdentityBackward")


def bottleneck(memory: str = "default") -> nn.Module:
    """Return a block with an identity shortcut, all of whose kernels are native."""
    return network("resnet50", memory).layer1[1]


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(4, 256, 14, 14, generator=torch.Generator().manual_seed(2)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def is_planned(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_IdentityBackward"


@pytest.fixture
def taped(monkeypatch):
    """Return what makes blocks nodes of several ops again."""
    return lambda: monkeypatch.setattr(identity, "node", lambda *args: None)


def step(model: nn.Module, x: Tensor, *, bf16: bool = False) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = model(x)
    y.float().square().mean().backward()
    grads = [torch.zeros(0) if p.grad is None else p.grad for p in model.parameters()]
    return [y.detach(), *grads, *model.buffers()]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet50"])
def test_it_gives_the_same_bits(name, memory, bf16, apart):
    model, x = network(name, memory), images(64 if name == "resnet50" else 16)
    other = copy.deepcopy(model)
    once = step(model, x, bf16=bf16)
    apart()
    for got, expected in zip(once, step(other, x, bf16=bf16), strict=True):
        assert torch.equal(got, expected)


def test_a_block_is_one_node():
    y = stage()(torch.randn(2, 64, 8, 8, requires_grad=True))
    assert [is_one(node) for node in nodes(y)] == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory", ["default", "low"])
def test_a_plan_gives_the_same_bits(memory, dtype, taped):
    if reason := cpu.declines(torch.empty(0, dtype=dtype)):
        pytest.skip(reason)
    model = bottleneck(memory)
    other, x = copy.deepcopy(model), batch(dtype)
    z = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = model(x)
        assert is_planned(y)
        taped()
        expected = other(z)
    assert is_one(expected.grad_fn)
    assert not is_planned(expected)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, z.grad)
    for got, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(got.grad, wanted.grad)
    for got, wanted in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "what",
    ["nchw", "frozen", "no grad of x", "no affine", "gamma in bf16", "weight apart", "shared"],
)
def test_what_has_no_plan_is_right(what, apart):
    model, x = bottleneck(), batch()
    if what == "nchw":
        x = x.detach().contiguous().requires_grad_()
    elif what == "frozen":
        model.bn2.bias.requires_grad_(False)
    elif what == "no grad of x":
        x = x.detach()
    elif what == "no affine":
        model.bn1 = nn.BatchNorm2d(64, affine=False)
    elif what == "gamma in bf16":
        model.bn3.weight = nn.Parameter(model.bn3.weight.detach().to(torch.bfloat16))
        model, x = model.to(torch.bfloat16), batch(torch.bfloat16)
    elif what == "weight apart":
        model.conv1.weight = nn.Parameter(torch.randn(64, 512, 1, 1)[:, ::2])
    else:
        model.bn2 = model.bn1
    if what == "gamma in bf16" and cpu.declines(x):
        pytest.skip("no bfloat16 on this processor")
    other, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    assert is_planned(model(x)) == (what == "shared")
    model.load_state_dict(before)
    once = step(model, x)
    apart()
    for got, expected in zip(once, step(other, x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["conv1.weight", "conv3.weight", "bn2.weight", "bn3.bias"])
def test_parameters_that_do_not_fit_are_refused(name):
    model = bottleneck()
    owner, _, kind = name.rpartition(".")
    own = getattr(model.get_submodule(owner), kind)
    wrong = torch.ones(len(own), 8, 1, 1) if own.dim() == 4 else torch.ones(len(own) // 2)
    setattr(model.get_submodule(owner), kind, nn.Parameter(wrong))
    with pytest.raises((ValueError, RuntimeError)):
        model(batch())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite(value, taped):
    """Winograd's transform would spread it over taps that torch keeps clean."""
    model, x = bottleneck(), batch()
    other, z = copy.deepcopy(model), x.detach().clone().requires_grad_()
    grad = torch.randn(4, 256, 14, 14)
    grad[0, 3, 0, 0] = value
    y = model(x)
    assert is_planned(y)
    y.backward(grad)
    taped()
    other(z).backward(grad)
    torch.testing.assert_close(x.grad, z.grad, rtol=0, atol=0, equal_nan=True)
    for got, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=0, atol=0, equal_nan=True)


def test_a_plan_is_made_again_for_other_threads_and_instructions(monkeypatch):
    monkeypatch.setattr(_cpu_block, "_plans", {})
    model, x = bottleneck(), batch()
    isa, threads = native.loaded().cpu_isa(), torch.get_num_threads()
    try:
        model(x)
        torch.set_num_threads(1)
        model(x)
        native.loaded().set_cpu_isa("avx2")
        model(x)
        model(x)
    finally:
        native.loaded().set_cpu_isa(isa)
        torch.set_num_threads(threads)
    assert len(_cpu_block._plans) == 1 + (threads > 1) + (isa != "avx2")
    monkeypatch.setattr(_cpu_block, "_MOST", 1)
    model(torch.cat([x.detach(), x.detach()]).requires_grad_())
    assert len(_cpu_block._plans) == 1


def test_a_plan_only_where_every_op_is_the_cpus(monkeypatch):
    model, x = bottleneck(), batch()
    with rf.use_backend("auto"):
        assert is_planned(model(x))
        monkeypatch.setattr(block.identity, "is_all_native", lambda: False)
        assert not is_planned(model(x))
    with rf.use_backend("reference"):
        assert not is_planned(model(x))


def test_a_plan_refuses_double_backward():
    model, x = bottleneck(), batch()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("what", ["hook", "bias", "grad", "weight"])
def test_what_is_not_one_node(what):
    model, x = stage(), torch.randn(2, 64, 8, 8)
    seen = []
    conv = model[0].conv1
    if what == "hook":
        conv.register_forward_hook(lambda *_: seen.append(1))
    elif what == "bias":
        conv.bias = nn.Parameter(torch.zeros(conv.out_channels))
    elif what == "grad":
        model.requires_grad_(False)
    else:
        conv.weight = nn.Parameter(conv.weight.detach().to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "weight"):
        y = model[0](x)
    assert not any(map(is_one, nodes(y)))
    assert bool(seen) == (what == "hook")


def test_under_a_profiler_each_op_is_seen():
    with torch.profiler.profile() as profile:
        y = stage()(torch.randn(2, 64, 8, 8))
    assert not any(map(is_one, nodes(y)))
    names = {event.name for event in profile.events()}
    assert {"resnet_fused::conv_bn_stats", "resnet_fused::dual_bn_act"} <= names


@pytest.mark.parametrize("frozen", ["conv1", "bn2", "downsample", "bn1.bias", ""])
def test_only_the_needed_gradients(frozen, apart):
    model, x = stage(), torch.randn(2, 64, 8, 8, requires_grad=not frozen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and frozen in name))
    other = copy.deepcopy(model)
    once = step(model, x)
    apart()
    for got, expected in zip(once, step(other, x), strict=True):
        assert torch.equal(got, expected)


def test_a_parameter_used_twice(apart):
    model = stage()
    model[1].conv2.weight = model[1].conv1.weight
    model[1].bn2 = model[1].bn1
    other, x = copy.deepcopy(model), torch.randn(2, 64, 8, 8)
    once = step(model, x)
    apart()
    for got, expected in zip(once, step(other, x), strict=True):
        torch.testing.assert_close(got, expected)


def test_backward_twice_and_in_two_threads():
    model, x = stage(), torch.randn(2, 64, 8, 8, requires_grad=True)
    y = model(x)
    grad = torch.randn_like(y)
    wanted = [x, *model.parameters()]
    first = torch.autograd.grad(y, wanted, grad, retain_graph=True)
    found: list[tuple[Tensor, ...]] = []

    def again():
        found.append(torch.autograd.grad(y, wanted, grad, retain_graph=True))

    threads = [threading.Thread(target=again) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for grads in found:
        assert all(map(torch.equal, first, grads))


def test_a_freed_graph_and_double_backward_are_refused():
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(stage()(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()
    y = stage()(x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_a_weight_written_before_backward_is_noticed():
    model = stage()
    y = model(torch.randn(2, 64, 8, 8)).sum()
    with torch.no_grad():
        model[1].conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(memory, reentrant):
    model = network("resnet18", memory).layer2
    other, x = copy.deepcopy(model), torch.randn(2, 64, 8, 8, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    model(x).square().sum().backward()
    checkpoint(other, z, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, z.grad)
    for got, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad)


def test_after_an_error_ops_are_nodes_again():
    model = stage()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 64, 1, 1))
    model[0].bn2.weight = nn.Parameter(torch.ones(128, dtype=torch.float64))
    with pytest.raises(TypeError, match="weight must be"):
        model(torch.randn(2, 64, 8, 8))
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    weight = torch.randn(4, 64, 1, 1)
    rf.functional.conv_bn_stats(x, weight)[0].sum().backward()
    assert x.grad is not None
