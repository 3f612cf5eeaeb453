"""Where a training step goes: each call is counted once, by what it computes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import resnet_fused as rf
from benchmarks import training, where
from resnet_fused.backends import (
    _cpu_block,
    _cpu_once,
    _cpu_weight_gradient,
    _torch_conv,
    cpu,
    native,
)
from resnet_fused.models.resnet import BasicBlock

pytestmark = pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer() -> training.Trainer:
    """Two convolutions that kernels run, with all their gradients, on 16x16 maps."""
    model = nn.Sequential(BasicBlock(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(8, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    model = model.to(memory_format=torch.channels_last)
    return training.Trainer(model, x, torch.arange(8), torch.float32, rf.fuse)


def test_every_kernel_of_a_step_is_counted_by_what_it_computes() -> None:
    step = trainer()
    with rf.use_backend("cpu"):
        step()
        (found,) = where.steps(step, 1)
        others = where.profiled(step, 1)
    calls = [(kernel.what, kernel.whose) for kernel in found.kernels]
    for what in (where.FORWARD, where.DATA, where.WEIGHT):
        assert calls.count((what, "native")) == 2, calls
    assert calls.count((where.OPTIMIZER, "torch's")) == 1
    assert (where.NORM, "native") in calls
    assert found.seconds > sum(kernel.seconds for kernel in found.kernels)
    # Not those of the optimizer, nor those inside one another.
    assert "aten::adaptive_avg_pool2d" in others
    assert {"aten::mean", "aten::_foreach_add_"}.isdisjoint(others)


def test_torchs_convolutions_count_where_they_stand_in_for_a_kernel() -> None:
    step = trainer()
    with rf.use_backend("cpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu_once, "_worth_packing", lambda *args, **kwargs: None)
        patch.setattr(_cpu_weight_gradient, "_gradient_algorithm", lambda *args: None)
        patch.setattr(_cpu_block, "_plans", {})
        step()
        (found,) = where.steps(step, 1)
        others = where.profiled(step, 1)
    calls = [(kernel.what, kernel.whose) for kernel in found.kernels]
    for what in (where.FORWARD, where.DATA, where.WEIGHT):
        assert calls.count((what, "torch's")) == 2, calls
        assert (what, "native") not in calls
    assert not [name for name in others if "conv" in name]


def test_nothing_stays_changed() -> None:
    step, owners = trainer(), (native.loaded(), _torch_conv, torch.optim.SGD, cpu)
    before = [dict(vars(owner)) for owner in owners]
    where.steps(step, 1)
    assert [dict(vars(owner)) for owner in owners] == before


def test_every_function_of_the_extension_is_known() -> None:
    """Or a new kernel's time would count as Python's."""
    named = {name for name in dir(native.loaded()) if not name.startswith("_")}
    kernels = {name for name in named if where.kind_of(name)}
    others = {"cpu_isa", "set_cpu_isa", "cuda", "interface", "head", "Memory"}
    assert named - kernels - others == {name for name in named if name.endswith(where.ASKED)}


def test_the_parts_add_up_to_the_step() -> None:
    kernels = [where.Kernel(where.FORWARD, "native", 0.0, 0.3),
               where.Kernel(where.OPTIMIZER, "torch's", 0.4, 0.5)]  # fmt: skip
    found = [where.Step(1.0, kernels)] * 3
    table, ops = where.grids(found, {"aten::a": (2, 0.15), "aten::b": (4, 0.05)}, "a step")
    assert [row[:4] for row in table.rows] == [
        [where.PYTHON, "", "-", "400.0"],
        [where.FORWARD, "native", "1", "300.0"],
        [where.OTHERS, "torch's", "6", "200.0"],
        [where.OPTIMIZER, "torch's", "1", "100.0"],
        ["step", "", "", "1000.0"],
    ]
    assert ops.rows == [["aten::a", "2", "150.0"], ["aten::b", "4", "50.0"]]
    assert where.gaps(found).startswith("between kernels: 1 gaps of 100000 us (median), 100.0 ms")


def test_a_step_of_a_single_kernel_has_no_gaps() -> None:
    """As of a VGG, which `fuse` leaves to torch: the optimizer alone is counted."""
    alone = where.Step(1.0, [where.Kernel(where.OPTIMIZER, "torch's", 0.4, 0.5)])
    assert where.gaps([alone] * 3) == "between kernels: no gap, as a step calls no two"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnt50"], "MODEL: unknown value 'resnt50'; did you mean resnet50"),
        (["resnet50", "-d", "fp16"], "--dtype: unknown value 'fp16'"),
        (["resnet50", "-b", "0"], "--batch: 0 given; accepted: a whole number, 1 or more"),
        (["resnet50", "--threads", "100000"], "--threads: 100000 given; accepted: a whole number"),
    ],
)
def test_bad_input_gets_one_clear_line(words: list[str], message: str) -> None:
    import typer

    app = typer.Typer()
    app.command()(where.main)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert message in re.sub(r"\x1b\[[\d;]*m", "", result.stderr)
