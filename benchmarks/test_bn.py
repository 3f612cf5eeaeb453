"""pytest-benchmark over BatchNorm's CPU kernels, beside eager torch and a copy of the same bytes.

The kernels' answers are held against float64 before they are timed.
``pytest benchmarks/test_bn.py --benchmark-only``; the maps are those of ResNet-50's stages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends import _training_kernels as kernels
from resnet_fused.backends import cpu
from resnet_fused.testing import two_x_rule

BATCH = 8
SHAPES = (
    (BATCH, 64, 112, 112), (BATCH, 256, 56, 56), (BATCH, 128, 28, 28), (BATCH, 512, 28, 28),
    (BATCH, 1024, 14, 14), (BATCH, 2048, 7, 7),
)  # fmt: skip
pytestmark = pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))


def _cases(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return, by what is done, who does it: on the same values in every dtype."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw() -> Tensor:
        x = torch.randn(shape, generator=generator).bfloat16().to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    x, residual, grad, y, out = draw(), draw(), draw(), draw().relu_(), draw()
    scale, shift, mean = torch.randn(3, shape[1], generator=generator).to(wide)
    invstd = torch.rand(shape[1], generator=generator).to(wide) + 0.5
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)

    def normalise() -> Tensor:
        return F.batch_norm(x, zeros, ones, scale, shift, eps=0.0)

    def eager_backward() -> Any:
        masked = torch.ops.aten.threshold_backward(grad, y, 0)
        return torch.ops.aten.native_batch_norm_backward(
            masked, x, scale, None, None, mean, invstd, True, 1e-5, [True, True, True]
        )

    def backward() -> Tensor:
        sum_g, sum_gx = kernels.bn_act_backward_reduce(grad, x, mean, y=y, masked=out)
        n, a = x[:, 0].numel(), scale * invstd
        b = -a * invstd**2 * sum_gx / n
        d = -a * sum_g / n - b * mean
        return kernels.bn_act_backward_apply(out, x, a, b, d, relu=False)

    return {
        "bn_stats": {
            "kernel": lambda: kernels.bn_stats(x),
            "eager": lambda: torch.batch_norm_update_stats(x, None, None, 0.1),
        },
        "bn_act": {
            "kernel": lambda: kernels.bn_act(x, scale, shift, out=out),
            "eager": lambda: torch.relu(normalise()),
            "copy": lambda: out.copy_(x),
        },
        "bn_act with residual": {
            "kernel": lambda: kernels.bn_act(x, scale, shift, residual, out=out),
            "eager": lambda: torch.relu(normalise() + residual),
            "copy": lambda: torch.add(x, residual, out=out),
        },
        "backward": {"kernel": backward, "eager": eager_backward},
    }


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize("who", ["kernel", "eager", "copy"])
@pytest.mark.parametrize("what", ["bn_stats", "bn_act", "bn_act with residual", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bn(
    benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype, what: str, who: str
) -> None:
    benchmark.group = f"{what} {shape} {dtype}"
    calls = _cases(shape, dtype)[what]
    if who not in calls:
        pytest.skip(f"{who} is no contender here")
    if who == "kernel":
        oracle = _first(_cases(shape, torch.float64)[what]["eager"]())
        rows = shape[0] * shape[2] * shape[3]
        assert two_x_rule(_first(calls["kernel"]()), _first(calls["eager"]()), oracle, rows).ok
    benchmark(calls[who])
