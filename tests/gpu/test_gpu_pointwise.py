"""Block ends as one op on a real GPU: covariances, gradients, repeatability, a captured step."""

import copy

import pytest
import torch
from nets import bottlenecks
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.backends import triton
from resnet_fused.nn import pointwise
from resnet_fused.ops import _direct
from resnet_fused.testing import gradient_metrics

OP = pointwise.OP
#: Inputs of 1x1 ends in ResNet-50 at batch 256.
SHAPES = [(256, 64, 56, 56), (256, 256, 14, 14), (256, 512, 7, 7)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def ran(monkeypatch) -> list[int]:
    """Have every end that fits be one op, by the fastest kernels known; count them."""
    monkeypatch.setattr(pointwise, "faster_together", lambda *args: True)
    monkeypatch.setattr("resnet_fused.nn.train.trains", lambda *args: True)
    counted, run = [0], _direct.RUN[f"{OP}_backward"]

    def counting(*args):
        counted[0] += 1
        return run(*args)

    monkeypatch.setitem(_direct.RUN, f"{OP}_backward", counting)
    return counted


def images(device, seed: int = 1, size: int = 28) -> Tensor:
    x = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x.to(device, memory_format=torch.channels_last)


def step(model: nn.Module, x: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        y = model(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    y.backward(grad)
    return {name: p.grad.double() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_as_near_as_torchs(device, dtype, ran):
    model, x = bottlenecks().to(device), images(device)
    exact = copy.deepcopy(model).double()
    ours, eager = step(rf.fuse(model), x, dtype), step(model, x, dtype)
    oracle = step(exact, x.double(), None)
    assert ran == [5]
    far = [
        sum(1 - gradient_metrics(g[name], oracle[name]).cosine for name in oracle)
        for g in (ours, eager)
    ]
    assert far[0] <= 1.5 * far[1]


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_the_same_bits_again(device, backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model, x = rf.fuse(bottlenecks().to(device)), images(device, size=56)
    with rf.use_backend(backend):
        first, *others = (step(copy.deepcopy(model), x, torch.bfloat16) for _ in range(4))
    for again in others:
        for name, grad in first.items():
            assert torch.equal(grad, again[name]), name


def test_gradients_that_pass_the_relu_in_triton_s_kernel(device, monkeypatch, ran):
    """By name, in a backward whose first stage is as large as ResNet-50's."""
    passed, run = [], triton.relu_conv_backward_data
    monkeypatch.setattr(
        triton, "relu_conv_backward_data", lambda *args: passed.append(1) or run(*args)
    )
    model, x = bottlenecks().to(device), images(device, size=56)
    exact = copy.deepcopy(model).double()
    with rf.use_backend("triton"):
        ours = step(rf.fuse(model), x, torch.bfloat16)
    assert (len(passed), ran) == (3, [5])
    eager, oracle = step(model, x, torch.bfloat16), step(exact, x.double(), None)
    far = [
        sum(1 - gradient_metrics(g[name], oracle[name]).cosine for name in oracle)
        for g in (ours, eager)
    ]
    assert far[0] <= 1.5 * far[1]


def channels_last(*shape: int, device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, device=device)
    return drawn.bfloat16().contiguous(memory_format=torch.channels_last)


def pixels(x: Tensor) -> Tensor:
    """Pixels by channels, in float64."""
    return x.permute(0, 2, 3, 1).flatten(0, 2).double()


@each_shape
@pytest.mark.parametrize("offset", [0, 1, 10])
def test_covariances_of_real_maps(shape, offset, device):
    """At every run the same, and right to what float32 keeps of the sums, means far off too.

    In 16 bits: with many steps the copies of later pixels run beside the products, and the tensor
    core's sums are cut off.
    """
    x = channels_last(*shape, device=device, seed=0) + offset
    with rf.use_backend("triton"):
        mean, cov = torch.ops.resnet_fused.channel_covariance(x)
        for _ in range(50):
            again = torch.ops.resnet_fused.channel_covariance(x)
            assert torch.equal(again[0], mean)
            assert torch.equal(again[1], cov)
    rows = pixels(x)
    exact = torch.cov(rows.t(), correction=0)
    size = rows.square().mean(0).sqrt()
    assert torch.equal(cov, cov.t())
    assert ((mean - rows.mean(0)).abs() <= 2**-20 * size).all()
    assert ((cov - exact).abs() <= 2**-20 * size.outer(size)).all()


@each_shape
def test_the_gradient_past_a_relu_of_real_maps(shape, device):
    """What comes into a block behind another, whose first convolution is 1x1."""
    n, c, *size = shape
    wide = 4 * c
    grad = channels_last(n, c, *size, device=device, seed=1)
    x = channels_last(n, wide, *size, device=device, seed=2).relu()
    residual = channels_last(n, wide, *size, device=device, seed=3)
    weight = channels_last(c, wide, 1, 1, device=device, seed=4) / 16
    args = (grad, weight, x, (1, 1), (0, 0), (1, 1), 1, residual)
    with rf.use_backend("triton"):
        g, sums = torch.ops.resnet_fused.relu_conv_backward_data(*args)
        for _ in range(20):
            again = torch.ops.resnet_fused.relu_conv_backward_data(*args)
            assert torch.equal(again[0], g)
            assert torch.equal(again[1], sums)
    eps, few = torch.finfo(torch.bfloat16).eps, slice(0, 16)  # float64 maps are large
    exact = pixels(grad[few]) @ weight.flatten(1).double() + pixels(residual[few])
    exact *= pixels(x[few]) > 0
    assert ((pixels(g[few]) - exact).abs() <= eps * exact.abs() + 1e-4).all()
    summed = torch.stack([pixels(part).sum(0) for part in g.split(16)]).sum(0)
    torch.testing.assert_close(sums.double(), summed, rtol=1e-5, atol=1e-7 * len(g) * size[0] ** 2)


def test_a_captured_step(device, ran):
    model = rf.fuse(bottlenecks().to(device))
    plain = copy.deepcopy(model)
    x = images(device)
    losses = []
    for each in (plain, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01, momentum=0.9)

        def training(x, each=each, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = each(x).float().square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        run = training
        if each is model:
            run = rf.capture_step(training, x, model=model, optimizer=optimizer)
        losses.append(torch.stack([run(images(device, seed)) for seed in range(6)]))
    assert ran[0] >= 5 * 6
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=1e-3)
