"""What of the native extension to build: the environment and the tools found → a plan.

``setup.py`` loads this file by its place; it imports nothing but the standard library.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

LEAST_NVCC = (12, 0)
LEAST_CUTLASS = (4, 2)  # the one the kernels were written for
LEAST_ARCH = 80
#: Ampere, Hopper with its wgmma, Blackwell; PTX of the newest for what comes after.
DEFAULT_ARCHS = "8.0;9.0a;10.0+PTX"


class Nvcc(NamedTuple):
    """A CUDA compiler: its path, its version, and the architectures it knows."""

    path: str
    version: tuple[int, int]
    archs: frozenset[int]

    def __str__(self) -> str:
        return f"nvcc {self.version[0]}.{self.version[1]}"


class Tools(NamedTuple):
    """What was found on this machine; in place of what was not, why."""

    nvcc: Nvcc | str
    cutlass: Path | str


class Plan(NamedTuple):
    """What to build. ``archs`` are as in -gencode, such as "90a" and "100+PTX"."""

    nvcc: Nvcc | None
    archs: tuple[str, ...]
    cutlass: Path | None
    #: What is left out, and why.
    notes: tuple[str, ...]

    @property
    def hopper(self) -> tuple[str, ...]:
        """The architecture for which sources by CUTLASS are compiled; empty if they are not."""
        return (
            ("90a",) if self.cutlass and "90a" in (a.partition("+")[0] for a in self.archs) else ()
        )

    def __str__(self) -> str:
        built = "the CPU kernels"
        if self.nvcc:
            archs = ", ".join(f"sm_{arch}" for arch in self.archs)
            built += f" and the CUDA kernels for {archs} ({self.nvcc})"
        if self.hopper:
            built += ", the Hopper convolution among them"
        return "; ".join([f"built resnet_fused._C with {built}", *self.notes])


# --- the decision --------------------------------------------------------------------------------


def decide(environment: Mapping[str, str], tools: Tools) -> Plan:
    """Return the plan, or raise SystemExit with one message that says what to change."""
    mode = environment.get("RESNET_FUSED_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"RESNET_FUSED_CUDA={mode!r}: expected auto, 0 or 1")
    if mode == "0":
        return without_cuda(environment, "RESNET_FUSED_CUDA=0")
    nvcc = tools.nvcc
    if isinstance(nvcc, Nvcc) and nvcc.version < LEAST_NVCC:
        least = ".".join(map(str, LEAST_NVCC))
        nvcc = f"{nvcc} at {nvcc.path} is too old; install {least} or later, or set CUDA_HOME to it"
    if isinstance(nvcc, str):
        return without_cuda(environment, nvcc)
    archs, notes = architectures(environment.get("TORCH_CUDA_ARCH_LIST"), nvcc)
    if isinstance(tools.cutlass, str):
        return Plan(nvcc, archs, None, (*notes, f"no Hopper convolution: {tools.cutlass}"))
    plan = Plan(nvcc, archs, tools.cutlass, notes)
    if not plan.hopper:
        plan = plan._replace(notes=(*notes, "no Hopper convolution: 9.0a is not among them"))
    return plan


def without_cuda(environment: Mapping[str, str], reason: str) -> Plan:
    """Return the plan for the CPU alone; SystemExit if CUDA was asked for."""
    if environment.get("RESNET_FUSED_CUDA") == "1":
        raise SystemExit(f"RESNET_FUSED_CUDA=1: {reason}")
    return Plan(None, (), None, (f"no CUDA kernels: {reason}",))


def architectures(asked: str | None, nvcc: Nvcc) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the architectures to build for, and notes on those left out.

    What these kernels cannot run on is left out. What nvcc does not know is an error if it was
    asked for, in the syntax of TORCH_CUDA_ARCH_LIST: 8.0, 9.0a, 10.0+PTX, between spaces or
    semicolons.
    """
    archs, notes = [], []
    for entry in re.split(r"[;\s]+", (asked or DEFAULT_ARCHS).strip("; \t\n")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is not an architecture; expected numbers such as "
                f"{DEFAULT_ARCHS!r}, between spaces or semicolons"
            )
        number = int(match[1] + match[2])
        if number < LEAST_ARCH:
            notes.append(f"no kernels for {entry}, as they need 8.0")
        elif number in nvcc.archs:
            archs.append(f"{number}{match[3]}{match[4] or ''}")
        elif asked:
            known = " ".join(f"{n / 10:.1f}" for n in sorted(nvcc.archs) if n >= LEAST_ARCH)
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: {nvcc} does not know {entry!r}; it knows {known}"
            )
        else:
            notes.append(f"no kernels for {entry}, which {nvcc} does not know")
    if not archs:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={asked!r}: {'; '.join(notes)}; add one from 8.0 on")
    return tuple(dict.fromkeys(archs)), tuple(notes)


def gencode(archs: tuple[str, ...]) -> list[str]:
    """Return nvcc's arguments for ``archs``."""
    flags = []
    for arch, _, ptx in (arch.partition("+") for arch in archs):
        code = f"[sm_{arch},compute_{arch}]" if ptx else f"sm_{arch}"
        flags += ["-gencode", f"arch=compute_{arch},code={code}"]
    return flags


# --- what is here --------------------------------------------------------------------------------


def find_tools(environment: Mapping[str, str]) -> Tools:
    """Look for the CUDA compiler and CUTLASS's headers."""
    return Tools(find_nvcc(environment), find_cutlass(environment))


def find_nvcc(environment: Mapping[str, str]) -> Nvcc | str:
    """Return the CUDA compiler, or why there is none."""
    homes = [environment.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    search = [os.path.join(home, "bin") for home in homes if home]
    search += [environment.get("PATH", ""), "/usr/local/cuda/bin"]
    path = shutil.which("nvcc", path=os.pathsep.join(search))
    if path is None:
        return "no nvcc in CUDA_HOME/bin, on PATH or in /usr/local/cuda/bin"
    try:
        version, archs = (
            subprocess.run([path, option], capture_output=True, text=True, check=True).stdout
            for option in ("--version", "--list-gpu-arch")
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{path} does not run: {error}"
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None:
        return f"{path} --version names no release"
    known = frozenset(int(number) for number in re.findall(r"compute_(\d+)", archs))
    return Nvcc(path, (int(release[1]), int(release[2])), known)


def find_cutlass(environment: Mapping[str, str]) -> Path | str:
    """Return the folder that holds CUTLASS's ``include``, or why there is none."""
    roots = [Path(environment["CUTLASS_PATH"])] if environment.get("CUTLASS_PATH") else []
    spec = importlib.util.find_spec("cutlass_library")  # found, not imported
    roots += [Path(p, "source") for p in (spec and spec.submodule_search_locations) or ()]
    root = next((r for r in roots if (r / "include/cutlass/version.h").is_file()), None)
    if root is None:
        return "no CUTLASS headers in CUTLASS_PATH or the package nvidia-cutlass"
    written = (root / "include/cutlass/version.h").read_text()
    numbers = dict(re.findall(r"#define CUTLASS_(MAJOR|MINOR) (\d+)", written))
    version = int(numbers.get("MAJOR", 0)), int(numbers.get("MINOR", 0))
    if version < LEAST_CUTLASS:
        least, found = (".".join(map(str, v)) for v in (LEAST_CUTLASS, version))
        return f"CUTLASS {found} in {root} is too old; install nvidia-cutlass {least} or later"
    return root


def cxx_fault() -> str | None:
    """Return why no extension can be built here, or None."""
    for name in ("pybind11", "ninja"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    cxx = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    program = "#include <Python.h>\n#include <omp.h>\nint f() { return omp_get_max_threads(); }\n"
    fault = probe([*cxx, "-std=c++17", "-fopenmp", *includes()], ".cpp", program)
    return f"{cxx[0]} cannot compile C++17 with OpenMP ({fault})" if fault else None


def nvcc_fault(nvcc: Nvcc) -> str | None:
    """Return why ``nvcc`` compiles nothing here, or None."""
    fault = probe([nvcc.path, *host_compiler()], ".cu", "#include <cuda_bf16.h>\n")
    advice = "set CXX to a C++ compiler it accepts, and see that the CUDA headers are installed"
    return f"{nvcc} cannot compile here ({fault}); {advice}" if fault else None


def probe(compiler: list[str], suffix: str, program: str) -> str | None:
    """Return the first error that the compiler finds in ``program``, or None."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe" + suffix)
        source.write_text(program)
        command = [*compiler, "-c", str(source), "-o", str(source) + ".o"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return str(error)
    if done.returncode == 0:
        return None
    said = (done.stderr + done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
    return next((line for line in said if "error" in line), said[0]).strip()


def host_compiler() -> list[str]:
    """Return nvcc's argument that names the C++ compiler asked for by CXX, if any."""
    words = [w for w in shlex.split(os.environ.get("CXX", "")) if not w.startswith("-")]
    return ["-ccbin", words[-1]] if words else []


def includes() -> list[str]:
    """Return the include paths of Python and pybind11."""
    import pybind11

    return [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
