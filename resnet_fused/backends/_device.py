"""What a device is called, how many processors it has, and the processor's last cache."""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path

import torch

#: Of an H100, for tensors that are not on a GPU: tests run kernels on the host.
_MULTIPROCESSORS = 132


def name(device: torch.device) -> str:
    """Return the maker's name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        label, _, value = line.partition(":")
        if label.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def last_cache_bytes() -> int | None:
    """Return the bytes of the first CPU's largest cache, None where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(file.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes, default=None)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many blocks a GPU runs at the same time, one on each."""
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
