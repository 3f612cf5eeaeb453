"""Builds the CUDA sources as C++ for the host and loads them: the same kernels, without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).parent / "cuda_on_host"
FLAGS = ["-O1", "-std=c++17", "-mfma", "-mf16c", "-fPIC", "-fvisibility=hidden", "-Wall",
         "-Wno-unknown-pragmas"]  # fmt: skip
SANITIZERS = {
    "": [],
    "address": ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-g1", "-fsanitize=thread"],
}
#: Which of them the module is compiled for; ``sanitize.py`` sets it.
SANITIZER = ""


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


@functools.cache
def build(sanitizer: str = "") -> Path:
    """Return the extension, built if a source has changed; skips where it cannot be."""
    for package in ("pybind11", "ninja"):
        pytest.importorskip(package)
    import ninja

    sys.path.insert(0, str(ROOT / "csrc"))
    import build_plan

    if build_plan.cxx_fault() or os.uname().machine != "x86_64":
        pytest.skip(build_plan.cxx_fault() or "float16 is converted by x86 instructions")
    extra = SANITIZERS[sanitizer]
    folder = ROOT / "build" / f"cuda_on_host_{sanitizer}".rstrip("_")
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*sorted(ROOT.glob("csrc/cuda/*.c*")), *sorted(SHIM.glob("*.cpp"))]
    # CUTLASS's kernels do not run on the host; their bindings do, over a table of plain loops.
    sources = [s for s in sources if s.suffix in (".cu", ".cpp") and not s.match("*_sm90.cu")]
    command = [*compiler(), *FLAGS, f"-I{SHIM}", *build_plan.includes()]
    command += ['-DRF_CUDA_ARCHS="host"', "-DRF_SM90", "-MMD", "-MF"]
    lines = ["rule cxx", "  deps = gcc", "  depfile = $out.d"]
    lines += [f"  command = {shlex.join(command)} $out.d $sanitize -x c++ -c $in -o $out"]
    lines += ["rule link", f"  command = {shlex.join([*compiler(), *extra])} -shared $in -o $out"]
    for source in sources:
        lines += [f"build {source.name}.o: cxx {source}"]
        if source.name != "block.cpp":
            lines += [f"  sanitize = {shlex.join(extra)}"]
    lines += [f"build _cuda_on_host.so: link {' '.join(f'{s.name}.o' for s in sources)}", ""]
    with FileLock(folder / "lock"):
        (folder / "build.ninja").write_text("\n".join(lines))
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), "--quiet"]
        # The compiler does not bear a sanitizer's runtime, which is for the tests.
        plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "_cuda_on_host.so"


@functools.cache
def load() -> ModuleType:
    """Return the module; under ``sanitize.py`` the one that is built with sanitizers."""
    spec = importlib.util.spec_from_file_location("_cuda_on_host", build(SANITIZER))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
