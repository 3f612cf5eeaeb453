"""The command `resnet-fused inspect`: what the Triton kernels compile to, without a GPU."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

from resnet_fused.bench import options
from resnet_fused.bench.measure import precision
from resnet_fused.bench.options import UsageError
from resnet_fused.inspection.subjects import SUBJECTS, Subject, convolutions
from resnet_fused.inspection.table import Row, summary, table

__all__ = ["ARCHS", "convolutions", "show"]

ARCHS = ("80", "90", "100")


def show(
    console: Console,
    bar: Console,
    *,
    op: str,
    model: str | None,
    batch: str,
    dtype: str,
    archs: Iterable[str] | None,
    shape: str | None,
    geometry: Mapping[str, str],
    every: bool,
) -> bool:
    """Compile an op's kernels for a shape or a model and print a table; return if nothing spills.

    Args:
        console: for the table.
        bar: for the progress bar.
        op: one of :data:`SUBJECTS`.
        model: one of the package's, on 224x224 images; or None.
        batch: of the model's input.
        dtype: bf16, fp16, tf32 or fp32.
        archs: of :data:`ARCHS`; None means all.
        shape: as the op's subject reads it; or None.
        geometry: of the shape's convolution, "groups" and "dilation", where they are not 1.
        every: every config that the tuner would measure, not the one used untuned alone.

    Raises:
        UsageError: an option is not one of those accepted, or nothing can be compiled here.
    """
    subject = SUBJECTS[options.one_of("--op", op, SUBJECTS)]
    kind = options.dtype_name("--dtype", dtype, options.PRECISIONS)
    short = options.SHORT_DTYPES[kind]
    if short not in subject.precisions:
        accepted = ", ".join(subject.precisions)
        raise UsageError(f"--dtype: {short} given; accepted by {op}: {accepted}")
    capabilities = [int(options.one_of("--arch", arch, ARCHS)) for arch in archs or ARCHS]
    problems = _problems(subject, op, model, shape, geometry, batch, kind)
    _check_compiler()
    cuts = [
        (problem, calls, capability, config)
        for problem, calls in problems.items()
        for capability in capabilities
        for config in _configs(subject, problem, short, capability, every)
    ]
    with precision(kind):
        work = _compiled(subject, cuts, kind)
        rows = list(track(work, "compiling", len(cuts), console=bar, disable=not bar.is_terminal))
    console.print(table(f"{op}, {short}", rows))
    console.print(summary(rows), highlight=False, soft_wrap=True)
    return not any(kernel.spilled for row in rows for kernel in row.kernels)


def _problems(
    subject: Subject,
    op: str,
    model: str | None,
    shape: str | None,
    geometry: Mapping[str, str],
    batch: str,
    dtype: str,
) -> Counter[Any]:
    size = options.positive("--batch", batch)
    if (model is None) == (shape is None):
        raise UsageError(
            "--model or --shape: one of the two is needed, such as --model resnet50 or "
            f"--op {op} --shape {subject.example}"
        )
    if shape is not None:
        return Counter([subject.parse("--shape", shape, geometry)])
    if geometry:
        name, value = next(iter(geometry.items()))
        raise UsageError(f"--{name}: {value!r} given; accepted with --shape, a model has its own")
    (name,) = options.usable_models("--model", [str(model)])
    found = subject.of_model(name, size, options.PRECISIONS[dtype])
    if not found:
        raise UsageError(f"--op: {name} has no {op} that its kernel takes")
    return found


def _configs(
    subject: Subject, problem: Any, short: str, capability: int, every: bool
) -> Sequence[Any]:
    found = subject.candidates(problem, short, capability)
    return found if every else found[:1]


def _compiled(
    subject: Subject, cuts: Iterable[tuple[Any, int, int, Any]], dtype: str
) -> Iterator[Row]:
    for problem, calls, capability, config in cuts:
        made = subject.compile(problem, options.PRECISIONS[dtype], config, capability)
        yield Row(*subject.words(problem), calls, capability, str(config), made)


def _check_compiler() -> None:
    if importlib.util.find_spec("triton") is None:
        raise UsageError("triton is not installed, which compiles the kernels: pip install triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET=1 is set, so kernels are not compiled: unset it")
