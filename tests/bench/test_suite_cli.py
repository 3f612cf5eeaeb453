"""The command ``python -m benchmarks``: what it refuses, compares and writes; nothing is timed."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from benchmarks import __main__ as command
from benchmarks import documents, runner, suite
from benchmarks.suite import Suite
from resnet_fused.bench import measure, timing
from resnet_fused.bench.options import UsageError
from resnet_fused.bench.results import (
    BLOCK,
    EPOCH,
    INFERENCE,
    OK,
    OP,
    TRAINING,
    Case,
    Record,
    Row,
    load,
    save,
)


def call(*words: object) -> Result:
    return CliRunner().invoke(command.app, [str(word) for word in words])


@pytest.fixture(autouse=True)
def _nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.Runner, "run", lambda self: pytest.fail("the run was begun"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ops", "-m", "resnt50"], "--model: unknown value 'resnt50'; did you mean resnet50"),
        (["ops", "-d", "int8"], "--dtype: unknown value 'int8'; accepted: fp32, bf16"),
        (["ops", "-d", "tf32"], "--dtype: tf32 is a precision of NVIDIA GPUs"),
        (["ops", "-b", "0"], "--batch: '0' given"),
        (["models", "--peers", "tvm"], "--peers: unknown value 'tvm'"),
        (["models", "--peers", "all,inductor"], "--peers: 'all' stands alone"),
        (["models", "--peers", "cudnn"], "--peers: cudnn runs on cuda only"),
        (["ops", "-m", "vgg16"], "--model: vgg16 makes no fused call; accepted: ResNets"),
        (["compare", "/no/a", "/no/b", "--threshold", "-1"], "--threshold: -1 given"),
        (["compare", "/no/a", "/no/b", "--threshold", "nan"], "--threshold: nan given"),
        (["ops", "--threads", "100000"], "--threads: 100000 given"),
        (["bn", "--threads", "100000"], "--threads: 100000 given"),
        (["training", "--images", "/no/folder"], "--images: /no/folder: no such directory"),
        (["models", "--device", "tpu"], "--device: unknown value 'tpu'"),
        (["models", "--graphs"], "--graphs: CUDA graphs need --device cuda"),
        (["blocks", "--cache", "warm"], "--cache: unknown value 'warm'; accepted: hot, fed, cold"),
        (["blocks", "--image-size", "8"], "--image-size: 8 given"),
        (
            ["training", "--peers", "inductor-default,onnxruntime"],
            "--peers: onnxruntime runs inference only; accepted: inductor-default, induc",
        ),
        (["models", "--peers", "apex"], "--peers: apex is no peer: its Bottleneck freezes"),
        (["training", "--cache", "fed"], "--cache: fed is nothing that training can have; accep"),
        (["cold", "--cache", "hot"], "--cache: hot is nothing that cold can have; leave it out"),
        (["training", "--limit", "0"], "--limit: 0 given; accepted: a number above 0"),
        (["training", "--minutes", "-1"], "--minutes: -1 given"),
        (["ops", "--seconds", "0"], "--seconds: 0 given"),
        (["bn", "--seconds", "0"], "--seconds: 0 given"),
        (["bn", "-b", "0"], "--batch: '0' given"),
        (["convolutions", "-d", "fp16"], "--dtype: unknown value 'fp16'; did you mean"),
        (["convolutions", "-m", "vgg16"], "--model: vgg16 makes no fused call; accepted: ResNets"),
        (["epoch", "--rounds", "0"], "--rounds: 0 given; accepted: a whole number, 1 or more"),
        (["epoch", "--peers", "openvino"], "--peers: openvino runs inference only; accepted: in"),
        (["bn", "-d", "fp16"], "--dtype: unknown value 'fp16'; did you mean"),
        (["all", "--backend", "ondnn"], "did you mean onednn"),
        (["compare", "/no/a", "/no/b"], "/no/a: No such file or directory"),
        (["report", "/no/a"], "/no/a: No such file or directory"),
        (["--save-table", "/no/README.md"], "/no/README.md"),
    ],
)
def test_bad_input_gets_one_clear_line(words: list[str], message: str, tmp_path: Path) -> None:
    measuring = words[0] not in ("compare", "report", "--save-table")
    result = call(*words, *(["--out", tmp_path / "out"] if measuring else []))
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "out").exists()
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("python -m benchmarks: ")
    assert message in result.stderr


def test_without_scikit_learn_no_epoch_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = call("epoch", "--out", tmp_path)
    assert result.exit_code == 2, result.output
    assert "the digits: needs scikit-learn" in result.stderr


def test_records_of_another_schema_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"schema": "other/9"}')
    result = call("compare", tmp_path / "other.json", tmp_path / "other.json")
    assert result.exit_code == 2
    assert "its schema is 'other/9'; this version reads" in result.stderr


def test_an_unfinished_run_is_not_written_over_unasked(record: Record, tmp_path: Path) -> None:
    left = replace(record, conditions={**record.conditions, runner.UNFINISHED: 3})
    save(left, tmp_path / "suite.json")
    refused = call("models", "--peers", "none", "--out", tmp_path)
    assert refused.exit_code == 2
    assert "of which 3 cases are left: --resume goes on, --fresh begins again" in refused.stderr
    other = call("models", "--peers", "none", "--out", tmp_path, "--resume")
    assert other.exit_code == 2
    assert "was measured with another device: Some CPU, now" in other.stderr


def test_a_regression_beyond_the_threshold_exits_with_1(record: Record, tmp_path: Path) -> None:
    slower = [
        measure.with_speed(row, {row.contender: [9.0] * 5}) if row.img_s else row
        for row in record.rows
    ]
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    save(record, a)
    save(replace(record, rows=slower), b)
    assert call("compare", a, a, "--threshold", 0.05).exit_code == 0
    assert call("compare", a, b).exit_code == 0
    worse = call("compare", a, b, "--threshold", 0.05)
    assert worse.exit_code == 1
    assert "slower or wrong in B" in worse.stderr


def test_every_format_is_written_again_from_the_record(record: Record, tmp_path: Path) -> None:
    save(record, tmp_path / "suite.json")
    result = call("report", tmp_path / "suite.json", "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again" / "suite.html").exists()
    assert load(tmp_path / "again" / "suite.json") == record


def test_a_kept_record_makes_the_table(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.parent.mkdir()
    monkeypatch.setattr(documents, "RESULTS", results)
    readme_file = tmp_path / "README.md"
    begin = documents.BEGIN.format("inference")
    readme_file.write_text(f"before\n{begin}\nold\n{documents.END}\nafter\n")
    save(record, tmp_path / "suite.json")
    assert call("keep", tmp_path / "suite.json", "some-cpu").exit_code == 0
    assert call("--save-table", readme_file).exit_code == 0
    text = readme_file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| resnet50 | fp32 | 8 |" in text
    assert "benchmarks/results/some-cpu.png" in text
    assert "GPU: not measured yet (`python -m benchmarks models`, then `keep`)." in text


@pytest.fixture
def trained(record: Record) -> Record:
    """A training record: fused is faster than eager, and as fast as the peer."""
    case = Case("resnet50", "float32", 8, TRAINING)
    seconds = {"eager": [2.0, 2.0, 2.1, 2.0, 2.1], "fused": [1.0, 1.1, 1.0, 1.0, 1.1],
               "fused-low": [2.0, 2.1, 2.0, 2.0, 2.1],
               "inductor-default": [1.1, 1.0, 1.05, 1.1, 1.0]}  # fmt: skip
    memory = {"saved_mib": 651.0, "peak_mib": 1177.0}
    rows = [
        measure.with_speed(Row(case, name, OK, 12.3, 25.6, **memory), seconds) for name in seconds
    ]
    return replace(record, rows=rows)


def test_training_is_kept_and_shown_the_same_way(
    trained: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "RESULTS", tmp_path)
    assert "CPU and GPU: not measured yet" in documents.section(TRAINING)
    save(trained, tmp_path / "suite.json")
    trained_again = load(tmp_path / "suite.json")
    (tmp_path / "suite.json").unlink()
    documents.keep(trained_again, "some-cpu-training")
    (line,) = [x for x in documents.section(TRAINING).splitlines() if x.startswith("| resnet50")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "resnet50", "fp32", "8", "4.0", "2.00x", "≈1.00x", "inductor-default 7.6", "≈1.05x",
        "651", "651", "651", "1177", "1177", "1177",
    ]  # fmt: skip


def test_blocks_are_kept_and_shown_the_same_way(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "RESULTS", tmp_path)
    case = Case("", "float32", 8, BLOCK, "256x56x56 bottleneck 64")
    seconds = {"eager": [0.002] * 5, "fused": [0.001] * 5, "frozen": [0.0005] * 5,
               "eager-nchw": [0.004] * 5}  # fmt: skip
    rows = [
        measure.with_speed(Row(case, name, OK, 0.2, 0.1, uses={"resnet50": 2, "a": 1}), seconds)
        for name in seconds
    ]
    alone = replace(case, dtype="bfloat16")
    rows.append(measure.with_speed(Row(alone, "eager", OK, 0.2, 0.1), {"eager": [0.003]}))
    caches = {"caches": {BLOCK: "fed"}}
    documents.keep(Record({**record.conditions, **caches}, rows), "some-cpu-blocks")
    text = documents.section(BLOCK)
    assert "Some CPU: residual blocks, each with fed caches" in text
    found = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(("| 256x", "| geo"))
    ]
    assert found == [
        ["256x56x56 bottleneck 64", "resnet50 2, a 1", "fp32", "8", "2000.0", "2.00x", "4.00x",
         "eager-nchw 4000.0", "8.00x"],
        ["256x56x56 bottleneck 64", "", "bf16", "8", "3000.0", "-", "-", "-", "-"],
        ["geometric mean", "", "", "", "", "2.00x", "4.00x", "", "8.00x"],
    ]  # fmt: skip
    assert "GPU: not measured yet (`python -m benchmarks blocks`, then `keep`)." in text


def test_whole_models_are_shown_of_all_levels_and_not_beside_ops_alone(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "RESULTS", tmp_path)

    def layer(level: str) -> Row:
        row = Row(Case("", "float32", 8, level, "a layer"), "eager", OK, 0.2, 0.1)
        return measure.with_speed(row, {"eager": [0.002] * 5})

    documents.keep(replace(record, rows=[*record.rows, layer(OP)]), "some-ops")
    assert "CPU and GPU: not measured yet" in documents.section(INFERENCE)
    documents.keep(replace(record, rows=[*record.rows, layer(OP), layer(BLOCK)]), "some-all")
    assert "| resnet50 | fp32 | 8 |" in documents.section(INFERENCE)


def test_a_record_is_not_kept_in_the_place_of_one_that_shows_more(
    record: Record, trained: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "RESULTS", tmp_path / "results")
    documents.keep(record, "some-cpu")
    with pytest.raises(UsageError, match="the record kept under it shows inference"):
        documents.keep(trained, "some-cpu")
    for name in ("../some-cpu", "", ".", "..", ".hidden", "a/b"):
        with pytest.raises(UsageError, match=r"NAME: .* given; accepted: letters, digits"):
            documents.keep(trained, name)
    with pytest.raises(UsageError, match="no timed row of inference, training"):
        documents.keep(replace(record, rows=[]), "empty")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marks", "has no <!-- results: LEVEL --> followed by <!-- end of results -->"),
        ("<!-- results: trainin -->\n<!-- end of results -->", "did you mean training?"),
        ("<!-- results: pass -->\n", "has no <!-- results: pass --> followed by"),
    ],
)
def test_a_document_without_the_right_marks_is_left_alone(
    text: str, message: str, tmp_path: Path
) -> None:
    document = tmp_path / "README.md"
    document.write_text(text)
    refused = call("--save-table", document)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert document.read_text() == text


def test_an_unfinished_record_is_not_kept(record: Record, tmp_path: Path) -> None:
    left = replace(record, conditions={**record.conditions, runner.UNFINISHED: 3})
    save(left, tmp_path / "suite.json")
    result = call("keep", tmp_path / "suite.json", "some-cpu")
    assert result.exit_code == 2
    assert "3 cases of the record are left" in result.stderr


def test_the_documents_name_commands_that_are_there() -> None:
    known = {entry.name or entry.callback.__name__ for entry in command.app.registered_commands}
    root = Path(command.__file__).parents[1]
    text = (root / "README.md").read_text() + (root / "CONTRIBUTING.md").read_text()
    lines = re.findall(r"python -m benchmarks ((?:\w+(?: \| )?)+)", text)
    named = {name for line in lines for name in line.split(" | ")}
    assert named == {"ops", "blocks", "models", "training", "epoch", "cold", "bn", "convolutions",
                     "keep", "all"}  # fmt: skip
    assert named < known


def begun(monkeypatch: pytest.MonkeyPatch, *words: object, device: str = "cuda") -> Suite:
    """Return what a command would run, on a GPU if not elsewhere, which is not there."""
    found: list[Suite] = []
    monkeypatch.setattr("resnet_fused.bench.options.usable_device", lambda option, value: value)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr("benchmarks.begin.run", lambda wanted, resume, more: found.append(wanted))
    result = call(*words, "--device", device)
    assert result.exit_code == 0, result.output
    return found[0]


def test_the_default_suite_is_planned_to_end_within_ten_minutes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    default = begun(monkeypatch, "all", "--out", tmp_path)
    cases = suite.plan(default)
    assert {case.level for case in cases} == {OP, BLOCK, INFERENCE, TRAINING, EPOCH}
    of_an_epoch = cases.pop()
    assert (of_an_epoch.level, of_an_epoch.model) == (EPOCH, "cifar_resnet20")
    assert {case.batch for case in cases if case.level == INFERENCE} == {1, 256}
    assert {case.batch for case in cases if case.level != INFERENCE} == {256}
    assert all("cudnn" in default.contenders(c) for c in cases if c.level != TRAINING)
    assert all(any("inductor" in n for n in default.contenders(c)) for c in cases if c.model)
    assert 300 < suite.planned_seconds(default) < suite.DEFAULT_SUITE_S == 600
    every = begun(monkeypatch, "all", "-m", "resnet50,resnet152", "-b", "8", "--out", tmp_path)
    assert {case.batch for case in suite.plan(every) if case.level != EPOCH} == {8}
    assert suite.planned_seconds(every) > suite.planned_seconds(default)


@pytest.mark.parametrize(("name", "level"), [("models", INFERENCE), ("training", TRAINING)])
def test_a_gpu_runs_all_models_within_ten_minutes(
    name: str, level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = begun(monkeypatch, name, "--out", tmp_path)
    cases = suite.plan(wanted)
    assert {(case.level, case.dtype) for case in cases} == {(level, "bfloat16")}
    assert {case.model for case in cases} == {"resnet34", "resnet50", "resnet152"}
    assert {case.batch for case in cases} == ({1, 256} if level == INFERENCE else {256})
    assert all(any("inductor" in n for n in wanted.contenders(case)) for case in cases)
    assert 300 < suite.planned_seconds(wanted) < suite.DEFAULT_SUITE_S


def test_epochs_are_planned_to_end_within_two_minutes_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = begun(monkeypatch, "epoch", "-d", "fp32,bf16", "--out", tmp_path, device="cpu")
    cases = suite.plan(wanted)
    assert [(case.dtype, case.batch) for case in cases] == [("float32", 128), ("bfloat16", 128)]
    assert list(wanted.contenders(cases[0])) == ["eager", "fused", "fused-low"]
    assert wanted.rounds(cases[0]) == timing.Rounds(11, 11)
    assert wanted.image_size == 16
    assert suite.planned_seconds(wanted) < 120
    peer = begun(monkeypatch, "epoch", "--peers", "inductor-default", "--out", tmp_path)
    assert list(peer.contenders(cases[0]))[3:] == ["inductor-default"]


def test_caches_are_those_that_a_level_can_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    every = begun(monkeypatch, "all", "--cache", "fed", "--out", tmp_path)
    assert every.caches == {**suite.CACHES, INFERENCE: "fed", "pass": "fed"}
    steps = begun(monkeypatch, "training", "--cache", "cold", "--out", tmp_path)
    assert steps.caches[TRAINING] == "cold"


def test_single_commands_on_a_gpu_measure_all_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ops = begun(monkeypatch, "ops", "--out", tmp_path)
    assert ops.settings.models == ("resnet34", "resnet50", "resnet152")
    assert {case.batch for case in suite.plan(ops)} == {1, 256}
