from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from resnet_fused.bench import compare
from resnet_fused.bench.options import UsageError
from resnet_fused.bench.results import WRONG, Record, Row
from resnet_fused.bench.timing import Spread


def only(before: Row, after: Row) -> compare.Difference:
    (found,) = compare.differences(Record({}, [before]), Record({}, [after]))
    return found


def test_overlapping_ranges_are_no_difference(row: Callable[..., Row]) -> None:
    found = only(row("frozen", [0.2, 0.21, 0.22] * 2), row("frozen", [0.21, 0.22, 0.23] * 2))
    assert found.verdict == compare.SAME
    assert not found.regressed(0)


def test_clear_ranges_are_faster_or_slower(row: Callable[..., Row]) -> None:
    slow, quick = row("frozen", [0.40, 0.41] * 2), row("frozen", [0.20, 0.205] * 2)
    better, worse = only(slow, quick), only(quick, slow)
    assert better.verdict == compare.FASTER
    assert better.ratio == pytest.approx(2.0)
    assert not better.regressed(0)
    assert worse.verdict == compare.SLOWER
    assert worse.regressed(0.4)
    assert not worse.regressed(0.6)


def test_single_samples_are_never_faster_or_slower(row: Callable[..., Row]) -> None:
    """As of cold starts in records of before, which do not say how many there were."""
    quick, slow = row("frozen", [0.2]), row("frozen", [0.4])
    old = [replace(r, img_s=Spread(*[8 / r.seconds[0]] * 3)) for r in (quick, slow)]
    for pair in ((quick, slow), old):
        assert only(*pair).verdict == compare.SAME
        assert not only(*pair).regressed(0)


def test_becoming_wrong_is_a_regression_and_becoming_right_is_none(
    row: Callable[..., Row],
) -> None:
    right, wrong = row("frozen", [0.2]), row("frozen", verdict=WRONG)
    assert only(right, wrong).regressed(0.99)
    assert only(right, wrong).verdict == "WRONG in B"
    assert not only(wrong, right).regressed(0)


def test_cases_match_by_model_dtype_batch_and_contender(record: Record) -> None:
    found = compare.differences(record, record)
    assert len(found) == 9  # all but the skipped one
    assert {d.verdict for d in found if d.ratio} == {compare.SAME}
    other = [replace(row, case=replace(row.case, batch=99)) for row in record.rows]
    with pytest.raises(UsageError, match="no case in common"):
        compare.differences(record, Record({}, other))


def test_conditions_that_matter_are_pointed_out(record: Record) -> None:
    other = replace(record, conditions={**record.conditions, "threads": 8, "date": "later"})
    assert compare.unlike_conditions(record, other) == ["threads differs: 2 / 8"]


def test_the_table_says_what_no_difference_means(record: Record) -> None:
    console = Console(file=io.StringIO(), width=80)
    compare.show(compare.differences(record, record), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "WRONG in A" in text
    assert "1.000" in text
    assert "overlap" in text


def reported(before: Record, after: Record, threshold: float | None = 0.05) -> tuple[str, str]:
    """Return the text of a comparison, and its complaint."""
    console = Console(file=io.StringIO(), width=120)
    complaint = compare.report(before, after, threshold, console)
    return console.file.getvalue(), complaint  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "other"),
    [("image_size", 64), ("graphs", True), ("caches", {"inference": "cold"})],
)
def test_records_of_another_thing_are_refused(record: Record, name: str, other: object) -> None:
    said = {"image_size": 224, "graphs": False, "caches": {"inference": "hot", "op": "fed"}}
    before = replace(record, conditions={**record.conditions, **said})
    after = replace(before, conditions={**before.conditions, name: other})
    with pytest.raises(UsageError, match=f"{name}.* differ.*not comparable"):
        reported(before, after)
    reported(before, before)
    reported(before, record)  # one of before, which does not say


def test_unlike_libraries_and_inputs_are_named(record: Record) -> None:
    said = {"seed": 0, "backend": "auto", "driver": "1", "packages": {"jax": "1", "numpy": "2"}}
    before = replace(record, conditions={**record.conditions, **said})
    changed = {**said, "seed": 1, "driver": "2", "packages": {"jax": "3", "numpy": "2"}}
    after = replace(record, conditions={**record.conditions, **changed})
    text, _ = reported(before, after)
    for words in ("seed differs: 0 / 1", "driver differs: 1 / 2", "packages differs: jax 1 / 3\n"):
        assert words in text
    assert "backend differs" not in text


def test_a_row_missing_from_b_is_listed_and_fails(record: Record) -> None:
    less = replace(record, rows=[row for row in record.rows if row.contender != "frozen"])
    text, complaint = reported(record, less)
    assert "missing from B: resnet50 fp32 batch 8 frozen" in text
    assert complaint == "2 missing from B"
    assert reported(record, less, None)[1] == ""
    assert "missing" not in reported(less, record)[0]


def test_memory_is_compared_and_fails_where_it_is_counted(row: Callable[..., Row]) -> None:
    def one(device: str, **memory: float) -> Record:
        return Record({"device_kind": device}, [row("fused", [0.2] * 5, **memory)])

    text, complaint = reported(one("cuda", peak_mib=100.0), one("cuda", peak_mib=150.0))
    assert "memory: resnet50 fp32 batch 8 fused: peak 100 / 150 MiB" in text
    assert complaint == "1 with more memory in B"
    text, complaint = reported(one("cpu", peak_mib=100.0), one("cpu", peak_mib=150.0))
    assert "peak 100 / 150 MiB" in text
    assert complaint == ""
    _, complaint = reported(one("cpu", saved_mib=100.0), one("cpu", saved_mib=150.0))
    assert complaint == "1 with more memory in B"
    assert "memory" not in reported(one("cuda", peak_mib=100.0), one("cuda", peak_mib=104.0))[0]
