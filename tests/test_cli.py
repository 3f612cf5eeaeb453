from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from resnet_fused.backends import _requested
from resnet_fused.bench import certificate, contenders, job, measure
from resnet_fused.cli import app


def call(*words: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, [str(word) for word in words])


def network(name: str, **kwargs: object) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


@pytest.fixture
def small_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of a second: a tiny network, and freezing left to its own tests."""
    monkeypatch.setattr("resnet_fused.models.create_model", network)
    monkeypatch.setattr("resnet_fused.bench.timing.SHORTEST_SAMPLE_S", 0.0)
    monkeypatch.setattr(measure, "OWN", {"eager": contenders.eager, "frozen": contenders.eager})


@pytest.mark.usefixtures("small_job")
def test_bench_writes_its_three_files_and_compares_them(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    result = call("bench", "-m", "resnet50", "-b", "1,2", "-d", "fp32", "--rounds", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert "resnet50 fp32 batch 2: eager" in result.stderr  # plain lines without a terminal
    assert "GMACs an image" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md", "bench.png"]

    record = json.loads((out / "bench.json").read_text())
    assert len(record["rows"]) == 4
    conditions = record["conditions"]
    assert conditions["threads"] == torch.get_num_threads()
    assert conditions["photographs"] == ["china.jpg", "flower.jpg"]
    assert {"torch", "python", "cpu", "commit", "command", "date", "seed"} <= conditions.keys()

    compared = call("bench", "--compare", out / "bench.json", out / "bench.json", "--threshold", 0)
    assert compared.exit_code == 0, compared.output
    assert "no difference" in compared.stdout


@pytest.mark.usefixtures("small_job")
def test_a_wrong_answer_makes_the_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(setup: contenders.Setup) -> contenders.Runner:
        right = contenders.eager(setup)
        return right._replace(run=lambda x: right.run(x) * 2)

    monkeypatch.setattr(measure, "OWN", {"eager": contenders.eager, "frozen": wrong})
    result = call(
        "bench", "-m", "resnet50", "-b", 1, "-d", "fp32", "--rounds", 1, "--out", tmp_path
    )
    assert result.exit_code == 1
    assert "WRONG: resnet50 fp32 batch 1 frozen: error 1.0e+00, allowed" in result.stdout


def test_a_regression_beyond_the_threshold_makes_the_exit_code_1(tmp_path: Path) -> None:
    from resnet_fused.bench.results import OK, Case, Record, Row, save

    for name, seconds in (("a", 0.2), ("b", 0.3)):
        row = Row(Case("resnet50", "float32", 8), "eager", OK, 4.1, 25.6)
        save(Record({}, [measure.with_speed(row, {"eager": [seconds] * 5})]), tmp_path / name)
    paths = tmp_path / "a", tmp_path / "b"
    assert call("bench", "--compare", *paths).exit_code == 0
    assert call("bench", "--compare", *paths, "--threshold", 0.5).exit_code == 0
    worse = call("bench", "--compare", *paths, "--threshold", 0.1)
    assert worse.exit_code == 1
    assert "1 of 1 slower or wrong in B" in worse.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "--model", "resnt50"], "did you mean resnet50"),
        (["bench", "--dtype", "int8"], "accepted: fp32, bf16, fp16"),
        (["bench", "--batch", "none"], "--batch: 'none' given; accepted: a whole number"),
        (["bench", "--rounds", "0"], "--rounds: 0 given"),
        (["bench", "--threads", "-2"], "--threads: -2 given"),
        (["bench", "--seed", "-1"], "--seed: -1 given"),
        (
            ["bench", "--device", "tpu"],
            "--device: unknown value 'tpu'; did you mean cpu? accepted: cpu, cuda",
        ),
        (["bench", "--backend", "ondnn"], "did you mean onednn"),
        (["bench", "--peers", "tvm"], "accepted: inductor, onnxruntime, openvino"),
        (["bench", "--images", "/no/such/place"], "/no/such/place: no such directory"),
        (["bench", "--compare", "/no/a", "/no/b"], "/no/a: No such file or directory"),
        (["bench", "--threshold", "0.1"], "--threshold: belongs to --compare"),
        (["flops", "--model", "resnet5"], "did you mean resnet50"),
        (["flops", "-m", "resnet18", "--input-size", "1,3,224"], "four numbers"),
        (["flops", "-m", "resnet18", "--input-size", "1,3,x,9"], "--input-size: 'x' given"),
        (["flops", "-m", "resnet18", "--stride-in", "2x2"], "accepted: 1x1, 3x3"),
        (["roofline", "resnet5"], "MODEL: unknown value 'resnet5'; did you mean resnet50"),
        (["roofline", "resnet18", "--device", "h20"], "did you mean h200"),
        (["roofline", "resnet18", "--dtype", "fp32"], "no figure for torch.float32 on H200"),
        (["roofline", "resnet18", "--input-size", "1,3"], "four numbers"),
        (["roofline", "resnet18", "--input-size", "1,4,9,9"], "failed on input_size=(1, 4, 9, 9)"),
        (["verify", "resnet5"], "MODEL: unknown value 'resnet5'; did you mean resnet50"),
        (["verify", "resnet18", "--batch", "0"], "--batch: 0 given"),
        (["verify", "resnet18", "--images", "/no/such/place"], "no such directory"),
        (["tune", "resnet5"], "MODEL: unknown value 'resnet5'; did you mean resnet50"),
        (["tune", "resnet18", "--device", "tpu"], "--device: unknown value 'tpu'"),
        (["tune", "resnet18", "--device", "cpu", "--batch", "0"], "--batch: 0 given"),
        (["tune", "resnet18", "--device", "cpu", "--image-size", "0"], "--image-size: 0 given"),
        (["tune", "resnet18", "--device", "cpu", "--dtype", "int8"], "accepted: fp32, bf16, fp16"),
        (["tune", "vgg16", "--device", "cpu"], "VGG makes no fused call here"),
    ],
)
def test_bad_values_get_one_line_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_unwritable_out_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "run", lambda *args: pytest.fail("the job was begun"))
    (tmp_path / "file").write_text("")
    result = call("bench", "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("resnet-fused: --out: cannot write to")


def test_flops_without_a_model_is_the_papers_table() -> None:
    result = call("flops")
    assert result.exit_code == 0
    assert "vgg19" in result.stdout
    assert "11.282" in result.stdout


def test_flops_of_a_model_and_its_layers() -> None:
    assert call("flops", "-m", "resnet50").stdout == "resnet50: 4.089 GMACs, 25.56 M parameters\n"
    assert "3.858 GMACs" in call("flops", "-m", "resnet50", "--stride-in", "1x1").stdout
    assert "layer4.1.conv2" in call("flops", "-m", "resnet18", "--layers").stdout


def test_roofline_of_a_model() -> None:
    result = call("roofline", "resnet18", "--device", "a100", "--dtype", "fp32")
    assert result.exit_code == 0
    assert "resnet18, input 256x3x224x224, float32, A100 SXM4 80 GB" in result.stdout
    assert "arithmetic alone" in result.stdout
    small = call("roofline", "resnet18", "--input-size", "1,3,64,64").stdout
    assert "resnet18, input 1x3x64x64, bfloat16, H200" in small


class Certificate(NamedTuple):
    ok: bool

    def __str__(self) -> str:
        return "conv1 1e-7"


@pytest.mark.usefixtures("small_job")
@pytest.mark.parametrize("ok", [True, False])
def test_verify_shows_the_report_and_its_verdict_decides(
    ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, torch.Size]] = []

    def certify(model: nn.Module, example: torch.Tensor, **told: object) -> Certificate:
        assert not model.training
        seen.append((next(model.parameters()).dtype, example.shape))
        return Certificate(ok)

    monkeypatch.setattr(certificate, "verify", certify)
    result = call("verify", "resnet18", "--dtype", "bf16", "--batch", "3")
    assert result.exit_code == (0 if ok else 1)
    assert result.stdout == "conv1 1e-7\n"
    assert seen == [(torch.bfloat16, (3, 3, 224, 224))]


def tune(*words: str | Path) -> Result:
    return call("tune", "resnet50", "--device", "cpu", "-b", 2, "--image-size", 16, *words)


@pytest.fixture
def small_tune(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two calls to tune: the convolution and the head of the tiny network."""
    monkeypatch.setattr("resnet_fused.models.create_model", network)
    return cache


def test_tune_of_a_training_step(small_tune: Path) -> None:
    shown = tune("-d", "bf16", "--training")
    assert shown.exit_code == 0, shown.output
    assert "conv_bn_stats" in shown.stdout
    assert "conv_backward_weight" in shown.stdout


def test_tune_shows_a_table_and_where_the_cache_is(
    small_tune: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tune("-d", "fp32")
    assert first.exit_code == 0, first.output
    assert "2x3x16x16 7x7 to 8 stride 8 relu: " in first.stderr  # plain lines without a terminal
    (file,) = small_tune.glob("*.json")
    table = first.stdout.splitlines()
    assert table[1].startswith("2x3x16x16 7x7 to 8 stride 8 relu")
    assert table[-1] == f"kept in {file}"

    again = tune("-d", "fp32")
    assert again.stderr.rstrip().endswith("(known)")
    assert "(known)" not in tune("-d", "fp32", "--force").stderr
    tune("-d", "bf16")
    monkeypatch.setattr("resnet_fused.env._devices", lambda: [torch.device("cpu")])
    doctor = call("doctor")
    assert f"4 calls in {file}" in doctor.stdout


def test_tune_exits_with_1_where_nothing_answers_rightly(
    small_tune: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resnet_fused.tuning.measure import _Answers

    monkeypatch.setattr(_Answers, "fault", lambda self, run: "wrong")
    result = tune("-d", "fp32")
    assert result.exit_code == 1
    assert "none was right" in result.stdout


def test_tune_refuses_a_cache_that_cannot_be_written_before_it_measures(
    small_tune: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_tune / "file").write_text("")
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(small_tune / "file"))
    monkeypatch.setattr("resnet_fused.bench.tune.tune_calls", lambda *args: pytest.fail("it ran"))
    result = tune("-d", "fp32")
    assert result.exit_code == 2, result.output
    said = f"RESNET_FUSED_CACHE_DIR: cannot write to {small_tune / 'file'}: File exists"
    assert result.stderr == f"resnet-fused: {said}\n"


def test_tune_says_where_choices_are_not_in_force(
    small_tune: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_requested, "_name", "reference")
    result = tune("-d", "fp32")
    assert result.exit_code == 0, result.output
    assert "RESNET_FUSED_BACKEND is reference: choices are in force where it" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_says_what_is_missing() -> None:
    result = call("tune", "resnet18")
    assert result.exit_code == 2
    assert result.stderr.startswith("resnet-fused: --device: no usable CUDA device here")
    assert len(result.stderr.splitlines()) == 1


def test_tune_on_a_terminal_shows_a_bar(small_tune: Path) -> None:
    from rich.console import Console

    from resnet_fused.bench import tune as command

    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    command.run(
        "resnet50",
        batch=2,
        image_size=16,
        dtype="fp32",
        device="cpu",
        training=False,
        force=False,
        console=console,
    )
    shown = console.file.getvalue()
    assert "2/2" in shown
    assert "0:00:00" in shown


def test_doctor_names_versions_and_backends() -> None:
    result = call("doctor")
    assert result.exit_code == 0
    for word in (torch.__version__, "python", "native extension", "onednn", "reference"):
        assert word in result.stdout


def test_doctor_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fused import env

    findings = [env.Finding("cuda", False, "no [cuda] driver", "install one")]
    monkeypatch.setattr(env, "diagnose", lambda: findings)
    result = call("doctor")
    assert result.exit_code == 0
    assert "no [cuda] driver" in result.stdout
    assert "-> install one" in result.stdout
    assert call("doctor", "--strict").exit_code == 1


@pytest.mark.parametrize(
    "command",
    [(), ("bench",), ("flops",), ("roofline",), ("verify",), ("tune",), ("doctor",)],
)
def test_help_teaches(command: tuple[str, ...]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout


def test_version() -> None:
    import resnet_fused

    assert call("--version").stdout == f"resnet_fused {resnet_fused.__version__}\n"


def test_python_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "resnet_fused", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("resnet_fused ")


def test_the_benchmark_modules_import_no_optional_package() -> None:
    modules = (
        "chart compare contenders job memory networks peers photos progress results tables tune"
    )
    code = (
        "import sys, importlib\n"
        f"[importlib.import_module('resnet_fused.bench.' + m) for m in '{modules}'.split()]\n"
        "import resnet_fused.cli\n"
        "print([m for m in ('sklearn', 'matplotlib', 'PIL', 'onnxruntime', 'openvino', 'onnx') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
