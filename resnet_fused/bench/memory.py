"""Peak memory of a contender: what it adds to the process, from before it exists to a forward.

On a CPU this is resident memory as the kernel counts it (`VmHWM`, reset before the forward), so it
covers weights, activations, workspaces and any runtime a peer loads, whoever allocates them. On
CUDA it is torch's own count of allocated bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path
from typing import Protocol

import torch

MIB = 2**20
NOTES = {
    "cpu": "peak MiB: growth of the process's resident memory, from before the contender was "
    "built to its highest point in a forward (weights, activations, workspaces, libraries)",
    "cuda": "peak MiB: growth of torch's allocated CUDA memory, from before the contender was "
    "built to its highest point in a forward",
}


class Meter(Protocol):
    """Reads the memory of one device, in bytes; None where the system does not tell."""

    def now(self) -> int | None:
        """Return what is held now, after giving back what is only kept for later."""

    def restart(self) -> None:
        """Forget the highest point so far."""

    def peak(self) -> int | None:
        """Return the highest point since `restart`."""


class ResidentMeter:
    """Resident memory of this process, by Linux's `/proc/self`."""

    status = Path("/proc/self/status")
    clear_refs = Path("/proc/self/clear_refs")

    def now(self) -> int | None:
        """Return the resident bytes after returning freed heap pages to the system."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)
        return self._read("VmRSS")

    def restart(self) -> None:
        """Set the highest point to what is resident now ("5", see proc(5))."""
        self.resets = True
        try:
            self.clear_refs.write_text("5")
        except OSError:
            self.resets = False

    def peak(self) -> int | None:
        """Return the highest resident bytes since `restart`; None where it could not restart."""
        return self._read("VmHWM") if self.resets else None

    def _read(self, field: str) -> int | None:
        with contextlib.suppress(OSError):
            for line in self.status.read_text().splitlines():
                name, _, value = line.partition(":")
                if name == field:
                    return int(value.split()[0]) * 1024
        return None


class CudaMeter:
    """Memory that torch has allocated on the current CUDA device."""

    def now(self) -> int | None:
        """Return the allocated bytes."""
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def restart(self) -> None:
        """Set the highest point to what is allocated now."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Return the highest allocated bytes since `restart`."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def meter_for(device: str) -> Meter:
    """Return the meter of `device`."""
    return CudaMeter() if device == "cuda" else ResidentMeter()


def growth_mib(before: int | None, peak: int | None) -> float | None:
    """Return `peak - before` in MiB, or None where either is not known."""
    if before is None or peak is None:
        return None
    return max(0, peak - before) / MIB
