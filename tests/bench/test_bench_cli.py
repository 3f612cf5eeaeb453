"""The commands beside what they measure: what is refused, kept, shown; nothing is timed."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from resnet_fused.backends import _requested, cudnn
from resnet_fused.bench import chart, job, results, tables, terminal
from resnet_fused.bench.options import UsageError
from resnet_fused.bench.results import Record
from resnet_fused.cli import app


def call(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, [str(word) for word in words])


def bench(out: Path, *words: object) -> Result:
    return call("bench", "-m", "resnet50", "-b", 8, "--out", out, *words)


@pytest.fixture
def measured(record: Record, monkeypatch: pytest.MonkeyPatch) -> Record:
    """What the job gives, at once."""
    monkeypatch.setattr(job, "run", lambda *args: record)
    return record


def test_a_run_is_kept_before_it_is_shown(
    measured: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(*args: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(tables, "show", show)
    bench(tmp_path)
    assert results.load(tmp_path / "bench.json") == measured
    assert {"bench.md", "bench.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_character_that_the_output_lacks_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="latin-1"))
    small = typer.Typer()
    small.command()(lambda: terminal.console().print("ratio ≈1.00x"))
    with pytest.raises(SystemExit) as ended:
        terminal.run(small, "program")
    assert not ended.value.code
    assert shown.getvalue() == b"ratio ?1.00x\n"


def test_an_output_without_room_gets_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "resnet_fused", "flops"],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == ("resnet-fused: the output cannot be printed: No space left on device\n")


@pytest.mark.usefixtures("measured")
def test_a_file_that_cannot_be_written_is_named_and_the_others_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match=r"x\.md: No space left on device"):
        results.write_file(tmp_path / "x.md", full)
    monkeypatch.setattr(chart, "figure_class", lambda: lambda **options: full())
    monkeypatch.setattr(chart, "save", lambda record, path: results.write_file(path, full))
    result = bench(tmp_path)
    assert f"{tmp_path / 'bench.png'}: No space left on device" in result.stderr
    assert "written to" in result.stdout
    assert (tmp_path / "bench.md").exists()


@pytest.mark.parametrize("name", ["bench.json", "bench.md", "bench.png"])
def test_a_directory_in_a_files_place_is_refused_before_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "run", lambda *args: pytest.fail("the job was begun"))
    (tmp_path / name).mkdir()
    result = bench(tmp_path)
    assert result.exit_code == 2, result.output
    assert result.stderr == f"resnet-fused: --out: cannot write {tmp_path / name}: Is a directory\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "/nope"], "/nope: no such directory"),
        (["--threads", "100000"], "--threads: 100000 given; accepted: a whole number, 1 to "),
        (["--threads", str(10**13)], f"--threads: {10**13} given"),
        (["--seed", str(2**64)], f"--seed: {2**64} given; accepted: a whole number, 0 to "),
        (["--peers", ","], "--peers: ',' given, which names nothing"),
        (["--threshold", "0.1"], "--threshold: belongs to --compare"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(
    words: list[str], message: str, tmp_path: Path
) -> None:
    result = bench(tmp_path / "out", *words)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", "resnet18", "--seed", "-1"], "--seed: -1 given; accepted: a whole number, 0"),
        (["verify", "resnet18", "--seed", str(2**64)], f"--seed: {2**64} given"),
        (["flops", "--layers"], "--layers: changes nothing of the paper's table, without --model"),
        (["flops", "--input-size", "1,3,9,9"], "--input-size: changes nothing"),
        (["flops", "--stride-in", "1x1"], "--stride-in: changes nothing"),
        (["flops", "-m", ""], "--model: '' given, which names nothing; leave it out"),
        (["inspect", "--shape", "1,1,1,1,1,1,1", "--batch", "3"], "--batch: belongs to --model"),
    ],
)
def test_options_that_change_nothing_are_refused(words: list[str], message: str) -> None:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_comparing_takes_a_threshold_and_no_other_option(record: Record, tmp_path: Path) -> None:
    results.save(record, tmp_path / "a")
    both = "bench", "--compare", tmp_path / "a", tmp_path / "a"
    assert call(*both, "--threshold", "0").exit_code == 0
    for value in ("-1", "nan"):
        refused = call(*both, "--threshold", value)
        assert refused.exit_code == 2
        assert f"--threshold: {value} given; accepted: 0 or more" in refused.stderr
    refused = call(*both, "-b", "1")
    assert refused.exit_code == 2
    assert "--batch: changes nothing of --compare; leave it out" in refused.stderr


@pytest.mark.parametrize(
    "words", [("bench",), ("verify", "resnet18"), ("tune", "resnet18", "--device", "cpu")]
)
@pytest.mark.parametrize("name", ["bogus", "cudnn"])
@pytest.mark.usefixtures("cache", "measured")
def test_the_environments_backend_is_checked(
    words: tuple[str, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_requested, "_name", name)
    monkeypatch.setattr(cudnn, "available", lambda: "no GPU")
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("resnet-fused: RESNET_FUSED_BACKEND: ")
    assert len(result.stderr.splitlines()) == 1


def test_the_environments_backend_is_the_default(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run(settings: job.Settings, *args: object) -> Record:
        seen.append(settings.backend)
        return record

    monkeypatch.setattr(job, "run", run)
    monkeypatch.setattr(_requested, "_name", "reference")
    bench(tmp_path)
    bench(tmp_path, "--backend", "auto")
    assert seen == ["reference", "auto"]


@pytest.mark.parametrize(
    ("words", "where", "message"),
    [
        (("bench",), "job.run", "nothing was written; `python -m benchmarks models` keeps each "),
        (("verify", "resnet18"), "certificate.verify", "nothing is kept"),
        (
            ("tune", "resnet18", "--device", "cpu"),
            "tune.tune_calls",
            "choices made so far are kept; the same command goes on",
        ),
    ],
)
@pytest.mark.usefixtures("cache", "tiny")
def test_an_interrupted_command_says_what_is_kept(
    words: tuple[str, ...],
    where: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"resnet_fused.bench.{where}", interrupted)
    result = call(*words)
    assert result.exit_code == 130
    assert f"resnet-fused: interrupted; {message}" in result.stderr
