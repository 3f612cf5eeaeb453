"""``python -m benchmarks.where MODEL``: where a fused training step on the CPU goes, by kernel.

Every call of a native kernel, of torch's convolutions where they run in a kernel's place, and of
the optimizer is timed on its way, at less than a microsecond a call, of which ResNet-50 makes five
hundred in a step. A convolution counts with what its call does around it: packing its weight,
normalising what it reads, moments of what it writes. torch tells of its other ops only under its
profiler, which sends the package's ops the long way through the dispatcher: they are counted in
steps of their own, from which nothing else is taken. What is then left of a step is Python, the
package's and autograd's, with what it costs that large kernels have pushed it out of the caches.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch.autograd.profiler_util import FunctionEvent

from benchmarks import asked, training
from resnet_fused.backends import _cpu_block, _cpu_once, _torch_conv, cpu, native
from resnet_fused.bench import conditions, options, terminal
from resnet_fused.bench.contenders import FUSED
from resnet_fused.bench.options import PRECISIONS, Settings, UsageError
from resnet_fused.bench.tables import Grid, conditions_line
from resnet_fused.models import create_model

PROGRAM = "python -m benchmarks.where"
FORWARD, DATA, WEIGHT = "convolution", "data gradient", "weight gradient"
NORM, POOL, OPTIMIZER = "BatchNorm, add, ReLU", "max pool", "optimizer"
OTHERS, PYTHON = "torch's other ops", "Python between"
#: By the beginning of a native function's name, what it does; the first that fits.
NATIVE = {
    "convolve_once": FORWARD, "conv_bn_act": FORWARD, "conv_backward_weight": WEIGHT,
    "bn_": NORM, "add_relu": NORM, "max_pool": POOL,
}  # fmt: skip
#: By the end, functions that are not kernels.
ASKED = ("_bytes", "_algorithms")
#: torch's own in a kernel's place.
TORCH = {"forward": FORWARD, "backward_data": DATA, "backward_weight": WEIGHT}
CONVOLUTIONS = ("aten::conv2d", "aten::convolution_backward")
WARM, STEPS, PROFILED = 3, 11, 3
SIDE, MOST = 224, 5


class Kernel(NamedTuple):
    """A call: what it computed, whose it was, from when to when."""

    what: str
    whose: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


@dataclass
class Ledger:
    """The calls of a step, in their order."""

    kernels: list[Kernel] = field(default_factory=list)
    _in_data_gradient: bool = False

    def timed(self, run: Callable[..., Any], what: str, whose: str) -> Callable[..., Any]:
        """Return the function with its calls written down."""

        def call(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = run(*args, **options)
            # The kernel of a convolution computes its input's gradient too.
            kind = DATA if what == FORWARD and self._in_data_gradient else what
            self.kernels.append(Kernel(kind, whose, begin, time.perf_counter()))
            return result

        return call

    def data_gradient(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with convolutions inside it known as data gradients."""

        def call(*args: Any) -> Any:
            self._in_data_gradient = True
            try:
                return run(*args)
            finally:
                self._in_data_gradient = False

        return call


class Step(NamedTuple):
    """A step: its seconds, and its calls."""

    seconds: float
    kernels: list[Kernel]


def steps(step: Callable[[], None], count: int) -> list[Step]:
    """Return what so many steps called."""
    found = []
    for _ in range(count):
        ledger = Ledger()
        with _watched(ledger):
            begin = time.perf_counter()
            step()
            seconds = time.perf_counter() - begin
        found.append(Step(seconds, ledger.kernels))
    return found


@contextlib.contextmanager
def _watched(ledger: Ledger) -> Iterator[None]:
    kernels, own, torchs = native.loaded(), "native", "torch's"
    changed: list[tuple[Any, str, Callable[..., Any]]] = [
        (owner, name, ledger.data_gradient(getattr(owner, name)))
        for owner, name in ((_cpu_once, "backward_data"), (_cpu_block.BlockPlan, "data_gradient"))
    ]
    for owner, whose, named in (
        (kernels, own, {name: what for name in dir(kernels) if (what := kind_of(name))}),
        (_torch_conv, torchs, TORCH),
        (torch.optim.SGD, torchs, {"step": OPTIMIZER}),
    ):
        changed += [
            (owner, name, ledger.timed(getattr(owner, name), what, whose))
            for name, what in named.items()
        ]
    with contextlib.ExitStack() as originals:
        for owner, name, run in changed:
            originals.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, run)
        yield


def kind_of(name: str) -> str | None:
    """Return what a function of the extension computes, None for one that is no kernel."""
    if name.endswith(ASKED):
        return None
    return next((what for start, what in NATIVE.items() if name.startswith(start)), None)


def profiled(step: Callable[[], None], count: int) -> Mapping[str, tuple[float, float]]:
    """Return calls and seconds, in a step, of torch's ops that are timed nowhere else."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(count):
            step()
    calls: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for event in profile.events() or ():
        if event.name.startswith("aten::") and not _is_counted(event):
            calls[event.name] += 1
            seconds[event.name] += event.cpu_time_total / 1e6
    return {name: (calls[name] / count, seconds[name] / count) for name in calls}


def _is_counted(event: FunctionEvent) -> bool:
    """Return whether an op is part of another one, of the optimizer, or a kernel's stand-in."""
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(("aten::", "Optimizer.")):
            return True
        if parent.name.startswith("resnet_fused::") and event.name in CONVOLUTIONS:
            return True
        parent = parent.cpu_parent
    return False


def grids(
    found: Sequence[Step], others: Mapping[str, tuple[float, float]], title: str
) -> list[Grid]:
    """Return where the steps went, and torch's other ops."""
    whole = statistics.median(step.seconds for step in found)
    lines = dict.fromkeys((k.what, k.whose) for step in found for k in step.kernels)
    parts = [(*line, *_median(found, *line)) for line in lines]
    counts, seconds = zip((0.0, 0.0), *others.values(), strict=True)
    parts.append((OTHERS, "torch's", sum(counts), sum(seconds)))
    parts.append((PYTHON, "", 0.0, whole - sum(part[-1] for part in parts)))
    parts.sort(key=lambda part: -part[-1])
    rows = [
        [what, whose, f"{calls:.0f}" if calls else "-", f"{seconds * 1e3:.1f}",
         f"{seconds / whole:.1%}"]
        for what, whose, calls, seconds in parts
    ]  # fmt: skip
    rows.append(["step", "", "", f"{whole * 1e3:.1f}", "100.0%"])
    columns = ("part", "whose", "calls", "ms", "of the step")
    left = ("part", "whose")
    most = sorted(others.items(), key=lambda other: -other[1][1])[:MOST]
    ops = [[name, f"{calls:.0f}", f"{seconds * 1e3:.1f}"] for name, (calls, seconds) in most]
    return [
        Grid(title, columns, rows, left=left, breaks=frozenset({len(rows) - 2})),
        Grid(f"{OTHERS}, the first {len(ops)}", ("op", "calls", "ms"), ops, left=("op",)),
    ]


def _median(found: Sequence[Step], what: str, whose: str) -> tuple[float, float]:
    """Return calls and seconds of a step's kernels of a kind."""
    of_step = [
        [k.seconds for k in step.kernels if (k.what, k.whose) == (what, whose)] for step in found
    ]
    return statistics.median(map(len, of_step)), statistics.median(map(sum, of_step))


def gaps(found: Sequence[Step]) -> str:
    """Return in a line how long the waits between one kernel and the next are."""
    waits = [
        [after.begin - before.end for before, after in zip(s.kernels, s.kernels[1:], strict=False)]
        for s in found
    ]
    if not any(waits):
        return "between kernels: no gap, as a step calls no two"
    each = statistics.median(wait for step in waits for wait in step)
    count, whole = statistics.median(map(len, waits)), statistics.median(map(sum, waits))
    return (
        f"between kernels: {count:.0f} gaps of {each * 1e6:.0f} us (median), {whole * 1e3:.1f} ms "
        f"in all, torch's other ops among them; medians of {len(found)} steps"
    )


def _trainer(name: str, settings: Settings) -> training.Trainer:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    model = create_model(name).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    batch = settings.batches[0]
    images = torch.randn(batch, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    target = torch.randint(10, (batch,))
    kind = PRECISIONS[settings.dtypes[0]]
    return training.Trainer(model, images, target, kind, training.OWN[FUSED])


def main(
    model: Annotated[str, typer.Argument(help="A ResNet of the package.")],
    dtype: Annotated[str, typer.Option("--dtype", "-d", help="fp32 or bf16.")] = "fp32",
    batch: Annotated[int, typer.Option("--batch", "-b", help="Images in a step.")] = 8,
    threads: asked.Threads = None,
) -> None:
    """Print where a fused training step on the CPU goes, kernel by kernel."""
    with terminal.one_line_errors(PROGRAM):
        if reason := cpu.available():
            raise UsageError(f"needs the native kernels: {reason}")
        kind = options.dtype_name("--dtype", dtype, ("float32", "bfloat16"))
        (name,) = options.usable_models("MODEL", [model])
        settings = Settings(
            models=(name,), dtypes=(kind,), batches=(options.positive("--batch", batch),),
            device="cpu", threads=options.thread_count("--threads", threads),
            backend=options.usable_backend("--backend", None), rounds=None, seed=0,
            images=None, out=Path(), peers=(),
        )  # fmt: skip
        step = _trainer(name, settings)
        for _ in range(WARM):
            step()
        found, others = steps(step, STEPS), profiled(step, PROFILED)
        console = terminal.console()
        title = f"{name} {options.SHORT_DTYPES[kind]} batch {batch}: a fused training step"
        for grid in grids(found, others, title):
            console.print(grid.rich(console.width))
            console.print()
        for text in (gaps(found), conditions_line(conditions.of(settings, PROGRAM))):
            console.print(text, highlight=False, markup=False)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    terminal.run(app, PROGRAM)
