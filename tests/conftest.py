"""What all tests share: threads, seeds, the choice of backend, and the optional packages."""

import os
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import resnet_fused as rf
from resnet_fused.backends import _tuned, _tuned_file, cpu
from resnet_fused.testing import optional_import


def pytest_configure() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _automatic_backend(monkeypatch: pytest.MonkeyPatch):
    """Start every test with the backend chosen by call, whatever the test before asked for."""
    monkeypatch.delenv("RESNET_FUSED_BACKEND", raising=False)
    with rf.use_backend("auto"):
        yield


@pytest.fixture(autouse=True)
def _small_maps_train_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the maps of tests be worth the ops of training; `test_small_maps_train_as_torch` asks."""
    monkeypatch.setattr(sys.modules["resnet_fused.backends"], "_trains", {})
    worth = dict.fromkeys(cpu.FASTER_IN_TRAINING, 0)
    monkeypatch.setattr(cpu, "FASTER_IN_TRAINING", worth)


@pytest.fixture(autouse=True, scope="session")
def _nobodys_cache(tmp_path_factory: pytest.TempPathFactory):
    """Read no choices that were tuned on this machine outside of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _float32_is_not_tf32():
    """Have convolutions on a GPU multiply float32 as it is, which torch does only if it is asked.

    TF32 has tests of its own. By torch's older flag, as it does not read that one where the newer
    ones were used.
    """
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Give a test that tunes a cache directory of its own, and forget its choices afterwards."""
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_tuned_file, "_warned", set())
    _tuned.forget()
    yield tmp_path
    _tuned.forget()


def _package(name: str) -> ModuleType:
    try:
        return optional_import(name)
    except ModuleNotFoundError:
        pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    return _package("torchvision")


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    _package("torchvision")
    return _package("timm")


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    _package("torchvision")
    return _package("transformers")
