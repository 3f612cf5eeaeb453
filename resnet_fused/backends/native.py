"""The compiled extension ``resnet_fused._C``: this is the only file that imports it."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

# torch goes first: the extension then uses torch's own OpenMP threads instead of a second pool.
import torch
from torch import Tensor

#: The dtypes with kernels, as the extension names them.
DTYPE_NAMES = {
    torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16",
}  # fmt: skip
#: Bytes that an access of a CUDA kernel has at most, and its address is a multiple of.
ALIGNMENT = 16
#: What the functions of the extension take and do, by the number in ``csrc/bindings.cpp``.
INTERFACE = 15


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        extension = importlib.import_module("resnet_fused._C")
    except ImportError as error:
        return None, str(error)
    except Exception as error:  # whatever a broken one raises, all works without it
        return None, f"its import raised {type(error).__name__}: {error}; rebuild it"
    if (found := getattr(extension, "interface", None)) != INTERFACE:
        return None, (
            f"it was built from other sources (interface {found}, needed {INTERFACE}): rebuild it"
        )
    return extension, None


def extension() -> ModuleType | None:
    """Return the extension, or None where it was not built or does not load."""
    return _load()[0]


def load_error() -> str | None:
    """Return the loader's own words, or None where the extension is loaded."""
    return _load()[1]


def loaded() -> ModuleType:
    """Return the extension where a backend's ``available()`` has found it."""
    module = extension()
    assert module is not None, "available() is asked before"
    return module


def cuda_kernels() -> ModuleType:
    """Return the CUDA kernels where the ``cuda`` backend's ``available()`` has found them."""
    kernels: ModuleType = loaded().cuda
    return kernels


def kernels_on(device: torch.device) -> tuple[ModuleType, tuple[int, ...]]:
    """Return the kernels for tensors on ``device``, and what they take last: a CUDA stream."""
    if device.type == "cpu":
        return loaded(), ()
    return cuda_kernels(), (torch.cuda.current_stream(device).cuda_stream,)


def run(device: torch.device, kernel: str, *args: Any) -> None:
    """Run a kernel on ``device``, on a GPU in its current stream."""
    kernels, queue = kernels_on(device)
    if device.type == "cpu":
        getattr(kernels, kernel)(*args, *queue)
    else:
        with torch.cuda.device(device):
            getattr(kernels, kernel)(*args, *queue)


def address(t: Tensor | None) -> int:
    """Return where a tensor's values lie, 0 for None."""
    return 0 if t is None else t.data_ptr()


def as_map(t: Tensor) -> Tensor:
    """Return a map as kernels read it in whole accesses: dense, channels_last, aligned."""
    t = t.detach().contiguous(memory_format=torch.channels_last)
    return t.clone() if t.data_ptr() % ALIGNMENT else t


def as_image(t: Tensor) -> Tensor:
    """Return an input as the CPU's kernels read it: channels_last, each element aligned."""
    t = t.contiguous(memory_format=torch.channels_last)
    return t.clone() if t.data_ptr() % t.element_size() else t


def as_vector(vector: Tensor | None) -> Tensor | None:
    """Return a scale or shift as the kernels read it: float32, contiguous."""
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous()):
        return vector
    return vector.detach().float().contiguous()
