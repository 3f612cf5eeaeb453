"""The build: it needs no torch, works without a compiler, and refuses what it does not know."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "csrc"))
import build_plan  # noqa: E402


def setup(*command: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    pytest.importorskip("setuptools")
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=root, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
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


def test_a_compiler_is_tried_with_each_instruction_set():
    """With what the kernels' sources ask for, word for word."""
    sources = "".join(path.read_text() for path in ROOT.glob("csrc/cpu/*.cpp"))
    pragmas = set(re.findall(r"#pragma GCC target.*", sources))
    assert len(pragmas) == 3
    assert pragmas <= set(build_plan.CXX_PROBE.splitlines())


@pytest.mark.parametrize("lacks", ["GCC target", "avx512bf16", "-shared"])
def test_a_compiler_that_lacks_what_the_kernels_need(lacks, tmp_path, monkeypatch):
    """Clang, which ignores the pragma; GCC before 10; one that cannot link a library."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *"{lacks}"*) echo "error: $*" >&2; exit 1;; esac\n'
        f'for a; do case "$a" in *.cpp) if grep -q "{lacks}" "$a"; then\n'
        f'echo "error: no {lacks}" >&2; exit 1; fi;; esac; done\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "GCC's target pragmas (error: " in str(build_plan.cxx_fault())


def test_commands_do_not_name_the_environment_of_one_build(tmp_path, monkeypatch):
    """Else an isolated build, which has a new one each time, would compile all again."""
    pybind11 = pytest.importorskip("pybind11")
    commands = set()
    for environment in ("one", "two"):
        (tmp_path / environment).mkdir()
        (tmp_path / environment / "pybind11.h").write_text(environment)
        monkeypatch.setattr(pybind11, "get_include", lambda e=environment: str(tmp_path / e))
        flags = build_plan.lasting_includes(tmp_path)
        commands.add(tuple(flags))
        (link,) = (flag for flag in flags if flag.startswith("-isystem"))
        assert Path(link.removeprefix("-isystem"), "pybind11.h").read_text() == environment
    assert len(commands) == 1
    monkeypatch.setattr(pybind11, "__version__", "99.0")
    assert tuple(build_plan.lasting_includes(tmp_path)) not in commands


def test_a_source_distribution_made_without_a_compiler_builds(tmp_path):
    """It holds what a machine with a compiler needs, and what setup.py itself reads."""
    command = ["--quiet", "egg_info", "--egg-base", str(tmp_path), "sdist"]
    done = setup(*command, "--dist-dir", str(tmp_path), CXX="false")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    filtered = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.10.12, 3.11.4
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, **filtered)
    (source,) = (path.parent for path in tmp_path.glob("*/setup.py"))
    needed = [p.relative_to(ROOT) for p in ROOT.glob("csrc/**/*.*") if p.suffix != ".pyc"]
    assert len(needed) > 50
    assert not [path for path in needed if not (source / path).is_file()]
    assert not list(source.rglob("*.pyc"))
    done = setup("--quiet", "build", CXX="false", root=source)
    assert done.returncode == 0, done.stderr
    assert list(source.glob("build/lib*/resnet_fused/__init__.py"))


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
