"""The command `inspect`: what it shows, and what it says about options that it does not take."""

import pytest
import torch
from typer.testing import CliRunner, Result

from resnet_fused.backends.triton.shapes import Problem
from resnet_fused.cli import app
from resnet_fused.inspection import convolutions, parse_shape


def call(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "140"}).invoke(app, ["inspect", *words])


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("compiler")
def test_a_shape_whose_k_is_split_has_two_kernels():
    result = call("--shape", "1,512,7,7,512,3,1", "--arch", "80", "--dtype", "fp16")
    assert result.exit_code == 0, result.output
    for word in ("fp16, sm_80", "1x512x7x7", "3x3 512", "mma.sync", "async 16", "+ affine_kernel"):
        assert word in result.stdout


@pytest.mark.usefixtures("compiler")
def test_a_model_has_a_row_per_distinct_convolution():
    result = call("--model", "cifar_resnet20", "--batch", "1", "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("1x")]
    distinct = convolutions("cifar_resnet20", 1, torch.bfloat16)
    assert len(rows) == len(distinct)
    assert rows[0][:4] == ["1x3x224x224", "3x3", "16", "1"]


def test_parse_shape():
    problem = Problem.of((2, 64, 9, 8), (32, 64, 3, 3), (2, 2), (1, 1), (1, 1), 1, False)
    assert parse_shape("--shape", "2,64,9,8,32,3,2") == problem


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--model or --shape: one of the two is needed"),
        (("-m", "resnet18", "--shape", "1,1,1,1,1,1,1"), "--model or --shape: one of the two"),
        (("-m", "resnet5"), "--model: unknown value 'resnet5'; did you mean resnet50"),
        (("--shape", "1,2,3"), "--shape: '1,2,3' given; accepted: N,C,H,W,O,K,stride"),
        (("--shape", "1,2,3,4,5,6,x"), "--shape: 'x' given; accepted: a whole number"),
        (("--shape", "1,4,1,1,4,8,0"), "--shape: '0' given"),
        (("-m", "resnet18", "--arch", "70"), "--arch: unknown value '70'; "),
        (("-m", "resnet18", "-b", "0"), "--batch: '0' given"),
        (("-m", "resnet18", "-d", "fp8"), "--dtype: unknown value 'fp8'; accepted: float32"),
    ],
)
def test_errors_are_one_line(words, message):
    result = call(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"resnet-fused: {message}")
    assert result.stderr.count("\n") == 1


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = call("--shape", "1,16,4,4,16,1,1")
    assert (result.exit_code, "unset it" in result.stderr) == (2, True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = call("--shape", "1,16,4,4,16,1,1")
    assert (result.exit_code, "triton is not installed" in result.stderr) == (2, True)
