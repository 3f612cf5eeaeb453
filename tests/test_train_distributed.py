"""Fused training on two gloo processes beside one process with the joined batch.

The processes are started once and run every case of ``two_processes.py``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from torch import Tensor

import resnet_fused as rf
from resnet_fused.testing import max_error

#: Seconds for all cases together. They take about eight; a process that waits for the other for
#: ever would stay.
LIMIT = 120

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("processes")
    # The package under test, wherever it was imported from.
    paths = os.pathsep.join([str(Path(rf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, two_processes.__file__, str(rank), str(folder)],
            env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(two_processes.WORLD)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=LIMIT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(two_processes.WORLD)]


def case(found: list, name: str) -> list[dict[str, Tensor]]:
    results = [results[name] for results in found]
    words = [r for r in results if isinstance(r, str)]
    assert not words, words[0]
    return results


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        # A bias in front of BatchNorm has no gradient but what rounding leaves.
        scale = 1.0 if name.endswith("conv1.bias") else max(float(expected.abs().max()), 1e-12)
        assert max_error(ours[name], expected) <= tolerance * scale, name


def joined(dtype: torch.dtype) -> dict[str, Tensor]:
    model = two_processes.net(dtype)
    two_processes.loss(model, two_processes.batch(dtype)).backward()
    return two_processes.state(model)


@pytest.mark.parametrize("name", [
    "sync_before_fuse", "sync_after_fuse", "sync_low_memory", "sync_float64", "sync_empty_part",
    "sync_empty_part_by_name", "sync_empty_first_part_by_name",
])  # fmt: skip
def test_synchronised_batch_norm_is_that_of_the_joined_batch(found, name):
    dtype = torch.float64 if name == "sync_float64" else torch.float32
    expected = joined(dtype)
    for result in case(found, name):
        assert_near(result, expected, 1e-10 if dtype == torch.float64 else 1e-3)


def test_low_memory_gives_the_same_bits(found):
    pairs = zip(case(found, "sync_before_fuse"), case(found, "sync_low_memory"), strict=True)
    for default, low in pairs:
        assert all(torch.equal(default[name], low[name]) for name in default)


def test_means_far_larger_than_deviations(found):
    """In float64 the variance is as good as that of one process, and the same in both."""
    x = two_processes.batch(torch.float64) + 1e8
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    for result in case(found, "sync_large_means"):
        for name in ("uneven", "empty"):
            torch.testing.assert_close(result[f"{name} mean"], mean, rtol=1e-14, atol=0)
            torch.testing.assert_close(result[f"{name} var"], var, rtol=1e-7, atol=0)
    zero, one = case(found, "sync_large_means")
    assert all(torch.equal(zero[name], one[name]) for name in zero)


def test_one_collective_forward_and_one_backward(found):
    """Of eight BatchNorms; two share the block's end with a projection, and its sums."""
    for result in case(found, "sync_calls"):
        assert result["calls"].tolist() == [8, 7]


def test_one_value_per_channel_in_each_process(found):
    zero, one = (result["y"] for result in case(found, "sync_one_value_each"))
    torch.testing.assert_close(zero, -one)
    torch.testing.assert_close(one.abs(), torch.ones(3), rtol=1e-3, atol=0)


def test_data_parallel(found):
    """Each process normalises by its own part, as with eager modules."""
    for ours, eager in zip(case(found, "ddp_fused"), case(found, "ddp_eager"), strict=True):
        assert_near(ours, eager, 1e-3)


@pytest.mark.parametrize("name", ["fsdp", "fsdp_low_memory"])
def test_fully_sharded(found, name):
    """Parameters, their memory let go and filled again, train and infer as without."""
    for ours, plain in zip(case(found, name), case(found, "fsdp_plain"), strict=True):
        assert_near(ours, plain, 1e-3)
