"""Gradients that pass a block's ReLU where they are written, and who must not notice."""

from __future__ import annotations

import io

import pytest
import torch
from nets import bottlenecks as network
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.nn import block, pointwise
from resnet_fused.ops import _direct, _past_relu


def images(dtype: torch.dtype = torch.float32, size: int = 24) -> Tensor:
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Count how many gradients pass a block's ReLU in the convolution behind it.

    With a node of autograd for each op, as on a GPU, and every end one of them.
    """
    monkeypatch.setattr(block, "_may", lambda x: False)
    monkeypatch.setattr(pointwise, "faster_together", lambda *args: True)
    counted = [0]
    run = _direct.RUN["relu_conv_backward_data"]

    def counting(*args):
        counted[0] += 1
        return run(*args)

    monkeypatch.setitem(_direct.RUN, "relu_conv_backward_data", counting)
    return counted


def pieces(model: nn.Module, x: Tensor, between) -> dict[str, Tensor]:
    """A step in which ``between`` sees the output of a block before the next one reads it.

    Of what it returns, a tensor, the mean is a part of the loss.
    """
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = x
        for i, part in enumerate(model):
            y = part(y)
            if i == 4:
                beside = between(y)
    loss = y.float().square().mean()
    if beside is not None:
        loss = loss + beside.float().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def in_place(grad: Tensor) -> None:
    grad.mul_(3)


#: And how many gradients then pass a ReLU before they come to its block's end.
BETWEEN = {
    "nothing": (lambda y: None, 3),  # of the last block's result no convolution is behind
    "a hook": (lambda y: y.register_hook(lambda grad: grad * 3) and None, 2),
    "a hook that writes": (lambda y: y.register_hook(in_place) and None, 2),
    "a kept gradient": (lambda y: y.retain_grad(), 2),
    "a reader": (lambda y: y.sin() * 10, 3),
    "a reader of part": (lambda y: y[:, :5] * 10, 3),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_a_gradient_passes_the_relu_once(between, passes, monkeypatch):
    """Whoever has a look at it on its way, or adds to it, has what there is without."""
    model, x = rf.fuse(network()), images()
    look, count = BETWEEN[between]
    ours = pieces(model, x, look)
    assert passes == [count]
    monkeypatch.setattr(_past_relu, "wanted", lambda x: None)
    theirs = pieces(model, x, look)
    assert passes == [count]
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=2e-2, atol=2e-2 * float(grad.abs().max()))


def hooked(y: Tensor, loss: Tensor, parameters: list) -> Tensor:
    seen: list[Tensor] = []
    y.register_hook(seen.append)
    loss.backward()
    return seen[0]


def retained(y: Tensor, loss: Tensor, parameters: list) -> Tensor:
    y.retain_grad()
    loss.backward()
    return y.grad


def as_an_input(y: Tensor, loss: Tensor, parameters: list) -> Tensor:
    loss.backward(inputs=[y, *parameters])
    return y.grad


@pytest.mark.parametrize(
    "ask",
    [
        hooked,
        retained,
        as_an_input,
        lambda y, loss, parameters: torch.autograd.grad(loss, y)[0],
        lambda y, loss, parameters: torch.autograd.grad(loss, [*parameters, y])[-1],
        lambda y, loss, parameters: torch.autograd.grad(loss, [parameters[0], y])[-1],
    ],
)
def test_who_asks_for_the_gradient_of_a_block_s_result_gets_all_of_it(ask, passes, monkeypatch):
    """Also where the ReLU stopped the result, where it matters to nobody else."""
    found = []
    for wanted in (_past_relu.wanted, lambda x: None):
        monkeypatch.setattr(_past_relu, "wanted", wanted)
        model = rf.fuse(network())
        with torch.autocast("cpu", torch.bfloat16):
            y = model[:5](images())
            loss = model[5:](y).float().square().mean()
        found.append(ask(y, loss, list(model.parameters())))
        stopped = y <= 0
        assert found[-1][stopped].any()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["leaf", "written"])
def test_a_result_that_is_no_longer_the_relus_has_all_of_its_gradient(kind, passes, monkeypatch):
    """One of frozen blocks that became a leaf, and one that a prompt was added to in place."""
    found = []
    for wanted in (_past_relu.wanted, lambda x: None):
        monkeypatch.setattr(_past_relu, "wanted", wanted)
        model = rf.fuse(network())
        prompt = torch.zeros(1, 256, 1, 1, requires_grad=True)
        model[:5].requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            y = model[:5](images())
            if kind == "leaf":
                y.requires_grad_()
            else:
                y += prompt
            loss = model[5:](y).float().square().mean()
        loss.backward()
        found.append(y.grad if kind == "leaf" else prompt.grad)
    torch.testing.assert_close(*found)


def test_what_was_left_is_of_one_relu_and_one_gradient():
    y, grad, sums = torch.ones(2), torch.ones(2), torch.ones(1)
    token, other = _past_relu.want(y), _past_relu.want(torch.ones(2))
    assert _past_relu.sums_of(grad, token) is None
    _past_relu.leave(grad, token, sums)
    assert _past_relu.sums_of(grad, token) is _past_relu.sums_of(grad, None) is sums
    assert _past_relu.sums_of(grad, other) is None
    assert _past_relu.sums_of(grad * 1, token) is None
    sums.add_(1)
    assert _past_relu.sums_of(grad, token) is None
    _past_relu.leave(grad, token, sums)
    grad.add_(1)
    assert _past_relu.sums_of(grad, token) is _past_relu.sums_of(grad, None) is None
    file = io.BytesIO()
    torch.save(grad, file)
    file.seek(0)
    assert torch.equal(torch.load(file), grad)


def test_a_result_is_known_as_it_was():
    weight = torch.ones(2, requires_grad=True)
    y = weight.relu()
    assert _past_relu.wanted(y) is None
    token = _past_relu.want(y)
    assert _past_relu.wanted(y) == token
    assert _past_relu.wanted(y.detach()) is None
    y.add_(1)
    assert _past_relu.wanted(y) is None
    leaf = torch.ones(2)
    _past_relu.want(leaf)
    assert _past_relu.wanted(leaf.requires_grad_()) is None
