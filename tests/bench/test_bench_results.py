from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from resnet_fused.bench import results
from resnet_fused.bench.options import UsageError
from resnet_fused.bench.results import Record, Row


def test_json_round_trip(record: Record, tmp_path: Path) -> None:
    results.save(record, tmp_path / "bench.json")
    assert results.load(tmp_path / "bench.json") == record


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "its schema is None"),
        ('{"schema": "other/9", "rows": []}', "its schema is 'other/9'; this version reads"),
        (json.dumps({"schema": results.SCHEMA, "rows": []}), "not a whole benchmark record"),
        (
            json.dumps({"schema": results.SCHEMA, "conditions": {}, "rows": [{"case": {}}]}),
            "not a whole benchmark record",
        ),
        (
            json.dumps({"schema": results.SCHEMA, "conditions": [], "rows": []}),
            "not a whole benchmark record",
        ),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        results.load(path)
    assert "x.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("case.dtype", "int8"),
        ("case.batch", "1"),
        ("case.batch", 0),
        ("case.level", "other"),
        ("case.model", None),
        ("seconds", "abc"),
        ("seconds", []),
        ("seconds", [0.0]),
        ("seconds", ["x"]),
        ("seconds", [float("nan")]),
        ("img_s.median", "x"),
        ("img_s.median", 0),
        ("img_s", "x"),
        ("ratio.p20", -1.0),
        ("ratio.rounds", "2"),
        ("verdict", None),
        ("verdict", "fine"),
        ("gmacs", True),
        ("note", 3),
        ("stages", {"import": "1"}),
        ("uses", []),
    ],
)
def test_a_record_with_a_wrong_value_is_refused(
    path: str, value: object, record: Record, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    results.save(record, file)
    content = json.loads(file.read_text())
    *parents, name = path.split(".")
    fields = content["rows"][0]
    for parent in parents:
        fields = fields[parent]
    assert name in fields
    fields[name] = value
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"x\.json: not a whole benchmark record"):
        results.load(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.json: No such file"):
        results.load(tmp_path / "gone.json")


def test_the_best_peer_is_the_quickest_right_one(record: Record) -> None:
    fp32, bf16 = results.against_peers(record.rows)
    assert fp32.peer == "onnxruntime"
    assert fp32.ratio is not None
    assert fp32.ratio.median == pytest.approx(1.3)  # of 1.5, 1.3, 1.2, round by round
    assert bf16.peer == "openvino"
    assert bf16.own_img_s is None  # wrong, so it has no speed to compare
    assert bf16.ratio is None


def test_no_peers_no_cells(row: Callable[..., Row]) -> None:
    assert results.against_peers([row("eager", [0.4]), row("frozen", [0.2])]) == []


def test_geometric_means_leave_out_what_was_not_timed(record: Record) -> None:
    means = results.geometric_means(record.rows)
    assert "eager" not in means
    assert means["frozen"] == pytest.approx(2.0)  # fp32 alone; bf16 was wrong
    assert means["openvino"] == pytest.approx((0.8 * 4.0) ** 0.5)


def test_a_record_with_a_wrong_row_is_not_right(record: Record) -> None:
    assert not record.right
    good = [row for row in record.rows if row.verdict in (results.OK, results.SKIPPED)]
    assert Record({}, good).right
