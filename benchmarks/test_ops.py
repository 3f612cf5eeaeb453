"""pytest-benchmark over the ops that no model calls in inference, backend by backend.

Every backend's answer is held against float64 before it is timed.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import resnet_fused as rf
from resnet_fused.bench import timing
from resnet_fused.ops import OPS
from resnet_fused.testing import to_float64, two_x_rule

BATCH = 8
DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = [backend.name for backend in rf.backends() if backend.available]


#: Backends that take no CUDA tensors.
ON_CPUS = ("cpu", "onednn")


def device_of(backend: str) -> str:
    """Return where a backend is measured: on a GPU where there is one, unless it takes none."""
    return "cuda" if torch.cuda.is_available() and backend not in ON_CPUS else "cpu"


def _draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def _measure(benchmark: Any, op: str, args: tuple[Any, ...], backend: str, reduced: int) -> None:
    call, device = getattr(torch.ops.resnet_fused, op), device_of(backend)
    args = tuple(arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args)
    with torch.no_grad(), rf.use_backend(backend):
        try:
            result = call(*args)
        except RuntimeError as error:
            pytest.skip(str(error))
        oracle = OPS[op].reference(*map(to_float64, args))
        assert two_x_rule(result, OPS[op].reference(*args), oracle, reduced).ok
        benchmark(timing.finished(functools.partial(call, *args), device))


MAPS = ((BATCH, 256, 56, 56), (BATCH, 2048, 7, 7))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_bn_apply(benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    benchmark.group = f"bn_apply {shape} {dtype}"
    x, residual = _draw(*shape, dtype=dtype), _draw(*shape, dtype=dtype)
    args = (x, _draw(shape[1]), _draw(shape[1]), residual, "relu")
    _measure(benchmark, "bn_apply", args, backend, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_add_relu(benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    benchmark.group = f"add_relu {shape} {dtype}"
    args = (_draw(*shape, dtype=dtype), _draw(*shape, dtype=dtype))
    _measure(benchmark, "add_relu", args, backend, 1)
