"""The convolutions of training on the CPU: the kernels alone beside torch's, which are oneDNN's.

Forward, data gradient and weight gradient of every distinct convolution of a model. A call packs
the weight anew, as a training step must. Inputs have just been written, weights come from memory,
and what is freed stays with the process: a call faults no pages in, which for the largest maps
takes longer than the convolution. Seconds are CPU time of one thread.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import _cpu_once, _cpu_weight_gradient, _torch_conv, cpu
from resnet_fused.backends._sizes import output_size
from resnet_fused.bench import measure, timing
from resnet_fused.bench.contenders import REFERENCE
from resnet_fused.bench.options import DTYPES, UsageError
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import OK, SKIPPED, Case, Row
from resnet_fused.models import create_model
from resnet_fused.testing import two_x_rule
from resnet_fused.tuning.calls import Call, harvest

MODELS = ("resnet50",)
KERNEL = "kernel"
PASSES = FORWARD, DATA, WEIGHT = ("forward", "data gradient", "weight gradient")
#: See mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
#: Height and width of the images.
SIDE = 224


class Geometry(NamedTuple):
    """A convolution: what it reads, without the batch, its weight's shape, how it moves."""

    shape: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def steps(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        """Return what torch's convolutions take behind their tensors."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def output(self) -> tuple[int, ...]:
        """Return what it writes, without the batch."""
        kernel = self.weight[2:]
        sides = output_size(self.shape[1:], kernel, self.stride, self.padding, self.dilation)
        return (self.weight[0], *sides)

    @property
    def macs(self) -> int:
        """Return the multiply-adds of an image, in each pass the same."""
        _, height, width = self.output
        o, c, kh, kw = self.weight
        return height * width * o * c * kh * kw

    def summed(self, what: str, batch: int) -> int:
        """Return how many products one output of a pass sums."""
        o, c, kh, kw = self.weight
        _, height, width = self.output
        return {
            FORWARD: c * kh * kw,
            DATA: o // self.groups * kh * kw,
            WEIGHT: batch * height * width,
        }[what]


@dataclass
class Layer:
    """A pass of a distinct convolution, and how often each model has it."""

    what: str
    geometry: Geometry
    uses: dict[str, int] = field(default_factory=dict)


class Tensors(NamedTuple):
    """What the passes read."""

    x: Tensor
    weight: Tensor
    grad: Tensor


#: Computes a pass, or nothing where the kernel leaves it to torch.
Run = Callable[[str, Geometry, Tensors], Tensor | None]


def layers(models: tuple[str, ...]) -> dict[str, Layer]:
    """Return every pass of the models' distinct convolutions by its name.

    Raises:
        UsageError: a model has no convolution that the package fuses.
    """
    found: dict[str, Layer] = {}
    for model in models:
        for name, layer in _of_model(model).items():
            found.setdefault(name, replace(layer, uses={})).uses.update(layer.uses)
    return found


def part_of(layer: str) -> tuple[str, str]:
    """Return what kind of convolution a layer is and which pass, by its name."""
    what = next(what for what in PASSES if layer.endswith(what))
    _, kernel, _, _, *rest = layer.removesuffix(what).split()
    return " ".join([kernel, *rest]), what


@functools.cache
def _of_model(model: str) -> dict[str, Layer]:
    with torch.device("meta"):
        network = create_model(model).eval()
        example = torch.empty(1, 3, SIDE, SIDE)
    try:
        calls = harvest(network, example)
    except ValueError:
        raise UsageError(f"--model: {model} makes no fused call; accepted: ResNets") from None
    found: dict[str, Layer] = {}
    for call in calls:
        geometry = _geometry(call)
        # Nobody asks for the gradient of the images.
        passes = PASSES if geometry.shape != tuple(example.shape[1:]) else (FORWARD, WEIGHT)
        for what in passes:
            layer = found.setdefault(_name(geometry, what), Layer(what, geometry, {model: 0}))
            layer.uses[model] += call.count
    return found


def _geometry(call: Call) -> Geometry:
    stride, padding, dilation = (
        tuple(call.argument(name)) for name in ("stride", "padding", "dilation")
    )
    shapes = tuple(call.args[0].shape[1:]), tuple(call.argument("weight").shape)
    return Geometry(*shapes, stride, padding, dilation, call.argument("groups"))


def _name(geometry: Geometry, what: str) -> str:
    shape, kernel = ("x".join(map(str, part)) for part in (geometry.shape, geometry.weight[2:]))
    stride = max(geometry.stride)
    return (
        f"{shape} {kernel} to {geometry.weight[0]}"
        + (f" stride {stride}" if stride > 1 else "")
        + (f" groups {geometry.groups}" if geometry.groups > 1 else "")
        + f" {what}"
    )


def run_case(case: Case, layer: Layer, method: measure.Method, watch: Watch) -> list[Row]:
    """Return a row per contender: its times and its error."""
    watch.doing(f"{case}: tensors, float64 answers")
    _keep_freed_memory()
    entered = Entered(case, layer)
    elapsed = timing.clock_for("cpu", emptied=True, elapsed=timing.elapsed_thread)

    def clock(
        run: Callable[[], object], calls: int, feed: Callable[[], object] = timing.nothing
    ) -> float:
        return elapsed(run, calls, entered.feed)

    clocked = replace(method, clock=clock)
    return measure.run_entered(case, clocked, entered.enter, entered.blank, watch)


def _keep_freed_memory() -> None:
    """Have the C library give nothing back to the system, where it is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


class Entered:
    """A case's tensors and answer, against which each contender is held."""

    def __init__(self, case: Case, layer: Layer) -> None:
        self._case, self._layer = case, layer
        geometry = layer.geometry
        self._tensors = draw(geometry, case.batch, DTYPES[case.dtype])
        exact = draw(geometry, case.batch, torch.float64)
        self._oracle = by_torch(layer.what, geometry, exact)
        self._eager = by_torch(layer.what, geometry, self._tensors)

    def blank(self, name: str) -> Row:
        """Return the row of a contender of which nothing else is known."""
        geometry = self._layer.geometry
        weights = torch.Size(geometry.weight).numel()
        return Row(self._case, name, OK, geometry.macs / 1e9, weights / 1e6, uses=self._layer.uses)

    def feed(self) -> None:
        """Write what the layer before would have written."""
        x, _, grad = self._tensors
        for read in {FORWARD: (x,), DATA: (grad,), WEIGHT: (x, grad)}[self._layer.what]:
            read.mul_(1)

    def enter(self, name: str, run: Run) -> tuple[Row, Callable[[], object]]:
        """Hold what a contender computes against float64, and return a call of it."""
        what, geometry = self._layer.what, self._layer.geometry
        call = functools.partial(run, what, geometry, self._tensors)
        found = call()
        if found is None:
            return replace(self.blank(name), verdict=SKIPPED, note="left to torch's own"), call
        summed = geometry.summed(what, self._case.batch)
        check, peak = two_x_rule(found, self._eager, self._oracle, summed), self._oracle.abs().max()
        row = self.blank(name)
        return measure.judged(row, check.error / float(peak), check.allowed / float(peak)), call


def draw(geometry: Geometry, batch: int, dtype: torch.dtype) -> Tensors:
    """Return tensors with the same values in every dtype."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator).bfloat16().to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    shapes = (batch, *geometry.shape), geometry.weight, (batch, *geometry.output)
    return Tensors(*(drawn(*shape) for shape in shapes))


def by_torch(what: str, geometry: Geometry, t: Tensors) -> Tensor:
    """Run a pass by torch."""
    if what == FORWARD:
        return _torch_conv.forward(t.x, t.weight, *geometry.steps)
    if what == DATA:
        return _torch_conv.backward_data(t.grad, t.weight, t.x.shape, *geometry.steps, None)
    return _torch_conv.backward_weight(
        t.grad, t.x, geometry.weight, *geometry.steps, True, t.x.dtype
    )


def by_kernel(what: str, geometry: Geometry, t: Tensors) -> Tensor | None:
    """Run a pass by the package's kernel, if it has one that pays."""
    if cpu.declines(t.x):
        return None
    if what == FORWARD:
        made = _cpu_once.convolve_once(t.x, t.weight, *geometry.steps)
        return None if made is None else made[0]
    if what == DATA:
        return _cpu_once.backward_data(t.grad, t.weight, t.x.shape, *geometry.steps, None)
    return _cpu_weight_gradient.backward_weight(
        t.grad, t.x, geometry.weight, *geometry.steps, True, t.x.dtype
    )


CONTENDERS: Mapping[str, Run] = {REFERENCE: by_torch, KERNEL: by_kernel}
