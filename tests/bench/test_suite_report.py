"""What a record of the suite is shown as: tables, CSV, pictures, one page that stands alone."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from benchmarks import limits, page, report
from benchmarks.peaks import Peaks
from resnet_fused.bench import measure
from resnet_fused.bench.results import (
    BLOCK,
    COLD,
    CRASHED,
    OK,
    OP,
    TRAINING,
    Case,
    Record,
    Row,
    load,
    save,
)
from resnet_fused.bench.tables import Grid

PEAKS = Peaks({"float32": 1e12}, 1e11)


def layer(name: str, contender: str, seconds: float, **fields: object) -> Row:
    """A layer of 10 GFLOP and 0.5 GB at batch 2: 10 ms of arithmetic, 5 ms of memory."""
    case = Case("", "float32", 2, str(fields.pop("level", OP)), name)
    row = Row(case, contender, OK, 2.5, 0.1, nbytes=500_000_000, bound_s=0.01,
              uses={"resnet50": 3})  # fmt: skip
    return replace(measure.with_speed(row, {contender: [seconds] * 3}), **fields)


@pytest.fixture
def whole(record: Record) -> Record:
    """A record with rows of every level."""
    more = [
        layer("64x56x56 3x3 to 64 relu", "eager", 0.08),
        layer("64x56x56 3x3 to 64 relu", "frozen", 0.02),
        layer("a < b & c", "frozen", 0.04, uses={"resnet50": 1}),
        layer("a < b & c", "eager", 0.04, uses={"resnet50": 1}),
        layer("256x56x56 bottleneck 64", "eager", 0.1, level=BLOCK),
        layer("256x56x56 bottleneck 64", "frozen", verdict=CRASHED, seconds=0.1, level=BLOCK,
              note="ended by SIGSEGV"),
    ]  # fmt: skip
    more[-1] = replace(more[-1], seconds=[], img_s=None)
    cold = Row(Case("resnet50", "float32", 1, COLD), "eager", OK, 4.1, 25.6,
               stages={"import": 1.0, "build": 0.5, "first image": 0.25})  # fmt: skip
    case = Case("resnet50", "float32", 8, TRAINING)
    train = Row(case, "eager", OK, 12.3, 25.6, saved_mib=656.0, peak_mib=900.0, error=1e-7)
    conditions = {**record.conditions, "peaks": PEAKS.to_dict(), "absent": {"cudnn": "is away"},
                  "caches": {OP: "fed", COLD: "hot"}, "graphs": False}  # fmt: skip
    timed = measure.with_speed(train, {"eager": [1.0, 1.1, 1.2]})
    return Record(conditions, [*record.rows, *more, cold, timed])


def test_the_time_lost_is_weighted_with_the_uses(whole: Record) -> None:
    text = limits.grids(whole)[0].markdown()
    first, second = [line for line in text.splitlines() if line.startswith(("| 64x", "| a <"))]
    # (20 - 10) ms three times, and (40 - 10) ms once: both lose 30 ms of the model's 100 ms.
    for line, times, share in ((first, "3", "50%"), (second, "1", "25%")):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:2] == [times]
        assert cells[4:8] == ["20", "compute", "10000.0", "frozen"]
        assert cells[9:] == [share, "30000.0", "30.0%"]


def test_time_is_lost_by_the_faster_of_the_own_runs(whole: Record) -> None:
    more = [layer("64x56x56 3x3 to 64 relu", "fused", 0.015), layer("a < b & c", "fused", 0.05)]
    grid = limits.grids(replace(whole, rows=[*whole.rows, *more]))[0]
    assert "the faster of fused and frozen" in grid.title
    where = [grid.columns.index(name) for name in ("layer", "run", "us")]
    assert [[row[i] for i in where] for row in grid.rows] == [
        ["a < b & c", "frozen", "40000.0"],
        ["64x56x56 3x3 to 64 relu", "fused", "15000.0"],
    ]


def test_a_model_is_predicted_from_its_ops_where_all_were_measured(whole: Record) -> None:
    model = Row(Case("resnet50", "float32", 2), "frozen", OK, 4.1, 25.6)
    timed = measure.with_speed(model, {"frozen": [0.09]})
    ((row, seconds),) = limits.predicted([*whole.rows, timed])
    assert (row.contender, seconds) == ("frozen", pytest.approx(0.1))
    titles = [grid.title for grid in limits.grids(replace(whole, rows=[*whole.rows, timed]))]
    assert "Whole models beside the sum of their ops, each op with fed caches" in titles
    lost = [replace(r, seconds=[]) if r.case.layer.startswith("a") else r for r in whole.rows]
    assert limits.predicted([*lost, timed]) == []


def test_nothing_is_reached_where_no_peak_was_measured(whole: Record) -> None:
    assert limits.reached(whole.rows, None) == []
    assert limits.grids(replace(whole, conditions={})) == []


def test_a_record_of_all_levels_is_read_back_as_it_was(whole: Record, tmp_path: Path) -> None:
    save(whole, tmp_path / "suite.json")
    assert load(tmp_path / "suite.json") == whole


def test_the_csv_has_every_row_in_plain_units(whole: Record) -> None:
    rows = list(csv.DictReader(io.StringIO(report.csv_text(whole))))
    assert len(rows) == len(whole.rows)
    op = next(row for row in rows if row["level"] == OP and row["contender"] == "frozen")
    assert float(op["p50_s"]) == pytest.approx(0.02)
    assert float(op["img_s"]) == pytest.approx(100)
    assert op["layer"] == "64x56x56 3x3 to 64 relu"
    assert op["uses"] == "resnet50:3"
    assert rows[0]["uses"] == ""


def test_an_image_size_that_is_not_the_usual_one_is_said(whole: Record) -> None:
    small = replace(whole, conditions={**whole.conditions, "image_size": 64})
    assert "images of 64x64" in page.html(small, [], [], [])
    assert "images of 64x64" in report.markdown(small)
    usual = replace(whole, conditions={**whole.conditions, "image_size": 224})
    assert "images of" not in report.markdown(usual)


def test_the_terminal_shows_every_level_and_what_is_absent(whole: Record) -> None:
    console = Console(file=io.StringIO(), width=140)
    report.show(whole, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("ops fp32 batch 2", "blocks fp32", "Cold start", "A training step", "time lost",
                  "absent: cudnn is away", "fp32 1 TFLOP/s, 100 GB/s",
                  "caches: op fed, cold hot. Hot:",
                  "CRASHED: 256x56x56 bottleneck 64 fp32 batch 2 frozen: ended by"):  # fmt: skip
        assert words in text, words


class Strict(HTMLParser):
    """Collects what a page refers to, and whether its elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.references += [v or "" for name, v in attrs if name in ("src", "href", "srcset")]
        assert tag not in ("link", "iframe")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(whole: Record, tmp_path: Path) -> None:
    files = report.write(whole, tmp_path)
    assert {path.name for path in files} == {
        "suite.json", "suite.csv", "suite.md", "suite.html", "peers.png", "roofline.png",
        "memory.png",
    }  # fmt: skip
    text = (tmp_path / "suite.html").read_text()
    parser = Strict()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.references) == 3
    assert all(reference.startswith("data:image/png;base64,") for reference in parser.references)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest", text)
    assert "a &lt; b &amp; c" in text
    for picture in ("peers.png", "roofline.png", "memory.png"):
        with Image.open(tmp_path / picture) as image:
            assert image.width > 400


def test_throughput_is_drawn_over_several_batches(whole: Record, tmp_path: Path) -> None:
    larger = [
        replace(row, case=replace(row.case, batch=16)) for row in whole.rows if not row.case.layer
    ]
    both = replace(whole, rows=[*whole.rows, *larger])
    assert tmp_path / "throughput.png" in report.write(both, tmp_path)


def test_rows_that_sorting_tears_apart_name_their_case(whole: Record) -> None:
    grid = Grid("t", ("dtype", "batch", "run"), [["fp32", "1", "a"], ["", "", "b"]])
    assert page._filled(grid) == [["fp32", "1", "a"], ["fp32", "1", "b"]]
