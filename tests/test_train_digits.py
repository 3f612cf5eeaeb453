"""A network learns: the paper's ResNet-20 on scikit-learn's digits, fused and unfused alike."""

import pytest
import torch

import resnet_fused as rf
from benchmarks import digits

EPOCHS, BATCH = 6, 64


@pytest.fixture(scope="module")
def images() -> digits.Digits:
    pytest.importorskip("sklearn.datasets")
    return digits.load()


@pytest.fixture(autouse=True)
def _one_thread():
    """Maps of 8x8 pixels are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["eager", "fused"])
def test_resnet20_learns_the_digits(kind, images):
    """98 of 100 right. Over four seeds eager had 98.6 to 99.2 where this was written (Zen 4)."""
    torch.manual_seed(0)
    model = rf.models.create_model("cifar_resnet20").train()
    if kind == "fused":
        model = rf.fuse(model)
    learner = digits.Learner(model, images, batch=BATCH, epochs=EPOCHS)
    for _ in range(EPOCHS):
        learner()
    assert learner.accuracy() >= 0.98
