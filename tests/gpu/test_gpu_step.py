"""capture_step on a real GPU: what the fake of tests/engine cannot show."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import SmallNet, image

import resnet_fused as rf
from resnet_fused.backends import cuda
from resnet_fused.models import create_model

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01, device="cuda"), capturable=True),
}


def batch(seed: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return image(8, 3, 32, 32).to(device), torch.randint(5, (8,)).to(device)


def training(model, optimizer):
    def step(x, target):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss

    return step


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
def test_captured_steps_are_eager_steps(device, backend, name, memory):
    """The losses and the state of as many eager steps: the warm-up has left nothing behind."""
    eager = rf.fuse(SmallNet().to(device).train(), memory=memory)
    model = copy.deepcopy(eager)
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in (eager, model)]
    with rf.use_backend(backend):
        plain, step = (training(m, o) for m, o in zip((eager, model), optimizers, strict=True))
        captured = rf.capture_step(step, *batch(0, device), model=model, optimizer=optimizers[1])
        for seed in range(5):
            x, target = batch(seed, device)
            torch.testing.assert_close(captured(x, target), plain(x, target).detach())
    for (key, value), expected in zip(
        model.state_dict().items(), eager.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, msg=key)
    # What eval() derives from parameters is that of now, though no op told torch they changed.
    with torch.no_grad():
        y, expected = (m.eval()(batch(9, device)[0]) for m in (model, eager))
    torch.testing.assert_close(y, expected)


def test_weights_are_cast_together(device):
    """Under autocast, each convolution's; the replays see what the optimizer made of them."""
    model = rf.fuse(create_model("resnet18").to(device, memory_format=torch.channels_last).train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(4, 3, 64, 64, device=device).to(memory_format=torch.channels_last)

    def step(x):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss

    with rf.use_backend("cuda"):
        captured = rf.capture_step(step, x, model=model, optimizer=optimizer)
    assert len(captured._casts._twins) == 20
    losses = [float(captured(x)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_an_older_loss_that_is_held_is_named(device):
    """Before anything is recorded: torch's allocator and the model are as they were."""
    model = SmallNet().to(device).train()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step = training(model, optimizer)
    loss = step(*batch(0, device))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="held, on another stream, by a result of an earlier"):
        rf.capture_step(step, *batch(0, device), model=model, optimizer=optimizer)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    del loss
    captured = rf.capture_step(step, *batch(0, device), model=model, optimizer=optimizer)
    assert captured(*batch(1, device)).isfinite()


def test_auto_captures_the_fused_step(device, monkeypatch):
    """Outside of a graph it runs torch's, as Python would take longer."""
    monkeypatch.setattr(cuda, "FASTER_IN_A_GRAPH", {torch.bfloat16: 0})
    if reason := cuda.available():
        pytest.skip(reason)
    ran = []
    stats = cuda.conv_bn_stats
    monkeypatch.setattr(cuda, "conv_bn_stats", lambda *args: ran.append(1) or stats(*args))
    model = rf.fuse(SmallNet().to(device).train())

    def step(x, target):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        return loss

    assert step(*batch(0, device)).isfinite()
    assert not ran
    captured = rf.capture_step(step, *batch(0, device), model=model)
    assert ran
    x, target = batch(1, device)
    torch.testing.assert_close(captured(x, target), step(x, target).detach(), rtol=0.02, atol=0.02)
