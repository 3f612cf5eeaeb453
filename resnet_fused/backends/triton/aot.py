"""Compilation without a GPU: what a kernel costs on an architecture that need not be here.

The binder and the options are those of Triton's own launcher, so that a kernel is specialised as
at its launch. Not to be used where kernels are interpreted.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from resnet_fused.backends.triton import launch, launch_ends
from resnet_fused.backends.triton.launch import Launch
from resnet_fused.backends.triton.pair_tiles import Pair
from resnet_fused.backends.triton.shapes import Config, Problem
from resnet_fused.backends.triton.stem import Stem, StemConfig

_MMA = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}
_TMA = "cp.async.bulk.tensor"


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel."""

    kernel: str
    #: Per thread.
    registers: int
    #: Bytes of stack per thread: these kernels have none but for spilled registers.
    spilled: int
    #: Bytes of shared memory per block.
    shared: int
    #: "wgmma", "tcgen05", "mma.sync", several if it has products of several kinds, or "fma" without
    #: tensor cores.
    instruction: str
    #: How often each kind of load is written: "im2col", "tma", "async 16", "load 4", ..., in bytes.
    loads: dict[str, int]
    #: Whether operands are rounded to TF32 on their way from memory or shared memory.
    rounds: bool


def compile_conv(
    problem: Problem, dtype: torch.dtype, config: Config, capability: int, act: str | None = "relu"
) -> list[Compiled]:
    """Compile the kernels of one conv_bn_act with scale and shift, and the problem's residual.

    Args:
        problem: the convolution.
        dtype: float32, bfloat16 or float16.
        config: how it is cut.
        capability: of the device, such as 90.
        act: None or "relu".

    Raises:
        ValueError: the config does not fit the problem.
        RuntimeError: kernels are interpreted in this process.
    """
    outputs = problem.o * problem.groups
    x = _meta(dtype, problem.n, problem.c * problem.groups, problem.h, problem.w)
    weight = _meta(dtype, outputs, problem.c, *problem.kernel)
    vector = _meta(torch.float32, outputs)
    y = _meta(dtype, problem.n, outputs, *problem.out_size)
    residual = y if problem.residual else None
    steps = launch.conv(
        x, weight, vector, vector, residual, y, problem, config, act, capability
    )  # fmt: skip
    return [compile_launch(step, capability) for step in steps]


def compile_pair(problem: Pair, dtype: torch.dtype, config: Config, capability: int) -> Compiled:
    """Compile the kernel of one conv_bn_act_conv_bn_act, likewise, with a ReLU behind each.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    first, o = problem.first, problem.o
    x = _meta(dtype, first.n, first.c, first.h, first.w)
    y = _meta(dtype, first.n, o, *first.out_size)
    weight, weight2 = _meta(dtype, first.o, first.c, *first.kernel), _meta(dtype, o, first.o, 1, 1)
    vector, vector2 = (_meta(torch.float32, n) for n in (first.o, o))
    vectors = (vector, vector, weight2, vector2, vector2)
    residual = y if problem.residual else None
    step = launch.pair(x, weight, *vectors, residual, y, problem, config, "relu", "relu")
    return compile_launch(step, capability)


def compile_stem(
    problem: Stem, dtype: torch.dtype, config: StemConfig, capability: int
) -> list[Compiled]:
    """Compile the kernel of one conv_bn_act_max_pool with scale, shift and ReLU.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    conv = problem.conv
    x, weight = (
        _meta(dtype, conv.n, conv.c, conv.h, conv.w),
        _meta(dtype, conv.o, conv.c, *conv.kernel),
    )
    vector, y = _meta(torch.float32, conv.o), _meta(dtype, conv.n, conv.o, *problem.out_size)
    step = launch_ends.stem(x, weight, vector, vector, y, problem, config, "relu")
    return [compile_launch(step, capability)]


def compile_head(
    shape: Sequence[int], classes: int, dtype: torch.dtype, capability: int
) -> list[Compiled]:
    """Compile the kernels of one avg_pool_linear of a map (N, C, H, W), with bias.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    x, weight = _meta(dtype, *shape), _meta(dtype, classes, shape[1])
    bias, y = _meta(dtype, classes), _meta(dtype, shape[0], classes)
    steps = launch_ends.head(x, weight, bias, y, capability)
    return [compile_launch(step, capability) for step in steps]


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_launch(step: Launch, capability: int) -> Compiled:
    """Compile one launch for an architecture.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    kernel = built(step, capability)
    registers, spilled = _usage(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    instruction = ", ".join(name for name, text in _MMA.items() if text in ptx) or "fma"
    return Compiled(
        step.kernel.fn.__name__,
        registers,
        spilled,
        kernel.metadata.shared,
        instruction,
        _loads(ptx),
        "cvt.rna.tf32" in ptx or step.arguments.get("ROUNDED", False),
    )


def built(step: Launch, capability: int) -> Any:
    """Return what Triton makes of one launch for an architecture, with the text of every stage.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    given = step.options()
    bind = create_function_from_signature(step.kernel.signature, step.kernel.params, backend)
    bound, specialization, rest = bind(**step.arguments, **given)
    options, signature, constants, attributes = step.kernel._pack_args(
        backend, given, bound, specialization, rest
    )
    source = _source(step.kernel)(step.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def _source(kernel: Any) -> type[ASTSource]:
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack, as the cuobjdump that comes with Triton reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump -res-usage wrote nothing about registers: {text!r}")
    return int(match[1]), int(match[2])


def _loads(ptx: str) -> dict[str, int]:
    """Count the loads of global memory by their width in bytes."""
    loads = re.findall(rf"{re.escape(_TMA)}[^;]*?global(\.im2col)?\.mbarrier", ptx)
    found = Counter("im2col" if mode else "tma" for mode in loads)
    for width in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (?:0x)?(\d+)[,;]", ptx):
        found[f"async {int(width, 16)}"] += 1
    for vector, bits in re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bus](\d+)\b", ptx):
        found[f"load {int(vector or 1) * int(bits) // 8}"] += 1
    return {name: count for name, count in sorted(found.items()) if count}
