"""A network learns: the paper's ResNet-20 on scikit-learn's digits, fused and unfused alike."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused as rf

EPOCHS, BATCH, RATE, TESTED = 6, 64, 0.01, 360

Split = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Split:
    """1437 images of 8x8 pixels to learn from, 360 to be tested on."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    x = x.contiguous(memory_format=torch.channels_last)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    tested, learnt = order[:TESTED], order[TESTED:]
    x = (x - x[learnt].mean()) / x[learnt].std()
    y = torch.tensor(data.target)
    return x[learnt], y[learnt], x[tested], y[tested]


@pytest.fixture(autouse=True)
def _one_thread():
    """Maps of 8x8 pixels are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    steps = EPOCHS * (len(x) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.2
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x), generator=generator).split(BATCH)[: len(x) // BATCH]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("kind", ["eager", "fused"])
def test_resnet20_learns_the_digits(kind, digits):
    """98 of 100 right. Over four seeds eager had 98.6 to 99.2 where this was written (Zen 4)."""
    learnt, labels, tested, truth = digits
    torch.manual_seed(0)
    model = rf.models.create_model("cifar_resnet20").train()
    if kind == "fused":
        model = rf.fuse(model)
    train(model, learnt, labels)
    with torch.no_grad():
        right = (model.eval()(tested).argmax(1) == truth).double().mean()
    assert float(right) >= 0.98
