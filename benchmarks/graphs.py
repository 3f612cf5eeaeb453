"""A contender as a CUDA graph: launched as one, so that Python and launches cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.bench.contenders import Build, Runner, Setup
from resnet_fused.bench.results import COLD, EPOCH, TRAINING, Case, Row

#: Calls on a side stream before the capture, as torch's own documents ask for.
WARM_UP = 3


def can_capture(case: Case) -> bool:
    """Return whether the contenders of a case may run as CUDA graphs, where graphs are asked for.

    Not from a cold start, in which `frozen` records its own; not over epochs; and not in training
    in float16, whose scaler reads a value back.
    """
    return case.level not in (COLD, EPOCH) and (case.level, case.dtype) != (TRAINING, "float16")


def in_words(conditions: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return which of the rows ran as CUDA graphs; nothing where there was no GPU."""
    if conditions.get("device_kind") != "cuda":
        return ""
    if not conditions.get("graphs"):
        return "without CUDA graphs"
    if all(can_capture(row.case) for row in rows):
        return "all under CUDA graphs"
    if all(row.case.level == COLD for row in rows):
        return "frozen alone under a CUDA graph, its own"
    if not any(can_capture(row.case) or row.case.level == COLD for row in rows):
        return "without CUDA graphs"
    return (
        "under CUDA graphs, but of cold starts frozen alone, of epochs and of training in float16 "
        "none"
    )


def captured(build: Build) -> Build:
    """Return the contender with its calls captured, once, for its example's shape.

    The graph reads one fixed input: `prepare` fills it and returns it, so that no copy is timed.
    """

    def built(setup: Setup) -> Runner:
        return _Captured(build(setup), setup).runner

    return built


class _Captured:
    def __init__(self, runner: Runner, setup: Setup) -> None:
        self._eager = runner
        with torch.inference_mode():
            self._input = runner.prepare(setup.example)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    runner.run(self._input)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = runner.run(self._input)

    @property
    def runner(self) -> Runner:
        return Runner(self._prepare, self._run, self._eager.read)

    def _prepare(self, crops: Tensor) -> Any:
        self._input.copy_(self._eager.prepare(crops))
        return self._input

    def _run(self, given: Any) -> Any:
        self._graph.replay()
        return self._output
