"""cuDNN as a peer: a network's groups as cuDNN's fused calls, whoever else the package would ask.

The backend `cudnn` takes its fused calls only where `tune` chose them, as nobody promises that
their ReLU keeps NaN. A peer is held against float64 alone, and is to be the strongest there is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import cudnn
from resnet_fused.bench import timing
from resnet_fused.bench.contenders import Runner, Setup, own_copy, torch_runner

#: Kernels from this size on are timed first: a fused 7x7 convolution in channels_last was 17 times
#: slower than a plain one (pytorch #68506).
TIMED_FROM = 5
#: Calls of each way, after one that lets cuDNN choose its engine.
SAMPLES = 5

Conv = Callable[..., Tensor]


def cudnn_peer(setup: Setup) -> Runner:
    """`rf.fuse` on cuDNN alone: convolution, bias, addition and ReLU are one call of cuDNN's."""
    import resnet_fused as rf

    model, calls = rf.fuse(own_copy(setup), inplace=True), FusedCalls(setup.device)

    def run(x: Tensor) -> Tensor:
        with rf.use_backend("cudnn"), calls.taken():
            y: Tensor = model(x)
        return y

    runner = torch_runner(run, setup)
    with torch.inference_mode():
        runner.run(runner.prepare(setup.example))  # what is to be timed is timed here
    return runner


class FusedCalls:
    """What runs in the place of the backend's `conv_bn_act`: fused, or what was quicker."""

    def __init__(self, device: str) -> None:
        self._clock = timing.clock_for(device)
        self._quicker: dict[Any, Conv] = {}
        self._plain = cudnn.conv_bn_act

    @contextmanager
    def taken(self) -> Any:
        """Have the backend run so."""
        cudnn.conv_bn_act = self  # type: ignore[assignment]
        try:
            yield
        finally:
            cudnn.conv_bn_act = self._plain

    def __call__(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        """Run the op as one call of cuDNN's, if it has one."""
        if args[-1] != "relu":
            return self._plain(x, weight, *args)
        if max(weight.shape[2:]) < TIMED_FROM:
            return cudnn.fused_conv_bn_act(x, weight, *args)
        key = (x.shape, x.dtype, weight.shape, *map(tuple, args[3:6]), args[6])
        if key not in self._quicker:
            ways = (cudnn.fused_conv_bn_act, self._plain)
            self._quicker[key] = min(ways, key=lambda way: self._seconds(way, x, weight, *args))
        return self._quicker[key](x, weight, *args)

    def _seconds(self, way: Conv, *args: Any) -> float:
        way(*args)
        return statistics.median(self._clock(lambda: way(*args), 1) for _ in range(SAMPLES))
