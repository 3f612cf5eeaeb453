"""Compilation in processes of their own, into a cache of their own, without the interpreter."""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

WORKERS = 2
#: Where `make test` puts a Triton that has im2col descriptors, as the pinned one has none.
NEWER_TRITON = Path(__file__).parents[3] / ".venv" / "newer-triton"


def _begin(cache: str, packages: str | None) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    if packages is not None:
        sys.path.insert(0, packages)
        import triton

        assert Path(triton.__file__).is_relative_to(packages)


@contextmanager
def compilers(cache: Path, packages: Path | None = None) -> Iterator[ProcessPoolExecutor]:
    """Two processes; ``packages`` is a folder that comes first on their path."""
    context = multiprocessing.get_context("spawn")
    begin = (str(cache), None if packages is None else str(packages))
    with ProcessPoolExecutor(WORKERS, context, _begin, begin) as pool:
        yield pool


def compiled(problem, dtype, config, capability, precision="tf32", act="relu"):
    from resnet_fused.backends.triton import aot

    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    return aot.compile_conv(problem, dtype, config, capability, act)


def compiled_launches(build, precision, capability, *args):
    """The kernels of the launches that ``build(*args)`` returns, on tensors without data."""
    from resnet_fused.backends.triton import aot

    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    return [aot.compile_launch(step, capability) for step in build(*args)]


def left_running(build, precision, capability, *args):
    """Of each such kernel, its name and the operands of products that it leaves running."""
    from async_dots import pending_operands

    from resnet_fused.backends.triton import aot

    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    made = [(step, aot.built(step, capability)) for step in build(*args)]
    return [(s.kernel.fn.__name__, pending_operands(kernel.asm["ttgir"])) for s, kernel in made]
