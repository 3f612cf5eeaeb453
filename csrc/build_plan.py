"""What of the native extension to build: the environment and the tools found → a plan.

``setup.py`` loads this file by its place; it imports nothing but the standard library.
"""

import functools
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
#: What torch.utils.cpp_extension reads names in TORCH_CUDA_ARCH_LIST as.
NAMED_ARCHS = {
    "Kepler": "3.5+PTX",
    "Kepler+Tesla": "3.7",
    "Maxwell": "5.0 5.2+PTX",
    "Maxwell+Tegra": "5.3",
    "Pascal": "6.0 6.1+PTX",
    "Volta": "7.0+PTX",
    "Volta+Tegra": "7.2",
    "Turing": "7.5+PTX",
    "Ampere": "8.0 8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX",
    "Blackwell+Tegra": "11.0",
}
#: What a C++ compiler is tried with: OpenMP, and for each instruction set the pragma and one
#: intrinsic of its kernels. Clang ignores the pragmas, GCC before 10 does not know the last.
CXX_PROBE = """
#include <Python.h>
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
__m256 avx2(__m256 v) { return _mm256_fmadd_ps(v, v, v); }
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
__m512 avx512(__m512 v) { return _mm512_maskz_mov_ps(1, v); }
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
__m512 bf16(__m512 v, __m512bh w) { return _mm512_dpbf16_ps(v, w, w); }
#endif
int threads() { return omp_get_max_threads(); }
"""
#: What the assembler is tried with for AMX, which it has to know: binutils do from 2.36 on.
AMX_PROBE = """
void amx(const void* p) {
#if defined(__x86_64__)
  asm volatile("tileloadd (%0,%0,1), %%tmm0; tdpbf16ps %%tmm2, %%tmm1, %%tmm0" ::"r"(p));
#else
#error no x86-64
#endif
}
"""
#: What nvcc is tried with, linked as the extension is.
NVCC_PROBE = """
#include <cuda_bf16.h>
__global__ void kernel() {}
int run() { kernel<<<1, 1>>>(); return cudaGetLastError(); }
"""
NVCC_LINK = ["-shared", "-cudart", "static", "-forward-unknown-to-host-compiler"]


class Nvcc(NamedTuple):
    """A CUDA compiler: its path, its version, and the architectures it knows, such as "90a"."""

    path: str
    version: tuple[int, int]
    archs: frozenset[str]

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
            built += ", the Hopper 1x1 convolution among them"
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
        return Plan(nvcc, archs, None, (*notes, f"no Hopper 1x1 convolution: {tools.cutlass}"))
    plan = Plan(nvcc, archs, tools.cutlass, notes)
    if not plan.hopper:
        plan = plan._replace(notes=(*notes, "no Hopper 1x1 convolution: 9.0a is not among them"))
    return plan


def without_cuda(environment: Mapping[str, str], reason: str) -> Plan:
    """Return the plan for the CPU alone; SystemExit if CUDA was asked for."""
    if environment.get("RESNET_FUSED_CUDA") == "1":
        raise SystemExit(f"RESNET_FUSED_CUDA=1: {reason}")
    return Plan(None, (), None, (f"no CUDA kernels: {reason}",))


def architectures(asked: str | None, nvcc: Nvcc) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the architectures to build for, and notes on those left out.

    What these kernels cannot run on is left out. What nvcc does not know is an error if it was
    asked for by number, in the syntax of TORCH_CUDA_ARCH_LIST: 8.0, 9.0a, 10.0+PTX or a name of
    NAMED_ARCHS, between spaces or semicolons.
    """
    archs, notes = [], []
    entries = re.split(r"[;\s]+", (asked or DEFAULT_ARCHS).strip("; \t\n"))
    if entries == [""]:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST={asked!r} names no architecture; unset it to build for "
            f"{DEFAULT_ARCHS!r}, or write such numbers"
        )
    by_number = asked and {entry for entry in entries if entry not in NAMED_ARCHS}
    for entry in " ".join(NAMED_ARCHS.get(entry, entry) for entry in entries).split():
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if entry == "native":
            raise SystemExit(
                "TORCH_CUDA_ARCH_LIST: 'native' would ask a GPU, which a build here never does; "
                "write its compute capability, such as 9.0a for an H100 "
                "(nvidia-smi --query-gpu=compute_cap --format=csv)"
            )
        if not match:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is not an architecture; expected numbers such as "
                f"{DEFAULT_ARCHS!r} or names such as Ampere, between spaces or semicolons"
            )
        number, arch = int(match[1] + match[2]), match[1] + match[2] + match[3]
        if number < LEAST_ARCH:
            notes.append(f"no kernels for {entry}, as they need 8.0")
        elif arch in nvcc.archs:
            archs.append(arch + (match[4] or ""))
        elif by_number and entry in by_number:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: {nvcc} does not know {entry!r}; it knows {known(nvcc)}"
            )
        else:
            notes.append(f"no kernels for {entry}, which {nvcc} does not know")
    if not archs:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={asked!r}: {'; '.join(notes)}; add one from 8.0 on")
    return tuple(dict.fromkeys(archs)), tuple(notes)


def known(nvcc: Nvcc) -> str:
    """Return the architectures that the kernels run on and ``nvcc`` knows, as one asks for them."""
    numbers = sorted((int(arch.rstrip("af")), arch) for arch in nvcc.archs)
    return " ".join(
        f"{number // 10}.{number % 10}{arch.lstrip('0123456789')}"
        for number, arch in numbers
        if number >= LEAST_ARCH
    )


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
        # The list has no suffixes; the help names every value of its options.
        version, archs, values = (
            subprocess.run([path, option], capture_output=True, text=True, check=True).stdout
            for option in ("--version", "--list-gpu-arch", "--help")
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{path} does not run: {error}"
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None:
        return f"{path} --version names no release"
    found = re.findall(r"compute_(\d+)", archs) + re.findall(r"compute_(\d+[af])\b", values)
    return Nvcc(path, (int(release[1]), int(release[2])), frozenset(found))


def find_cutlass(environment: Mapping[str, str]) -> Path | str:
    """Return the folder that holds CUTLASS's ``include``, or why there is none."""
    roots = [Path(environment["CUTLASS_PATH"])] if environment.get("CUTLASS_PATH") else []
    spec = importlib.util.find_spec("cutlass_library")  # found, not imported
    packages = list((spec and spec.submodule_search_locations) or ())
    # pip's isolated builds run the interpreter that is installed into, with its packages hidden.
    packages += [f"{sysconfig.get_path(p)}/cutlass_library" for p in ("purelib", "platlib")]
    roots += [Path(p, "source") for p in packages]
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
    fault = probe([*cxx(), "-fopenmp", *includes()], ".cpp", CXX_PROBE)
    if not fault:
        return None
    return f"{cxx()[0]} cannot compile C++17 with OpenMP and GCC's target pragmas ({fault})"


@functools.cache
def knows_amx() -> bool:
    """Return whether the kernels for AMX can be built here."""
    return probe(cxx(), ".cpp", AMX_PROBE) is None


def cxx() -> list[str]:
    """Return the C++ compiler as it makes a shared library."""
    name = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    return [*shlex.split(name), "-std=c++17", "-shared", "-fPIC"]


def nvcc_fault(nvcc: Nvcc) -> str | None:
    """Return why ``nvcc`` compiles or links nothing here, or None."""
    command = [nvcc.path, *host_compiler(), *NVCC_LINK, "-Xcompiler", "-fPIC"]
    fault = probe(command, ".cu", NVCC_PROBE)
    advice = (
        "set CXX to a C++ compiler it accepts, and see that the CUDA headers and the static "
        "runtime are installed"
    )
    return f"{nvcc} cannot build here ({fault}); {advice}" if fault else None


def probe(compiler: list[str], suffix: str, program: str) -> str | None:
    """Return the first error of the compiler, or of its linker, with ``program``, or None."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe" + suffix)
        source.write_text(program)
        command = [*compiler, str(source), "-o", str(source) + ".so"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return str(error)
    if done.returncode == 0:
        return None
    said = (done.stderr + done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
    return next((x for x in said if "error" in x or "cannot find" in x), said[0]).strip()


def host_compiler() -> list[str]:
    """Return nvcc's argument that names the C++ compiler asked for by CXX, if any."""
    words = [w for w in shlex.split(os.environ.get("CXX", "")) if not w.startswith("-")]
    return ["-ccbin", words[-1]] if words else []


def includes() -> list[str]:
    """Return the include paths of Python and pybind11."""
    import pybind11

    return [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]


def lasting_includes(folder: Path) -> list[str]:
    """Return :func:`includes` by paths that are the same in the next build.

    An isolated build has pybind11 in an environment of its own, whose path would be in each
    command and whose files are new each time. So it is reached by a link with the version in its
    name, as a system's headers, of which no command is compiled again.
    """
    import pybind11

    python, _ = includes()
    link = folder / f"pybind11-{pybind11.__version__}"
    link.unlink(missing_ok=True)
    link.symlink_to(pybind11.get_include())
    return [python, f"-isystem{link}"]
