"""Who runs: the reference, `fuse` and `freeze`, each with its own copy of the same network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

REFERENCE = "eager"
FUSED = "fused"
#: In training: block outputs are computed again in backward.
FUSED_LOW = "fused-low"
FROZEN = "frozen"


@dataclass(frozen=True)
class Setup:
    """What a contender is built for.

    `model` is the calibrated float32 network, never to be changed; `example` the float32 batch;
    `scratch` a directory where exported files may lie while the job runs; `graphs` says whether an
    engine may record CUDA graphs of its own.
    """

    name: str
    model: nn.Module
    example: Tensor
    dtype: torch.dtype
    device: str
    threads: int
    scratch: Path
    graphs: bool = True


class Runner(NamedTuple):
    """A contender ready to run; only `run` is timed."""

    prepare: Callable[[Tensor], Any]
    run: Callable[[Any], Any]
    read: Callable[[Any], Tensor]


Build = Callable[[Setup], Runner]


def own_copy(setup: Setup) -> nn.Module:
    """Return a copy of the model in the dtype, layout and place that it will run in."""
    model = copy.deepcopy(setup.model).to(device=setup.device, dtype=setup.dtype)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def torch_runner(module: Callable[[Tensor], Tensor], setup: Setup) -> Runner:
    """Return the runner of something that takes and gives tensors."""

    def prepare(crops: Tensor) -> Tensor:
        there = crops.to(device=setup.device, dtype=setup.dtype)
        return there.contiguous(memory_format=torch.channels_last)

    return Runner(prepare, module, torch.clone)


def eager(setup: Setup) -> Runner:
    """Plain torch in channels_last, its quicker layout."""
    return torch_runner(own_copy(setup), setup)


def fused(setup: Setup) -> Runner:
    """`rf.fuse` and nothing else."""
    import resnet_fused as rf

    return torch_runner(rf.fuse(own_copy(setup), inplace=True), setup)


def frozen(setup: Setup) -> Runner:
    """`rf.freeze` for the batch at hand; it copies and casts the float32 model itself."""
    import resnet_fused as rf

    example = setup.example.to(device=setup.device, dtype=setup.dtype)
    engine = rf.freeze(setup.model.to(setup.device), example, graphs=setup.graphs)
    return torch_runner(engine, setup)


OWN: dict[str, Build] = {REFERENCE: eager, FUSED: fused, FROZEN: frozen}
