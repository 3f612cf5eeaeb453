"""pytest-benchmark over the suite's cases: ``pytest benchmarks --benchmark-only``.

Grouped by case, so that its own tables and ``--benchmark-compare`` set the contenders side by side.
They are run one after another, not in interleaved rounds: for ratios, ``python -m benchmarks``.
Every answer is held against float64 before it is timed. Cold starts, epochs and the convolutions of
training, which are not timed by the clock alone, are not among them. ``-k "op and fused"`` and the
like select.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bn, levels, suite, training
from benchmarks.suite import Suite
from resnet_fused.backends import cpu
from resnet_fused.bench import measure, options, timing
from resnet_fused.bench.contenders import REFERENCE
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import (
    BLOCK,
    INFERENCE,
    LEVELS,
    OK,
    OP,
    PASS,
    SKIPPED,
    TRAINING,
    Case,
)
from resnet_fused.bench.timing import HOT

MODELS = ("resnet50",)
#: BatchNorm's passes where the CPU's kernels are.
MEASURED = (OP, BLOCK, INFERENCE, TRAINING, *(() if cpu.available() else (PASS,)))


@functools.cache
def _suite() -> Suite:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peers, _ = suite.peers_by_level("peers", [], device)
    settings = options.Settings(
        models=MODELS, dtypes=options.default_dtypes(device), batches=(8,), device=device,
        threads=torch.get_num_threads(), backend="auto", rounds=None, seed=0, images=None,
        out=Path(), peers=(),
    )  # fmt: skip
    return Suite(
        settings, MEASURED, peers, image_size=224, caches=dict.fromkeys(LEVELS, HOT),
        graphs=False, seconds=suite.SECONDS[device], limit=0.0,
    )  # fmt: skip


def _cases() -> list[Any]:
    return [
        pytest.param(case, name, id=f"{case.level} {case} {name}")
        for case in suite.plan(_suite())
        for name in _suite().contenders(case)
    ]


@pytest.mark.parametrize(("case", "name"), _cases())
def test_case(benchmark: Any, case: Case, name: str, tmp_path: Path) -> None:
    benchmark.group = str(case)
    measure.forget_compiled()
    if case.level == PASS:
        row, call = bn.Entered(case, None).enter(name, _suite().contenders(case)[name])
        assert row.verdict == OK, row.note
        benchmark(call)
        return
    network, setup, contenders, _ = levels.prepare(_suite(), case, tmp_path)
    with measure.precision(case.dtype):
        if case.level == TRAINING:
            turn, exact = 0.0, training.exact_gradient(network, case.batch)
            for who in dict.fromkeys((REFERENCE, name)):
                row, step = training.enter(who, contenders[who], network, case, setup, exact, turn)
                turn = row.error or 0.0
            assert row.verdict == OK, row.note
            benchmark(timing.finished(step, setup.device))
            return
        builds = {REFERENCE: contenders[REFERENCE], name: contenders[name]}
        *_, entry = measure.entered(network, case, setup, builds, Watch())
        if entry.row.verdict == SKIPPED:
            pytest.skip(entry.row.note)
        assert entry.row.verdict == OK, entry.row.note
        with torch.inference_mode():
            benchmark(timing.finished(entry.call, setup.device))
