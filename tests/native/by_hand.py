"""Builds the extension with AMX's tiles computed by hand, and runs tests on it."""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import on_host

#: What ``csrc/cpu/amx.h`` computes tiles by hand for.
BY_HAND = "-DRF_AMX_BY_HAND"


def build(name: str, *flags: str) -> Path:
    """Return the extension with the CPU kernels, built if a source has changed."""
    folder = on_host.ROOT / "build" / name
    environment = {
        **os.environ,
        "CXXFLAGS": " ".join((BY_HAND, *flags)),
        "LDFLAGS": " ".join(flags),
        "RESNET_FUSED_CUDA": "0",
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    subprocess.run(command, cwd=on_host.ROOT, env=environment, check=True)
    return next((folder / "lib").rglob("_C*.so"))


def load(extension: str) -> None:
    """Put an extension in the place of the built one, before anything has imported that."""
    import torch  # noqa: F401 - goes first, for its OpenMP threads

    loader = importlib.machinery.ExtensionFileLoader("resnet_fused._C", extension)
    spec = importlib.util.spec_from_loader("resnet_fused._C", loader)
    assert spec is not None
    sys.modules["resnet_fused._C"] = module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
