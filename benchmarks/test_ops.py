"""pytest-benchmark over the ops: ``pytest benchmarks --benchmark-only``, grouped by case.

The cases are the distinct convolutions of ResNet-50, read off the model. Every backend's answer
is held against float64 before it is timed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import resnet_fused as rf
from resnet_fused.models import create_model
from resnet_fused.ops import OPS
from resnet_fused.testing import to_float64, two_x_rule

BATCH = 8
DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = [backend.name for backend in rf.backends() if backend.available]


def _convolutions() -> dict[str, tuple[nn.Conv2d, tuple[int, ...]]]:
    """Return one convolution of ResNet-50 for each distinct geometry, with its input's shape."""
    found: dict[str, tuple[nn.Conv2d, tuple[int, ...]]] = {}

    def note(conv: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        n, c, h, w = args[0].shape
        name = f"{c}to{conv.out_channels}_k{conv.kernel_size[0]}s{conv.stride[0]}_{h}x{w}"
        found.setdefault(name, (conv, (n, c, h, w)))

    with torch.device("meta"):
        model = create_model("resnet50").eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        model(torch.empty(BATCH, 3, 224, 224))
    return found


CONVOLUTIONS = _convolutions()


def _draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def _measure(benchmark: Any, op: str, args: tuple[Any, ...], backend: str, reduced: int) -> None:
    call = getattr(torch.ops.resnet_fused, op)
    with torch.no_grad(), rf.use_backend(backend):
        try:
            result = call(*args)
        except RuntimeError as error:
            pytest.skip(str(error))
        oracle = OPS[op].reference(*map(to_float64, args))
        assert two_x_rule(result, OPS[op].reference(*args), oracle, reduced).ok
        benchmark(call, *args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_bn_act(benchmark: Any, name: str, dtype: torch.dtype, backend: str) -> None:
    conv, shape = CONVOLUTIONS[name]
    benchmark.group = f"conv_bn_act {name} {dtype} batch {BATCH}"
    o = conv.out_channels
    weight = _draw(*conv.weight.shape, dtype=dtype)
    args = (
        _draw(*shape, dtype=dtype), weight, _draw(o), _draw(o), None,
        list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups, "relu",
    )  # fmt: skip
    _measure(benchmark, "conv_bn_act", args, backend, weight[0].numel())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_bn_act_max_pool(benchmark: Any, dtype: torch.dtype, backend: str) -> None:
    benchmark.group = f"conv_bn_act_max_pool {dtype} batch {BATCH}"
    x, weight = _draw(BATCH, 3, 224, 224, dtype=dtype), _draw(64, 3, 7, 7, dtype=dtype)
    pairs = ((2, 2), (3, 3), (1, 1))
    args = (x, weight, _draw(64), _draw(64), *pairs, 1, "relu", (3, 3), (2, 2), (1, 1))
    _measure(benchmark, "conv_bn_act_max_pool", args, backend, weight[0].numel())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_avg_pool_linear(benchmark: Any, dtype: torch.dtype, backend: str) -> None:
    benchmark.group = f"avg_pool_linear {dtype} batch {BATCH}"
    x = _draw(BATCH, 2048, 7, 7, dtype=dtype)
    args = (x, _draw(1000, 2048, dtype=dtype), _draw(1000, dtype=dtype))
    _measure(benchmark, "avg_pool_linear", args, backend, x[0].numel())


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
