"""Epochs of training: who learns has a speed, who does not has none, and the table says both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import digits, documents, epoch, levels, report, suite, training
from benchmarks.suite import Suite
from resnet_fused.bench import options
from resnet_fused.bench.options import Settings
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import EPOCH, FAILED, OK, WRONG, Case, Record, Row, load, save

IMAGES = 128


def few() -> digits.Digits:
    """Bright and dark images, which three steps tell apart."""
    classes = torch.arange(IMAGES) % 2
    pixels = torch.randn(IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 4
    x = (pixels + classes[:, None, None, None]).contiguous(memory_format=torch.channels_last)
    return digits.Digits(x, classes, x[:IMAGES], classes[:IMAGES])


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


@pytest.fixture
def asked(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Suite]:
    """A network of one layer and a hundred images; nothing of it is known in another process."""
    monkeypatch.setattr("resnet_fused.bench.timing.SHORTEST_SAMPLE_S", 0.0)
    monkeypatch.setattr(digits, "load", lambda side: few())
    monkeypatch.setattr(epoch, "create_model", lambda name: small_network())
    monkeypatch.setattr(epoch, "BATCH", 50)
    before = torch.get_num_threads()
    settings = replace(settings, rounds=5, threads=1)
    yield Suite(settings, (EPOCH,), {EPOCH: ("eager-nchw",)}, 224, suite.CACHES, False,
                suite.SECONDS["cpu"], 60.0)  # fmt: skip
    torch.set_num_threads(before)


def run(asked: Suite, *names: str) -> list[Row]:
    (case,) = suite.plan(asked)
    return levels.run_case(asked, case, names, None, Path(), watch=Watch())


def upside_down(model: nn.Module) -> object:
    """Learns the opposite of what it is tested on."""

    def forward(x: Tensor) -> Tensor:
        return -model(x)

    return forward


def ending(model: nn.Module) -> object:
    os._exit(3)


def test_who_learns_has_a_speed_and_who_does_not_has_none(
    asked: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        training, "OWN", {**training.OWN, "fused": upside_down, "fused-low": ending}
    )
    rows = run(asked, "eager", "fused", "fused-low", "eager-nchw")
    eager, wrong, dead, nchw = rows
    assert [row.verdict for row in rows] == [OK, WRONG, FAILED, OK], [row.note for row in rows]
    assert {row.case for row in rows} == {Case(epoch.MODEL, "float32", 50, EPOCH)}
    for row in (eager, nchw):
        assert len(row.seconds) == 5
        assert row.error is not None
        assert row.error <= epoch.ALLOWED
        assert row.ratio is not None
        assert row.img_s is not None
        # Two batches of 50 make an epoch; what is left fills none.
        assert row.img_s.most == pytest.approx(100 / min(row.seconds))
    assert wrong.seconds == []
    assert wrong.error is not None
    assert wrong.error > epoch.ALLOWED
    assert dead.note == "RuntimeError: ended with exit code 3"


def test_on_a_gpu_they_share_a_process(asked: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a name of the CPU that is not the usual one."""
    monkeypatch.setattr(epoch, "Apart", lambda: pytest.fail("a process was started"))
    here = replace(asked, settings=replace(asked.settings, device="cpu:0"))
    eager, low = run(here, "eager", "fused-low")
    assert (eager.verdict, low.verdict) == (OK, OK), (eager.note, low.note)


def test_an_epoch_is_kept_and_shown(
    asked: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(epoch.MODEL, "float32", 128, EPOCH)
    eager = Row(case, "eager", OK, 0.1, 0.3, error=0.01, seconds=[2.0] * 5)
    fused = replace(eager, contender="fused", error=0.02, seconds=[1.0] * 5)
    wrong = replace(eager, contender="fused-low", error=0.5, verdict=WRONG, seconds=[])
    conditions = {"device": "Some CPU", "device_kind": "cpu", "threads": 2, "torch": "2",
                  "resnet_fused": "0", "command": "c", "seed": 0}  # fmt: skip
    save(Record(conditions, [eager, fused, wrong]), tmp_path / report.RECORD)
    record = load(tmp_path / report.RECORD)
    (grid,) = report.grids(record)
    run_, seconds, right = (grid.columns.index(name) for name in ("run", "epoch s", "right"))
    assert [(row[run_], row[seconds], row[right]) for row in grid.rows] == [
        ("eager", "2.000", "99.0%"), ("fused", "1.000", "98.0%"), ("fused-low", WRONG, "50.0%"),
    ]  # fmt: skip
    assert grid.rows[0][grid.columns.index("fused / it")] == "2.00x (2.00-2.00)"
    monkeypatch.setattr(documents, "RESULTS", tmp_path / "results")
    documents.keep(record, "small")
    assert "Some CPU: An epoch of training" in documents.section(EPOCH)
    assert "GPU: not measured yet (`python -m benchmarks epoch`" in documents.section(EPOCH)


def test_all_learners_of_a_seed_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Tensor]] = [[], []]
    for found in seen:
        learner = digits.Learner(small_network(), few(), batch=50, epochs=2)
        monkeypatch.setattr(learner, "_step", lambda x, y, found=found: found.append(x))
        learner()
        learner()
    first, second = seen
    assert len(first) == 4
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_learner_goes_on_past_the_epochs_that_were_planned(dtype: str) -> None:
    learner = digits.Learner(
        small_network(), few(), batch=50, epochs=1, dtype=options.DTYPES[dtype]
    )
    before = learner.accuracy()
    for _ in range(8):
        learner()
    assert 0 <= before <= 1
    assert learner.accuracy() >= 0.5
