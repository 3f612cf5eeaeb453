"""BatchNorm's passes: answers are held against float64, and a record is what is shown and kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import bn, documents, report
from resnet_fused.backends import cpu
from resnet_fused.bench import measure, timing
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import OK, PASS, WRONG, Case, Record, Row, load
from resnet_fused.bench.tables import Grid

pytestmark = pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))
SHAPE = (24, 5, 5)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One small map, and nothing compiled: Inductor's code is the function itself."""
    monkeypatch.setattr(bn, "SHAPES", (SHAPE,))
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    monkeypatch.setattr(timing, "SHORTEST_SAMPLE_S", 0.0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(what: str, dtype: str) -> list[Row]:
    case = Case("", dtype, 2, PASS, f"24x5x5 {what}")
    builds = bn.contenders(case.layer)
    method = measure.Method(builds, lambda: timing.Rounds(2, 2), timing.elapsed_cpu)
    return bn.run_case(case, method, 1e9, Watch())


@pytest.mark.parametrize("what", bn.PASSES)
@pytest.mark.parametrize("dtype", bn.PRECISIONS)
def test_all_who_run_a_pass_are_right(what: str, dtype: str) -> None:
    rows = run(what, dtype)
    assert [(row.contender, row.verdict) for row in rows] == [
        (name, OK) for name in bn.contenders(f"24x5x5 {what}")
    ], rows
    for row in rows:
        assert len(row.seconds) == 2
        assert row.ratio is not None
        assert row.bound_s == row.nbytes / 1e9
        assert (row.error is None) == (row.contender == bn.COPY)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bn.kernels.bn_apply
    monkeypatch.setattr(bn.kernels, "bn_apply", lambda *a, **k: right(*a, **k).add_(0.1))
    rows = {row.contender: row for row in run(bn.APPLY, "float32")}
    assert rows[bn.KERNEL].verdict == WRONG
    assert rows[bn.KERNEL].seconds == []
    assert rows["eager"].seconds


def test_every_output_of_a_pass_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bn.kernels.bn_stats

    def off_in_the_variance(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, var = right(x)
        return mean, 1.1 * var

    monkeypatch.setattr(bn.kernels, "bn_stats", off_in_the_variance)
    rows = {row.contender: row for row in run(bn.STATS, "float32")}
    assert rows[bn.KERNEL].verdict == WRONG


def test_the_command_leaves_a_record_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the worker's calls made here, as the small map is known in this process alone."""

    class Here:
        def call(self, function, *arguments, limit, on_step):  # type: ignore[no-untyped-def]
            from benchmarks.worker import Done

            return Done(function(*arguments, watch=Watch()))

        def close(self) -> None:
            pass

    monkeypatch.setattr("benchmarks.runner.Worker", Here)
    monkeypatch.setattr("benchmarks.peaks.MATRIX", {"cpu": 32})
    monkeypatch.setattr("benchmarks.peaks.CONVOLUTION", (1, 8, 4))
    monkeypatch.setattr("benchmarks.peaks.SECONDS", 0.0)
    monkeypatch.setattr("benchmarks.peaks.COPIED", {"cpu": 2**12})
    words = ["bn", "-b", "2", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(command.app, words)
    assert result.exit_code == 0, result.output
    record = load(tmp_path / report.RECORD)
    assert record.conditions["threads"] == 1
    assert {row.case.layer for row in record.rows} == set(bn.layers())
    assert {row.case.dtype for row in record.rows} == set(bn.PRECISIONS)
    (grid,) = report.grids(record)
    assert len(grid.rows) == len(bn.PASSES) * len(bn.PRECISIONS)

    monkeypatch.setattr(documents, "RESULTS", tmp_path / "results")
    documents.keep(record, "small")
    assert grid.rows[0] == cells(documents.section(PASS))[0]


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("| 24x")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_table_marks_what_is_only_noise_and_names_who_failed() -> None:
    case = Case("", "float32", 8, PASS, f"24x5x5 {bn.APPLY}")

    def row(name: str, *seconds: float, verdict: str = OK) -> Row:
        made = Row(case, name, verdict, 0, 0, nbytes=100, bound_s=0.5)
        return measure.with_speed(made, {name: list(seconds)}) if seconds else made

    few = 5
    rows = [row("eager", *[2.0] * few), row(bn.KERNEL, *[1.0] * few),
            row(bn.COPY, 0.9, 1.1, 1.1, 1.0, 1.0),
            row(bn.INDUCTOR, verdict=WRONG)]  # fmt: skip
    grid: Grid = report.grids(Record({}, rows))[0]
    (line,) = [dict(zip(grid.columns, found, strict=True)) for found in grid.rows]
    assert line["of bandwidth"] == "50%"
    assert line["eager"] == "2.00x (2.00-2.00)"
    assert line[bn.COPY].startswith("≈1.00x")
    assert line[bn.INDUCTOR] == WRONG
