from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from resnet_fused.bench import chart, measure, tables
from resnet_fused.bench.options import UsageError
from resnet_fused.bench.results import Record, Row
from resnet_fused.env import POWER_CAPPED


def shown(record: Record, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    tables.show(record, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_and_cut_nothing_off(record: Record, width: int) -> None:
    text = shown(record, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for word in ("4.089 GMACs", "25.56 M", "img/s", "p20-p80", "GFLOP/s", "2.00x", "onnxruntime"):
        assert word in text


def test_wrong_and_failed_runs_show_no_speed(record: Record) -> None:
    lines = shown(record, 120).splitlines()
    (wrong,) = [line for line in lines if "frozen" in line and "WRONG" in line and ":" not in line]
    assert "x" not in wrong
    assert any(
        line.startswith("FAILED: resnet50 bf16 batch 8 fused: RuntimeError: no") for line in lines
    )


def test_who_was_skipped_is_named_with_the_reason(record: Record) -> None:
    assert "skipped: onnxruntime in 1 cases: runs float32 only" in shown(record, 120)


def test_a_noisy_machine_is_pointed_out(record: Record, row: Callable[..., Row]) -> None:
    assert "NOISY" not in shown(record, 120)
    noisy = measure.with_speed(row("eager"), {"eager": [0.1, 0.1, 0.2, 0.2]})
    assert "NOISY: in 1 of 1 cases" in shown(replace(record, rows=[noisy]), 120)


def test_the_peer_table_ends_in_the_geometric_mean(record: Record) -> None:
    assert "geometric mean, 1 of 2" in shown(record, 100)
    assert "1.30x" in shown(record, 100)


def test_markdown_has_the_same_cells_and_the_conditions(record: Record) -> None:
    page = tables.markdown(record)
    assert "| fp32 | 8 | eager | 20.0 | 20.0-20.0 |" in page
    assert "| --: |" in page
    assert "Some CPU · 2 threads · torch 2.13.0" in page
    assert "`resnet-fused bench`" in page


def test_the_chart_is_a_picture(record: Record, tmp_path: Path) -> None:
    chart.save(record, tmp_path / "bench.png")
    with Image.open(tmp_path / "bench.png") as image:
        assert image.format == "PNG"
        assert image.width > 800
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_no_matplotlib_is_said_with_the_extra(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r'pip install "resnet_fused\[bench\]"'):
        chart.save(record, tmp_path / "bench.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("1000000 us", "14600000 us", "clocks held down by power for 14 s"),
        ("1000000 us", "1000000 us", None),
        ("[N/A]", "[N/A]", None),
        (None, "1200 us", None),
    ],
)
def test_a_gpu_held_down_by_its_power_is_told(
    before: str | None, after: str, told: str | None
) -> None:
    clocks = {} if before is None else {POWER_CAPPED: before}
    line = tables.conditions_line({"clocks": clocks, "clocks_after": {POWER_CAPPED: after}})
    assert ("held down" in line) == (told is not None)
    assert told is None or line.endswith(told)


@pytest.mark.parametrize(
    ("kind", "named"), [("cpu", "AMD EPYC (AVX2) · "), ("cuda", "AMD EPYC · ")]
)
def test_a_processor_s_instructions_are_told_where_it_ran(kind: str, named: str) -> None:
    """Two generations give the same name; beside a GPU the processor bears on little."""
    conditions = {"device": "AMD EPYC", "device_kind": kind, "cpu_isa": "AVX2"}
    assert tables.conditions_line(conditions).startswith(named)
