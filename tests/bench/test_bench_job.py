from __future__ import annotations

import io
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from resnet_fused import testing
from resnet_fused.bench import accuracy, contenders, job, measure, memory, networks, progress
from resnet_fused.bench.contenders import Runner, Setup
from resnet_fused.bench.options import Settings
from resnet_fused.bench.results import FAILED, OK, WRONG, Case, Row

WATCH = progress.Watch()


def off_by(amount: float) -> contenders.Build:
    def build(setup: Setup) -> Runner:
        right = contenders.eager(setup)
        return right._replace(run=lambda x: right.run(x) * (1 + amount))

    return build


def runs(settings: Settings, monkeypatch: pytest.MonkeyPatch, **own: object) -> dict[str, Row]:
    """Run the job with these contenders beside the reference; rows of the last case by name."""
    monkeypatch.setattr(measure, "OWN", {"eager": contenders.eager, **own})
    record = job.run(settings, {}, WATCH)
    assert len(record.rows) == len(settings.batches) * (1 + len(own))
    return {row.contender: row for row in record.rows}


@pytest.mark.usefixtures("tiny")
def test_a_wrong_contender_has_no_speed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = runs(settings, monkeypatch, right=off_by(0), wrong=off_by(0.01))
    assert rows["right"].verdict == OK
    assert rows["right"].img_s is not None
    assert len(rows["right"].seconds) == settings.rounds
    wrong = rows["wrong"]
    assert wrong.verdict == WRONG
    assert (wrong.img_s, wrong.gflop_s, wrong.ratio, wrong.seconds) == (None, None, None, [])
    assert wrong.error == pytest.approx(0.01, rel=0.1)
    assert "allowed" in wrong.note


@pytest.mark.usefixtures("tiny")
def test_turning_wrong_during_the_timing_costs_the_times(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer handed out and then reused would show only after many calls."""

    def build(setup: Setup) -> Runner:
        right = contenders.eager(setup)
        calls = []

        def run(x: Tensor) -> Tensor:
            calls.append(1)
            return right.run(x) * (1 if len(calls) < 6 else 2)

        return right._replace(run=run)

    row = runs(settings, monkeypatch, late=build)["late"]
    assert row.verdict == WRONG
    assert row.seconds == []


@pytest.mark.usefixtures("tiny")
def test_one_wrong_row_of_a_batch_is_enough(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(setup: Setup) -> Runner:
        right = contenders.eager(setup)

        def run(x: Tensor) -> Tensor:
            y = right.run(x)
            y[-1] += 1
            return y

        return right._replace(run=run)

    assert runs(settings, monkeypatch, last_row=build)["last_row"].verdict == WRONG


@pytest.mark.usefixtures("tiny")
def test_nan_and_shape_are_wrong_and_leave_no_number(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(setup: Setup) -> Runner:
        right = contenders.eager(setup)
        return right._replace(run=lambda x: right.run(x)[:, :3])

    rows = runs(settings, monkeypatch, nan=off_by(float("nan")), short=short)
    for name in ("nan", "short"):
        assert rows[name].verdict == WRONG
        assert rows[name].error is None


@pytest.mark.usefixtures("tiny")
def test_a_contender_that_dies_does_not_take_the_others_along(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(setup: Setup) -> Runner:
        raise RuntimeError("no such kernel\nand a long tail")

    rows = runs(settings, monkeypatch, dead=build)
    assert rows["dead"].verdict == FAILED
    assert rows["dead"].note == "RuntimeError: no such kernel"
    assert rows["eager"].img_s is not None


@pytest.mark.usefixtures("tiny")
def test_a_gpu_that_is_lost_ends_the_case_at_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is built after it would fail for no fault of its own; here no process takes over."""
    built = []

    def breaks(setup: Setup) -> Runner:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def after(setup: Setup) -> Runner:
        built.append(setup)
        return contenders.eager(setup)

    rows = runs(settings, monkeypatch, breaks=breaks, after=after)
    assert {row.verdict for row in rows.values()} == {FAILED}
    assert not built


@pytest.mark.usefixtures("tiny")
def test_speed_follows_from_seconds(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(runs(settings, monkeypatch)["eager"], seconds=[])
    timed = measure.with_speed(row, {"eager": [0.3, 0.3]})
    assert timed.img_s is not None
    assert timed.img_s.median == pytest.approx(row.case.batch / 0.3)
    assert timed.gflop_s == pytest.approx(2 * row.gmacs * timed.img_s.median)
    assert timed.ratio is not None
    assert timed.ratio.median == 1


@pytest.mark.usefixtures("tiny")
def test_fuse_runs_in_the_job(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs(settings, monkeypatch, fused=contenders.fused)["fused"].verdict == OK


def test_the_plan_keeps_the_cases_of_a_model_together(settings: Settings) -> None:
    asked = replace(settings, models=("a", "b"), dtypes=("float32", "bfloat16"))
    cases = job.plan(asked)
    assert len(cases) == 8
    assert [case.model for case in cases] == ["a"] * 4 + ["b"] * 4


def test_rounds_asked_for_are_exact_and_others_follow_the_budget() -> None:
    now = time.perf_counter()
    assert job.rounds_for(7, now).least == job.rounds_for(7, now).most == 7
    assert 2 < job.rounds_for(None, now + 3).seconds <= 3


def test_calibration_gives_bn_the_statistics_of_the_crops() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.5))
    crops = torch.randn(16, 3, 8, 8) * 4 + 2
    networks.calibrate(model, crops)
    assert torch.allclose(model[0].running_mean, crops.mean((0, 2, 3)), atol=1e-4)
    assert model[0].momentum == 0.3
    assert not any(module.training for module in model.modules())


def test_the_longest_sum_is_over_one_output() -> None:
    model = nn.Sequential(nn.Conv2d(16, 8, 3, groups=4), nn.Linear(30, 2), nn.BatchNorm2d(99))
    assert testing.longest_sum(model) == 4 * 9


def test_the_bound_follows_eager_and_has_a_floor() -> None:
    floor = accuracy.allowed_error(0.0, torch.float32, 4608)
    assert 1e-6 < floor < 1e-5
    assert accuracy.allowed_error(0.1, torch.bfloat16, 4608) == pytest.approx(0.2078, rel=1e-3)
    assert accuracy.allowed_error(float("inf"), torch.float32, 4608) == floor


def test_every_row_is_held_against_its_own_answer() -> None:
    answers = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    good = accuracy.check_batch(answers.float(), 5)
    assert accuracy.relative_error(good, answers) == 0
    good[4, 0] = 1.4
    assert accuracy.relative_error(good, answers) == pytest.approx(0.1)


def test_resident_memory_sees_a_passing_peak() -> None:
    meter = memory.ResidentMeter()
    before = meter.now()
    meter.restart()
    torch.ones(64 * memory.MIB, dtype=torch.uint8)  # written to, so resident, and gone at once
    peak = memory.growth_mib(before, meter.peak())
    assert peak is None or 50 < peak < 200


def test_an_unknown_peak_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    meter = memory.ResidentMeter()
    monkeypatch.setattr(meter, "clear_refs", tmp_path)  # a directory cannot be written to
    meter.restart()
    assert meter.peak() is None
    assert memory.growth_mib(1, None) is None


@pytest.mark.parametrize("each", [5, 120])
def test_the_time_left_is_known_however_long_a_case_takes(each: int) -> None:
    now = [0.0]
    pace = progress.Pace(lambda: now[0])
    pace.begin(4, None)
    assert str(pace) == "-:--:--"
    now[0] += each
    pace.step()
    assert pace.left == 3 * each
    now[0] += each / 2
    assert pace.left == 2.5 * each
    now[0] += each / 2
    pace.step()
    pace.begin(4, 0.1)  # the two to come are large ones
    assert pace.left == 18 * each
    assert str(pace) == ("0:01:30" if each == 5 else "0:36:00")


def test_a_long_step_leaves_count_and_time_on_the_line() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    bar = progress.BarWatch(console)
    bar.begin(228)
    bar.case_done(Case("resnet50", "float32", 8), [])
    bar.doing("1024x14x14 1x1 to 256 relu bf16 batch 256: building inductor-max-autotune")
    console.print(bar.progress.get_renderable())
    (line,) = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(line) <= 80
    for words in ("1/228", "0:00:00 left", "1024x14x14 1x1 to", "…"):
        assert words in line, line


def test_progress_lines_and_bar(record: object) -> None:
    rows = record.rows  # type: ignore[attr-defined]
    out = io.StringIO()
    progress.LineWatch(Console(file=out, width=60)).case_done(rows[0].case, rows[:3])
    assert out.getvalue().startswith("resnet50 fp32 batch 8: eager 20.0 img/s (1.00x), fused")
    assert len(out.getvalue().splitlines()) == 1
    counted = progress.LineWatch(Console(file=(out := io.StringIO()), width=60))
    counted.begin(2)
    counted.case_done(rows[0].case, rows[:3])
    assert out.getvalue().startswith("[1/2, 0:00:00 left] resnet50 fp32 batch 8: eager")
    with progress.BarWatch(Console(file=io.StringIO(), force_terminal=True)) as bar:
        bar.begin(2)
        bar.doing("resnet50: round 3")
        bar.case_done(rows[0].case, rows)
        (task,) = bar.progress.tasks
        assert (task.completed, task.total, task.description) == (1, 2, "resnet50: round 3")


def test_wrong_runs_are_named_in_the_line(record: object) -> None:
    rows = [row for row in record.rows if row.case.dtype == "bfloat16"]  # type: ignore[attr-defined]
    text = progress.line(rows[0].case, rows)
    assert "frozen WRONG (error 1, allowed 0.1)" in text
    assert "onnxruntime" not in text
