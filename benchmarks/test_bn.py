"""pytest-benchmark over BatchNorm's CPU kernels, beside eager torch, Inductor and a copy.

The kernels' answers are held against float64 before they are timed.
``pytest benchmarks/test_bn.py --benchmark-only``; ``python -m benchmarks bn`` interleaves them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import bn
from resnet_fused.backends import cpu

BATCH = 8
pytestmark = pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))


@pytest.mark.parametrize("who", [bn.KERNEL, bn.EAGER, bn.INDUCTOR, bn.COPY])
@pytest.mark.parametrize("what", bn.PASSES)
@pytest.mark.parametrize("dtype", bn.DTYPES, ids=str)
@pytest.mark.parametrize("shape", bn.SHAPES, ids=str)
def test_bn(
    benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype, what: str, who: str
) -> None:
    benchmark.group = f"{what} {shape} {dtype}"
    calls = bn.calls((BATCH, *shape), dtype, what)
    if who not in calls:
        pytest.skip(f"{who} is no contender here")
    if who == bn.KERNEL:
        bn.check((BATCH, *shape), dtype, what)
    benchmark(calls[who])
