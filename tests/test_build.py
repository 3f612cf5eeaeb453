"""The build: it needs no torch, works without a compiler, and refuses what it does not know."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setup(*command: str, **environment: str) -> subprocess.CompletedProcess:
    pytest.importorskip("setuptools")
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("value", ["yes", "", "2"])
def test_unknown_cuda_mode(value):
    done = setup("--version", RESNET_FUSED_CUDA=value)
    assert done.returncode != 0
    assert f"RESNET_FUSED_CUDA={value!r}: expected auto, 0 or 1" in done.stderr


@pytest.mark.parametrize("value", ["auto", "0"])
def test_known_cuda_modes(value):
    done = setup("--version", RESNET_FUSED_CUDA=value)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "false"])
def test_without_a_compiler_it_is_pure_python(compiler, tmp_path):
    done = setup("--quiet", "build", "--build-base", str(tmp_path), CXX=compiler)
    assert done.returncode == 0, done.stderr
    assert "pure Python, no native kernels" in done.stdout
    assert list(tmp_path.rglob("resnet_fused/__init__.py"))
    assert not list(tmp_path.rglob("*.so"))


def test_the_build_never_asks_for_torch():
    lines = (ROOT / "setup.py").read_text().splitlines()
    assert not [line for line in lines if "import torch" in line or "from torch" in line]
    project = (ROOT / "pyproject.toml").read_text()
    requires = next(line for line in project.splitlines() if line.startswith("requires ="))
    assert "torch" not in requires


def test_the_extension_links_no_torch():
    from resnet_fused.backends import native

    extension = native.extension()
    if extension is None:
        pytest.skip(f"not built: {native.load_error()}")
    linked = subprocess.run(
        ["readelf", "--dynamic", "--dyn-syms", "--wide", extension.__file__],
        capture_output=True,
        text=True,
    ).stdout
    needed = [line for line in linked.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if re.search("torch|c10|libcud", line)]
    assert not re.search(r"UND .*(torch|c10|_ZN?K?2at)", linked)
