"""The command `resnet-fused inspect`: what the Triton kernels compile to, without a GPU."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused.backends.triton.shapes import Config, Problem
from resnet_fused.bench import options
from resnet_fused.bench.options import UsageError

if TYPE_CHECKING:
    from resnet_fused.backends.triton.aot import Compiled

ARCHS = ("80", "90", "100")
_OP = torch.ops.resnet_fused.conv_bn_act.default


def show(
    console: Console,
    bar: Console,
    *,
    model: str | None,
    batch: str,
    dtype: str,
    arch: str,
    shape: str | None,
) -> bool:
    """Compile each distinct convolution and print a table; return whether nothing spills.

    Raises:
        UsageError: an option is not one of those accepted, or nothing can be compiled here.
    """
    kind = getattr(torch, options.dtype_name("--dtype", dtype))
    capability = int(options.one_of("--arch", arch, ARCHS))
    size = options.positive("--batch", batch)
    if (model is None) == (shape is None):
        raise UsageError("--model or --shape: one of the two is needed, such as --model resnet50")
    if shape is not None:
        problems = Counter([parse_shape("--shape", shape)])
    else:
        (name,) = options.usable_models("--model", [str(model)])
        problems = convolutions(name, size, kind)
    _check_compiler()
    work = _compiled(problems, kind, capability)
    rows = list(
        track(work, "compiling", len(problems), console=bar, disable=not bar.is_terminal)
    )  # fmt: skip
    console.print(_table(rows, dtype, capability))
    return not any(kernel.spilled for _, _, _, kernels in rows for kernel in kernels)


Row = tuple[Problem, int, Config, "list[Compiled]"]


def _compiled(problems: Counter[Problem], dtype: torch.dtype, capability: int) -> Iterator[Row]:
    from resnet_fused.backends.triton import aot

    for problem, calls in problems.items():
        config = aot.best(problem, dtype, capability)
        yield problem, calls, config, aot.compile_conv(problem, dtype, config, capability)


def convolutions(name: str, batch: int, dtype: torch.dtype) -> Counter[Problem]:
    """Return the distinct fused convolutions of a model on 224x224 images, and how often each is.

    Nothing is computed: the model runs on meta tensors.
    """
    import resnet_fused as rf
    from resnet_fused.models import create_model

    with torch.device("meta"), _Calls() as calls, torch.no_grad():
        model = rf.fuse(create_model(name).to(dtype).eval())
        model(torch.empty(batch, 3, 224, 224, dtype=dtype))
    return calls.problems


class _Calls(TorchDispatchMode):
    """Notes the calls of conv_bn_act."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: Counter[Problem] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Note the call and run it."""
        if func is _OP:
            x, weight, _, _, residual, stride, padding, dilation, groups, _ = args
            shapes = (x.shape, weight.shape)
            problem = Problem.of(*shapes, stride, padding, dilation, groups, residual is not None)
            self.problems[problem] += 1
        return func(*args, **(kwargs or {}))


def parse_shape(option: str, text: str) -> Problem:
    """Return the problem of "N,C,H,W,O,K,stride"; padding is K // 2.

    Raises:
        UsageError: the text is not that.
    """
    parts = text.split(",")
    if len(parts) != 7:
        raise UsageError(
            f"{option}: {text!r} given; accepted: N,C,H,W,O,K,stride, such as 256,64,56,56,64,3,1"
        )
    n, c, h, w, o, k, stride = (options.positive(option, part) for part in parts)
    if min(h, w) + 2 * (k // 2) < k:
        raise UsageError(f"{option}: a {h}x{w} map is smaller than the {k}x{k} kernel")
    pads = (k // 2, k // 2)
    return Problem.of((n, c, h, w), (o, c, k, k), (stride, stride), pads, (1, 1), 1, False)


def _check_compiler() -> None:
    if importlib.util.find_spec("triton") is None:
        raise UsageError("triton is not installed, which compiles the kernels: pip install triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET=1 is set, so kernels are not compiled: unset it")


def _table(rows: list[Row], dtype: str, capability: int) -> Table:
    title = f"conv_bn_act, {dtype}, sm_{capability}; + r: with residual; loads by width in bytes"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in ("input", "kernel", "calls", "config"):
        table.add_column(column, no_wrap=True)
    for column in ("regs", "spilled", "shared KiB"):
        table.add_column(column, justify="right")
    table.add_column("products")
    table.add_column("loads")
    for problem, calls, config, kernels in rows:
        head = (*_geometry(problem), str(calls), str(config))
        for kernel in kernels:
            figures = (kernel.registers, kernel.spilled, f"{kernel.shared / 1024:.1f}")
            table.add_row(*head, *map(str, figures), kernel.instruction, ", ".join(kernel.loads))
            head = ("", "", "", "+ affine_kernel")
    return table


def _geometry(problem: Problem) -> tuple[str, str]:
    channels, outputs = problem.c * problem.groups, problem.o * problem.groups
    kh, kw = problem.kernel
    kernel = f"{kh}x{kw} {outputs}"
    kernel += f" /{problem.stride[0]}" if problem.stride[0] > 1 else ""
    kernel += f" groups {problem.groups}" if problem.groups > 1 else ""
    kernel += " + r" if problem.residual else ""
    return f"{problem.n}x{channels}x{problem.h}x{problem.w}", kernel
