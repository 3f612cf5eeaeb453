"""Compilation in processes of their own, into a cache of their own, without the interpreter."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

WORKERS = 2


def _begin(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


@contextmanager
def compilers(cache: Path) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, context, _begin, (str(cache),)) as pool:
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
