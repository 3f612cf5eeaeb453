"""BatchNorm's passes in training on the CPU: the kernels beside eager torch, Inductor and a copy.

On the maps of ResNet-50, channels_last. All run the same arithmetic on the same values in the same
interleaved rounds; the copy moves the same bytes and computes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from resnet_fused.backends import _training_kernels as kernels
from resnet_fused.bench import timing
from resnet_fused.bench.options import SHORT_DTYPES
from resnet_fused.files import write_atomically
from resnet_fused.testing import two_x_rule

#: Without the batch: the stem's, and of each stage the widest, of one the narrow too.
SHAPES = (
    (64, 112, 112), (256, 56, 56), (128, 28, 28), (512, 28, 28), (1024, 14, 14), (2048, 7, 7),
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
KERNEL, EAGER, INDUCTOR, COPY = "kernel", "eager", "inductor", "copy"
APPLY, STATS, BACKWARD = "BN apply, add, ReLU", "BN statistics", "their backward"
PASSES = (APPLY, STATS, BACKWARD)

Call = Callable[[], Any]


def calls(shape: tuple[int, ...], dtype: torch.dtype, what: str) -> dict[str, Call]:
    """Return who runs a pass on a map, by name, each a call on the same values in every dtype."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw() -> Tensor:
        x = torch.randn(shape, generator=generator).bfloat16().to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    scale, shift, mean = torch.randn(3, shape[1], generator=generator).to(wide)
    invstd = torch.rand(shape[1], generator=generator).to(wide) + 0.5
    return _PASSES[what](draw, scale, shift, mean, invstd)


def _apply(
    draw: Callable[[], Tensor], scale: Tensor, shift: Tensor, mean: Tensor, invstd: Tensor
) -> dict[str, Call]:
    x, residual, out = draw(), draw(), draw()
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)

    def eager(x: Tensor, residual: Tensor) -> Tensor:
        return torch.relu(F.batch_norm(x, zeros, ones, scale, shift, eps=0.0) + residual)

    return {
        KERNEL: lambda: kernels.bn_apply(x, scale, shift, residual, out=out),
        EAGER: lambda: eager(x, residual),
        INDUCTOR: _compiled(eager, x, residual),
        COPY: lambda: torch.add(x, residual, out=out),
    }


def _stats(
    draw: Callable[[], Tensor], scale: Tensor, shift: Tensor, mean: Tensor, invstd: Tensor
) -> dict[str, Call]:
    x = draw()

    def inductor(x: Tensor) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x.to(scale.dtype), (0, 2, 3), correction=0)
        return mean, var

    return {
        KERNEL: lambda: kernels.bn_stats(x),
        EAGER: lambda: torch.batch_norm_update_stats(x, None, None, 0.1),
        INDUCTOR: _compiled(inductor, x),
    }


def _backward(
    draw: Callable[[], Tensor], scale: Tensor, shift: Tensor, mean: Tensor, invstd: Tensor
) -> dict[str, Call]:
    """ReLU's mask is read off y; both gradients, the residual's being the masked one."""
    x, grad, y, masked = draw(), draw(), draw().relu_(), draw()

    def eager(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        masked = torch.ops.aten.threshold_backward(grad, y, 0)
        grad_x, *_ = torch.ops.aten.native_batch_norm_backward(
            masked, x, scale, None, None, mean, invstd, True, 1e-5, [True, True, True]
        )
        return grad_x, masked

    def kernel() -> tuple[Tensor, Tensor]:
        sum_g, sum_gx = kernels.bn_act_backward_reduce(grad, x, mean, y=y, masked=masked)
        n, a = x[:, 0].numel(), scale * invstd
        b = -a * invstd**2 * sum_gx / n
        d = -a * sum_g / n - b * mean
        return kernels.bn_act_backward_apply(masked, x, a, b, d, relu=False), masked

    return {
        KERNEL: kernel,
        EAGER: lambda: eager(grad, x, y),
        INDUCTOR: _compiled(eager, grad, x, y),
    }


_PASSES = {APPLY: _apply, STATS: _stats, BACKWARD: _backward}


def _compiled(run: Callable[..., Any], *args: Tensor) -> Call:
    made: list[Callable[..., Any]] = []

    def call() -> Any:
        if not made:
            torch._dynamo.reset()
            made.append(torch.compile(run, dynamic=False))
        return made[0](*args)

    return call


def first(result: Any) -> Tensor:
    """Return what a pass is judged by."""
    return result if isinstance(result, Tensor) else result[0]


def check(shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    """Hold the kernel against float64; raise AssertionError where it is wrong."""
    oracle = first(calls(shape, torch.float64, what)[EAGER]())
    found = calls(shape, dtype, what)
    rows = shape[0] * shape[2] * shape[3]
    verdict = two_x_rule(first(found[KERNEL]()), first(found[EAGER]()), oracle, rows)
    assert verdict.ok, f"{what} {shape} {dtype}: {verdict}"


def measure(batch: int, rounds: timing.Rounds, console: Console) -> list[dict[str, Any]]:
    """Return, for each pass, map and dtype, the median microseconds and the paired ratios."""
    cases = [((batch, *s), dtype, what) for s in SHAPES for dtype in DTYPES for what in PASSES]
    rows = []
    for shape, dtype, what in track(cases, "BatchNorm's passes", console=console, transient=True):
        check(shape, dtype, what)
        rows.append(_row(shape, dtype, what, rounds))
    return rows


def _row(
    shape: tuple[int, ...], dtype: torch.dtype, what: str, rounds: timing.Rounds
) -> dict[str, Any]:
    seconds = timing.interleave(calls(shape, dtype, what), rounds)
    others = [name for name in seconds if name != KERNEL]
    ratios = {name: timing.paired_ratio(seconds[name], seconds[KERNEL]) for name in others}
    return {
        "pass": what,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "us": {name: 1e6 * timing.spread(values).median for name, values in seconds.items()},
        "ratios": {name: [r.median, r.p20, r.p80] for name, r in ratios.items()},
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print a table: how many times faster than each other contender the kernel is."""
    table = Table(title="BatchNorm's passes: time of the other / time of the kernel (p20 to p80)")
    for column in ("pass", "map", "dtype", "kernel", EAGER, INDUCTOR, COPY):
        table.add_column(column, justify="right" if column in (EAGER, INDUCTOR, COPY) else "left")
    for row in rows:
        found = [row["ratios"].get(name) for name in (EAGER, INDUCTOR, COPY)]
        cells = ["" if r is None else f"{r[0]:.2f}x ({r[1]:.2f}-{r[2]:.2f})" for r in found]
        shape = "x".join(map(str, row["shape"]))
        table.add_row(
            row["pass"], shape, SHORT_DTYPES[row["dtype"]], f"{row['us']['kernel']:.0f} us", *cells
        )
    console.print(table)


def save(rows: list[dict[str, Any]], conditions: dict[str, Any], path: Path) -> None:
    """Write the rows with their conditions as JSON."""
    text = json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n"

    def write(file: Path) -> None:
        file.write_text(text)

    write_atomically(path, write)
