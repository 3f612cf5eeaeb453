"""Builds the optional native extension; pyproject.toml holds all the rest.

RESNET_FUSED_CUDA=auto|0|1 (default auto) says whether the CUDA kernels are built too.
"""

import os
import subprocess
import tempfile
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def cuda_mode() -> str:
    """The value of RESNET_FUSED_CUDA, checked."""
    mode = os.environ.get("RESNET_FUSED_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"RESNET_FUSED_CUDA={mode!r}: expected auto, 0 or 1")
    if mode == "1":
        raise SystemExit("RESNET_FUSED_CUDA=1: this version has no CUDA sources; use auto or 0")
    return mode


def compiler_fault() -> str | None:
    """Why no extension can be built here, or None."""
    try:
        import pybind11
    except ImportError:
        return "pybind11 is not installed"
    import sysconfig

    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()
    program = (
        "#include <Python.h>\n#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }"
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(program)
        include = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
        command = [*compiler, "-std=c++17", "-fopenmp", *include, "-c", str(source), "-o"]
        try:
            done = subprocess.run(
                [*command, str(Path(folder, "probe.o"))], capture_output=True, text=True
            )
        except OSError as error:
            return f"no C++ compiler ({error})"
    return None if done.returncode == 0 else f"{compiler[0]} cannot compile C++17 with OpenMP"


def native() -> dict:
    """The arguments of setup() that build resnet_fused._C, empty where it cannot be built."""
    cuda_mode()
    fault = compiler_fault()
    if fault:
        print(f"resnet_fused: pure Python, no native kernels: {fault}")
        return {}
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext

    included = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.inl")]

    def changed(obj: str, src: str) -> bool:
        """Whether src or any file it may include is newer than obj."""
        newest = max(path.stat().st_mtime for path in (ROOT / src, *included))
        return newest > os.path.getmtime(obj)

    class BuildExt(build_ext):
        def run(self) -> None:
            super().run()
            print("resnet_fused: built resnet_fused._C with the CPU kernels, no CUDA kernels")

    ParallelCompile(needs_recompile=changed).install()
    extension = Pybind11Extension(
        "resnet_fused._C",
        sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in included),
        cxx_std=17,
        extra_compile_args=[
            "-O3",
            "-fopenmp",
            "-g0",
            "-Wno-uninitialized",
            "-Wno-maybe-uninitialized",
            "-fno-math-errno",
        ],
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExt}}


setup(**native())
