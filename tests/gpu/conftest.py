"""What needs a GPU: skipped, with the reason, where there is none; `make gpu-test` fails there."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "ops"))  # formulas
sys.path.append(str(Path(__file__).parents[1] / "backends/triton"))  # paths


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def other_device(device) -> torch.device:
    """A GPU that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    return torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
