"""The benchmarks on a GPU, at their smallest: every contender is right, captured or not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import levels, subjects, suite
from benchmarks.suite import Suite
from resnet_fused.bench.options import Settings
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import EPOCH, INFERENCE, OK, OP, TRAINING, Case

NAME, SIZE = "resnet18", 64
PEERS = {OP: ("cudnn", "eager-nchw"), INFERENCE: ("cudnn", "eager-nchw"), TRAINING: (), EPOCH: ()}


@pytest.fixture
def small(tmp_path):
    settings = Settings(
        models=(NAME,), dtypes=("bfloat16",), batches=(2,), device="cuda",
        threads=torch.get_num_threads(), backend="auto", rounds=2, seed=0, images=None,
        out=tmp_path, peers=(),
    )  # fmt: skip
    return Suite(settings, (OP, INFERENCE, TRAINING), PEERS, SIZE, suite.CACHES, True,
                 suite.SECONDS["cuda"], limit=300.0)  # fmt: skip


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("level", [OP, INFERENCE, TRAINING])
def test_a_small_case(small, level, graphs, tmp_path):
    """Of the ops the stem, whose fused call is timed against the plain one."""
    pytest.importorskip("sklearn")  # photographs
    layer = next(iter(subjects.layers(OP, (NAME,), SIZE))) if level == OP else ""
    case = Case("" if layer else NAME, "bfloat16", 2, level, layer)
    run = replace(small, graphs=graphs)
    rows = levels.run_case(run, case, tuple(run.contenders(case)), None, tmp_path, watch=Watch())
    assert [(row.contender, row.verdict, row.note) for row in rows] == [
        (row.contender, OK, "") for row in rows
    ]
    assert all(len(row.seconds) == 2 for row in rows)


def test_epochs(small):
    """All learn the digits, in one process on the device."""
    pytest.importorskip("sklearn")
    run = replace(small, settings=replace(small.settings, rounds=8), levels=(EPOCH,))
    (case,) = suite.plan(run)
    rows = levels.run_case(run, case, tuple(run.contenders(case)), None, Path(), watch=Watch())
    assert [row.verdict for row in rows] == [OK] * 3, [row.note for row in rows]
