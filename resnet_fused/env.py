"""What this machine and this installation are: versions, devices, backends, and what is missing.

`collect` is the one place that benchmark records take their conditions from; `diagnose` is what
`resnet-fused doctor` shows.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = (
    "numpy", "triton", "torchvision", "timm", "onnxruntime", "openvino", "scikit-learn", "pillow",
    "matplotlib", "onnx", "onnxscript", "jax", "jaxlib",
)  # fmt: skip


def collect() -> dict[str, Any]:
    """Return the conditions that a number measured here holds under, ready for JSON.

    Versions of what is not installed are None. Nothing is compiled; where torch sees a GPU, its
    name is asked for.
    """
    from resnet_fused.backends import _device

    return {
        "resnet_fused": version("resnet_fused"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "cudnn": torch.backends.cudnn.version(),
        "clocks": clocks(),
        "compiler": _compiler(),
        "packages": {name: found for name in PACKAGES if (found := version(name))},
        "os": platform.platform(),
        "cpu": _device.name(torch.device("cpu")),
        "cpu_isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpus": _gpus(),
        "tuned": {str(d): len(_choices(d)[1]) for d in _devices() if d.type == "cuda"},
        "native": native_error() is None,
        "native_isa": native_isa(),
    }


def version(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "resnet_fused":  # run from a checkout that was never installed
            import resnet_fused

            return resnet_fused.__version__
        return None


def commit() -> str | None:
    """Return the commit of the checkout this package lies in, "+changes" if it has any, or None.

    A package installed inside somebody else's checkout does not count.
    """
    here = Path(__file__).parent
    if not _output("git", "-C", str(here), "ls-files", Path(__file__).name):
        return None
    number = _output("git", "-C", str(here), "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no", ".")
    return f"{number}+changes" if number and changes else number


def native_isa() -> str | None:
    """Return the instruction set of the CPU kernels, or None without the extension."""
    from resnet_fused.backends import native

    extension = native.extension()
    return None if extension is None else str(extension.cpu_isa())


def native_error() -> str | None:
    """Return the loader's own words about the native extension, or None where it is loaded."""
    from resnet_fused.backends import native

    return native.load_error()


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what it is about, how it is, and what can be done."""

    name: str
    good: bool
    state: str
    advice: str = ""


def diagnose() -> list[Finding]:
    """Return a finding per backend, one for the native extension, one for what it lacks."""
    import resnet_fused as rf

    error = native_error()
    advice = "rebuild it with `make build` or `pip install .`; everything works without it"
    state = error or f"loaded, on the CPU for {native_isa()}"
    findings = [Finding("native extension", error is None, state, advice if error else "")]
    for backend in rf.backends():
        state = "available" if backend.available else backend.reason
        findings.append(Finding(backend.name, backend.available, state, backend.advice))
    return [*findings, *_hopper_findings(), *_environment_findings()]


def _environment_findings() -> list[Finding]:
    """Return what the environment asks for and cannot have: a backend, a place for choices."""
    from resnet_fused.backends import _tuned_file, backends, requested

    found, fault = [], ""
    try:
        if requested() in [backend.name for backend in backends() if not backend.available]:
            fault = f"RESNET_FUSED_BACKEND: {requested()} is not available"
    except ValueError as error:
        fault = str(error)
    if fault:
        found.append(Finding("asked for", False, fault))
    folder = _tuned_file.directory()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        state = f"{folder} cannot be written to, so `resnet-fused tune` keeps nothing"
        advice = "let RESNET_FUSED_CACHE_DIR name a directory of yours"
        found.append(Finding("choices", False, state, advice))
    return found


def _hopper_findings() -> list[Finding]:
    """Return what is missing of the CUDA kernels, where they were built."""
    from resnet_fused.backends import _hopper_gemm, native

    if not hasattr(native.extension(), "cuda") or not (reason := _hopper_gemm.missing()):
        return []
    return [Finding("cuda 1x1 convolution", False, reason, _hopper_gemm.ADVICE)]


def facts() -> list[tuple[str, str]]:
    """Return `collect` as labelled lines for reading."""
    from resnet_fused.backends import _requested

    found = collect()
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    cpu = f"{found['cpu']}, {found['cores']} cores, {found['cpu_isa']}"
    return [
        ("resnet_fused", " ".join(filter(None, [found["resnet_fused"], found["commit"]]))),
        ("python", f"{found['python']} on {found['os']}"),
        ("torch", f"{found['torch']}, CUDA {found['cuda'] or 'not built in'}"),
        ("packages", packages),
        ("compiler", found["compiler"] or "none found (gcc builds the native extension)"),
        ("driver", found["driver"] or "no NVIDIA driver"),
        ("cpu", cpu),
        ("threads", str(found["threads"])),
        ("backend", _requested.name()),
        ("gpus", ", ".join(found["gpus"]) or "none that torch can use"),
        *[("tuned", _tuned(device)) for device in _devices()],
    ]


def show(console: Console) -> bool:
    """Print `facts` and `diagnose`; return whether anything is missing."""
    for name, text in facts():
        console.print(f"[bold]{name:<13}[/bold]", end="")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print("\n[bold]backends[/bold], in order of preference")
    findings = diagnose()
    for finding in findings:
        mark = "[green]yes[/green]" if finding.good else "[yellow]no [/yellow]"
        console.print(f"  {mark} {finding.name:<17}", end="")
        console.print(finding.state, markup=False, highlight=False, soft_wrap=True)
        if finding.advice:
            console.print(f"      -> {finding.advice}", markup=False, soft_wrap=True)
    return any(not finding.good for finding in findings)


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _compiler() -> str | None:
    text = _output("c++", "--version")
    return text.splitlines()[0] if text else None


#: For how long, since its driver was loaded, a GPU held its clocks down to stay within its power.
POWER_CAPPED = "clocks_event_reasons_counters.sw_power_cap"


def clocks() -> dict[str, str]:
    """Return clocks and power as the drivers tell them: what a GPU runs at, or each CPU core."""
    found: dict[str, str] = {}
    # Drivers that do not know one of those asked for answer none, and older ones have no counter.
    for asked in ("clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu", POWER_CAPPED):
        if text := _output("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"):
            values = text.splitlines()[0].split(", ")
            found |= dict(zip(asked.split(","), values, strict=False))
    if found:
        return found
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    speeds = [line.partition(":")[2].strip() for line in lines if line.startswith("cpu MHz")]
    return {"cpu MHz": ", ".join(speeds)} if speeds else {}


def _driver() -> str | None:
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0] if text else None


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(device) for device in _devices() if device.type == "cuda"]


def _devices() -> list[torch.device]:
    """Return the GPUs, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _choices(device: torch.device) -> tuple[Path, dict[Any, Any], str]:
    """Return the cache file of measured choices, what it holds, and what is wrong with it."""
    from resnet_fused.backends import _tuned_file

    file = _tuned_file.path(device)
    try:
        return file, _tuned_file.read(file, _tuned_file.conditions(device)), ""
    except (OSError, _tuned_file.Unusable) as error:
        return file, {}, str(error)


def _tuned(device: torch.device) -> str:
    file, choices, fault = _choices(device)
    if fault:
        return f"{file} cannot be used: {fault}"
    if choices:
        return f"{len(choices)} calls in {file}"
    command = f"resnet-fused tune MODEL{' --device cpu' if device.type == 'cpu' else ''}"
    return f"no calls yet; `{command}` writes {file}"
