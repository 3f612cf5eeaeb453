"""What the device reaches at its best, measured in the run itself: the roof of its roofline."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from resnet_fused.bench import timing
from resnet_fused.bench.measure import precision
from resnet_fused.bench.options import PRECISIONS
from resnet_fused.bench.progress import Watch
from resnet_fused.convert import fuse
from resnet_fused.flops import meta_copy
from resnet_fused.roofline import Device, Schedule, roofline

#: Rows of the square matrices, and bytes of the copy: far more than any cache holds.
MATRIX = {"cpu": 2048, "cuda": 8192}
#: Where a product is imitated, as float16's on most CPUs, it would last minutes: smaller ones then.
SMALLEST, LONGEST_S = 256, 1.0
#: Images, channels in and out, height and width of a 3x3 convolution.
CONVOLUTION = (8, 256, 28)
COPIED = {"cpu": 2**28, "cuda": 2**31}
#: Samples of each, and the least seconds that they take: a neighbour may halve some of them.
SAMPLES, SECONDS = 5, 1.0


@dataclass(frozen=True)
class Peaks:
    """Operations a second of large products by dtype, bytes a second of a large copy."""

    flops: dict[str, float]
    bandwidth: float

    @classmethod
    def of(cls, conditions: dict[str, Any]) -> Peaks | None:
        """Return what a record's conditions hold, or None where nothing was measured."""
        found = conditions.get("peaks")
        return cls(**found) if found else None

    def to_dict(self) -> dict[str, Any]:
        """Return them as the conditions keep them."""
        return dict(json.loads(json.dumps(asdict(self))))

    def schedule(self, model: nn.Module, input_size: Sequence[int], dtype: str) -> Schedule:
        """Return the least that the layers of a model need here, the stem and the head one each."""
        twin = meta_copy(model).eval()
        if any(isinstance(module, nn.Conv2d) for module in twin.modules()):
            twin = fuse(twin, inplace=True)
        kind = PRECISIONS[dtype]
        device = Device("as measured", {kind: self.flops[dtype]}, self.bandwidth)
        return roofline(twin, input_size, device, kind).stem_joined


def measured(device: str, dtypes: Sequence[str], threads: int, *, watch: Watch) -> Peaks:
    """Measure the device: the best of a few products and copies, as nothing can be faster."""
    torch.set_num_threads(threads)
    watch.doing("peaks of the device: products, a copy")
    flops = {dtype: _product(device, dtype) for dtype in dtypes}
    if device == "cpu":
        flops = {dtype: max(found, _convolution(dtype)) for dtype, found in flops.items()}
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # A byte copied is read once and written once.
    return Peaks(flops, 2 * COPIED[device] / _best(device, lambda: target.copy_(source)))


def _product(device: str, dtype: str) -> float:
    clock, n = timing.clock_for(device), SMALLEST
    with precision(dtype):
        run = _multiplied(device, dtype, n)
        run()  # the first one loads the library
        while n < MATRIX[device] and 8 * clock(run, 1) < LONGEST_S:
            n *= 2
            run = _multiplied(device, dtype, n)
        return float(2 * n**3 / _best(device, run))


def _convolution(dtype: str) -> float:
    """Return the rate of a convolution, which oneDNN computes as the direct sum.

    torch's matrix product of float32 is MKL's, which leaves half of an AMD CPU's width unused.
    (On a GPU cuDNN might transform it, and so pass what the device can do.)
    """
    batch, channels, size = CONVOLUTION
    x, weight = (
        torch.randn(shape).to(PRECISIONS[dtype]).contiguous(memory_format=torch.channels_last)
        for shape in ((batch, channels, size, size), (channels, channels, 3, 3))
    )
    flops = 2 * batch * size**2 * 9 * channels**2
    with torch.inference_mode():
        return float(flops / _best("cpu", lambda: F.conv2d(x, weight, padding=1)))


def _multiplied(device: str, dtype: str, n: int) -> Callable[[], object]:
    a, b = torch.randn(2, n, n, device=device).to(PRECISIONS[dtype])
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _best(device: str, run: Callable[[], object]) -> float:
    clock = timing.clock_for(device)
    run()
    best, samples, ends = math.inf, 0, time.perf_counter() + SECONDS
    while samples < SAMPLES or time.perf_counter() < ends:
        best, samples = min(best, clock(run, 1)), samples + 1
    return best
