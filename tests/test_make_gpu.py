"""`make gpu-test` and `make gpu-sanitize`: what they run, and that no GPU is no success."""

import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def make(target: str, python: str, **environment: str) -> subprocess.CompletedProcess:
    # `make test` hands its own flags and depth to what it starts: this is a make of its own.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", "--no-print-directory", target, "VENV=0", f"PYTHON={python}"],
        cwd=ROOT, env={**inherited, "CUDA_HOME": "/nonexistent", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("target", ["gpu-test", "gpu-sanitize"])
def test_without_a_gpu(target):
    done = make(target, sys.executable)
    assert done.returncode != 0
    assert done.stdout == ""
    line, by_make = done.stderr.splitlines()
    assert line == f"nothing was tested: torch {torch.__version__} sees no CUDA GPU"
    assert by_make.startswith("make: ***")


def test_without_the_sanitizer(tmp_path):
    done = make("gpu-sanitize", script(tmp_path / "python", "exit 0"))
    assert done.returncode != 0
    line, _ = done.stderr.splitlines()
    assert line.startswith("nothing was tested: compute-sanitizer is neither on PATH nor")


TOOLS = ("memcheck", "racecheck", "initcheck")


@pytest.mark.parametrize("fails", [None, *TOOLS])
def test_the_sanitizer_s_tools(tmp_path, fails):
    """A finding of one tool is a failure, whatever the others find; all of them run."""
    (tmp_path / "bin").mkdir()
    script(
        tmp_path / "bin" / "compute-sanitizer",
        f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" > {tmp_path}/$2; test "$2" != "{fails}"',
    )
    python = script(tmp_path / "python", "exit 0")
    done = make("gpu-sanitize", python, CUDA_HOME=str(tmp_path))
    assert (done.returncode == 0) == (fails is None), done.stderr
    for tool in TOOLS:
        call = (tmp_path / tool).read_text()
        started = f"1 --tool {tool} --error-exitcode 1 {python} -m pytest --numprocesses 5 tests/"
        assert call.startswith(started)


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_sanitized(tool):
    """Kernels of ours, without graphs and whole networks; some files need a GPU to have tests."""
    text = make(f"gpu-{tool}", "true", MAKEFLAGS="-n").stdout
    selection = text.rpartition("-m pytest ")[2].partition(") ")[2].replace("\\\n", " ")
    arguments = shlex.split(selection)
    files = [argument for argument in arguments if argument.startswith("tests/")]
    assert len(files) == 5
    assert all((ROOT / file).is_file() for file in files)
    command = [sys.executable, "-m", "pytest", "--collect-only", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    of_hopper = [t for t in tests if "test_gpu_hopper_gemm.py::test_edges" in t]
    assert bool(of_hopper) == (tool != "initcheck"), done.stdout
    of_ops = [test for test in tests if "tests/ops" in test]
    assert all("triton" in test or "cuda" in test for test in of_ops)
    assert not [t for t in tests if "graph" in t or "32_bits" in t or "of_a_resnet" in t]


def test_a_test_that_fails_is_a_failure(tmp_path):
    python = script(tmp_path / "python", 'test "$1 $2" != "-m pytest"')
    assert make("gpu-test", python).returncode != 0
    assert make("gpu-test", script(tmp_path / "good", "exit 0")).returncode == 0
