"""BatchNorm's passes in training on the CPU: the kernels beside eager torch, Inductor and a copy.

On the maps of ResNet-50, channels_last. All run the same arithmetic on the same values in the same
interleaved rounds; the copy moves the bytes of the first pass and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends import _training_kernels as kernels
from resnet_fused.bench import measure
from resnet_fused.bench.contenders import REFERENCE
from resnet_fused.bench.options import DTYPES
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import OK, Case, Row
from resnet_fused.testing import two_x_rule

#: Without the batch: the stem's, and of each stage the widest, of one the narrow too.
SHAPES = (
    (64, 112, 112), (256, 56, 56), (128, 28, 28), (512, 28, 28), (1024, 14, 14), (2048, 7, 7),
)  # fmt: skip
PRECISIONS = ("float32", "bfloat16")
KERNEL, INDUCTOR, COPY = "kernel", "inductor-default", "copy"
APPLY, STATS, BACKWARD = "BN apply, add, ReLU", "BN statistics", "BN backward"

Call = Callable[[], Any]


class Maps(NamedTuple):
    """What a pass works on: as many maps as it names, and vectors of the channels."""

    maps: list[Tensor]
    scale: Tensor
    shift: Tensor
    mean: Tensor
    invstd: Tensor


class Pass(NamedTuple):
    """A pass: who runs it, on how many maps, and how many it cannot but read or write."""

    contenders: Mapping[str, Callable[[Maps], Call]]
    drawn: int
    moved: int


def layers() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return every pass on every map, without the batch, by its name."""
    return {f"{'x'.join(map(str, s))} {what}": (what, s) for s in SHAPES for what in PASSES}


def contenders(layer: str) -> Mapping[str, Callable[[Maps], Call]]:
    """Return who runs a pass, the reference first."""
    what, _ = layers()[layer]
    return PASSES[what].contenders


def draw(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Maps:
    """Return maps and vectors with the same values in every dtype."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    maps = [
        torch.randn(shape, generator=generator).bfloat16().to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(count)
    ]  # fmt: skip
    scale, shift, mean = torch.randn(3, shape[1], generator=generator).to(wide)
    invstd = torch.rand(shape[1], generator=generator).to(wide) + 0.5
    return Maps(maps, scale, shift, mean, invstd)


def run_case(
    case: Case, method: measure.Method, bandwidth: float | None, watch: Watch
) -> list[Row]:
    """Return a row per contender: its times, its worst error, the bytes that a call must move."""
    watch.doing(f"{case}: maps, float64 answers")
    entered = Entered(case, bandwidth)
    return measure.run_entered(case, method, entered.enter, entered.blank, watch)


class Entered:
    """A case's maps and answers, against which each contender is held."""

    def __init__(self, case: Case, bandwidth: float | None) -> None:
        what, shape = layers()[case.layer]
        one, whole = PASSES[what], (case.batch, *shape)
        eager = one.contenders[REFERENCE]
        self._case = case
        self._maps = draw(one.drawn, whole, DTYPES[case.dtype])
        self._oracle = outputs(eager(draw(one.drawn, whole, torch.float64)))
        self._eager = outputs(eager(self._maps))
        self._nbytes = one.moved * self._maps.maps[0].nbytes
        self._bound_s = self._nbytes / bandwidth if bandwidth else None

    def blank(self, name: str) -> Row:
        """Return the row of a contender of which nothing else is known."""
        return Row(self._case, name, OK, 0, 0, nbytes=self._nbytes, bound_s=self._bound_s)

    def enter(self, name: str, build: Callable[[Maps], Call]) -> tuple[Row, Call]:
        """Build a contender and hold all that it computes against float64."""
        call = build(self._maps)
        if name == COPY:  # another function: a yardstick, not an answer
            return self.blank(name), call
        summed = self._maps.maps[0][:, 0].numel()
        error, allowed = _error(outputs(call), self._eager, self._oracle, summed)
        return measure.judged(self.blank(name), error, allowed), call


def outputs(call: Call) -> list[Tensor]:
    """Return everything that a call computes."""
    result = call()
    return [result] if isinstance(result, Tensor) else list(result)


def _error(
    found: Sequence[Tensor], eager: Sequence[Tensor], oracle: Sequence[Tensor], summed: int
) -> tuple[float, float]:
    """Return the error and what is allowed, relative to max|oracle|, of the worst output."""
    checks = []
    for value, own, exact in zip(found, eager, oracle, strict=True):
        check, peak = two_x_rule(value, own, exact, summed), float(exact.abs().max())
        checks.append((check.error / peak, check.allowed / peak))
    return max(checks, key=lambda check: check[0] / check[1])


def _apply_kernel(m: Maps) -> Call:
    x, residual, out = m.maps
    return lambda: kernels.bn_apply(x, m.scale, m.shift, residual, out=out)


def _apply_eager(m: Maps) -> Call:
    x, residual, _ = m.maps
    return lambda: _apply(x, residual, m.scale, m.shift)


def _apply_inductor(m: Maps) -> Call:
    x, residual, _ = m.maps
    compiled = torch.compile(_apply, dynamic=False)
    return lambda: compiled(x, residual, m.scale, m.shift)


def _apply_copy(m: Maps) -> Call:
    x, residual, out = m.maps
    return lambda: torch.add(x, residual, out=out)


def _apply(x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.relu(F.batch_norm(x, zeros, ones, scale, shift, eps=0.0) + residual)


def _stats_inductor(m: Maps) -> Call:
    def stats(x: Tensor) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x.to(m.scale.dtype), (0, 2, 3), correction=0)
        return mean, var

    compiled = torch.compile(stats, dynamic=False)
    return lambda: compiled(m.maps[0])


def _backward_kernel(m: Maps) -> Call:
    x, grad, y = m.maps
    var, wanted = m.invstd**-2, (True, True, True, True, False)
    return lambda: kernels.bn_act_backward(
        grad, x, m.mean, var, m.scale, m.shift, 0.0, y=y, wanted=wanted
    )[:4]


def _backward_torch(
    m: Maps, made: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda run: run
) -> Call:
    """ReLU's mask is read off y; all gradients, the residual's being the masked one."""
    x, grad, y = m.maps

    def backward(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        masked = torch.ops.aten.threshold_backward(grad, y, 0)
        grads = torch.ops.aten.native_batch_norm_backward(
            masked, x, m.scale, None, None, m.mean, m.invstd, True, 1e-5, [True, True, True]
        )
        return *grads, masked

    run = made(backward)
    return lambda: run(grad, x, y)


PASSES: Mapping[str, Pass] = {
    APPLY: Pass(
        {
            REFERENCE: _apply_eager,
            KERNEL: _apply_kernel,
            INDUCTOR: _apply_inductor,
            COPY: _apply_copy,
        },
        drawn=3,
        moved=3,
    ),
    STATS: Pass(
        {
            REFERENCE: lambda m: lambda: torch.batch_norm_update_stats(m.maps[0], None, None, 0.1),
            KERNEL: lambda m: lambda: kernels.bn_stats(m.maps[0]),
            INDUCTOR: _stats_inductor,
        },
        drawn=1,
        moved=1,
    ),
    BACKWARD: Pass(
        {
            REFERENCE: _backward_torch,
            KERNEL: _backward_kernel,
            INDUCTOR: lambda m: _backward_torch(m, torch.compile),
        },
        drawn=3,
        moved=5,
    ),
}
