"""Block ends as one op on a real GPU: gradients, repeatability, and a captured step."""

import copy

import pytest
import torch
from nets import bottlenecks
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.nn import pointwise
from resnet_fused.ops import _direct
from resnet_fused.testing import gradient_metrics

OP = pointwise.OP


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


def images(device, seed: int = 1) -> Tensor:
    x = torch.randn(16, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
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


def test_the_same_bits_again(device):
    model, x = rf.fuse(bottlenecks().to(device)), images(device)
    runs = [step(copy.deepcopy(model), x, torch.bfloat16) for _ in range(2)]
    for name, grad in runs[0].items():
        if "conv2" not in name and name != "0.weight":  # cuDNN's, of which not all repeat
            torch.testing.assert_close(grad, runs[1][name], rtol=1e-2, atol=1e-2)


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
