"""What `resnet-fused tune` does: the calls of a model measured one by one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from resnet_fused.backends import _tuned_file
from resnet_fused.bench import options
from resnet_fused.tuning import tune_calls
from resnet_fused.tuning.calls import Call, harvest, harvest_merged, with_parts
from resnet_fused.tuning.report import Row, TuneReport

#: The environment variable that says where choices are kept.
CACHE = "RESNET_FUSED_CACHE_DIR"


def run(
    model: str,
    *,
    batch: int,
    image_size: int,
    dtype: str | None,
    device: str,
    training: bool,
    force: bool,
    console: Console,
) -> TuneReport:
    """Check what was asked for, tune, and return the report.

    Raises `UsageError` for what cannot be done.
    """
    (name,) = options.usable_models("MODEL", [model])
    place = options.usable_device("--device", device)
    kind = options.default_dtypes(place)[-1]
    if dtype is not None:
        kind = options.dtype_name("--dtype", dtype)
    size = options.positive("--image-size", image_size)
    backend = options.usable_backend("--backend", None)
    shape = (options.positive("--batch", batch), 3, size, size)
    where = torch.empty(0, device=place).device  # a GPU with its number
    calls = (_calls_of_a_step if training else _calls)(name, shape, options.DTYPES[kind], where)
    options.writable_directory(CACHE, _tuned_file.directory())
    if backend != "auto":
        console.print(
            f"{options.BACKEND} is {backend}: choices are in force where it is not set",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught, _shown(console, len(calls)) as told:
        warnings.simplefilter("default")
        report = tune_calls(calls, where, force=force, on_row=told.row, on_compiled=told.compiled)
    for warning in caught:  # as lines of their own, not as places in the source
        console.print(str(warning.message), highlight=False, markup=False, soft_wrap=True)
    return report


def _calls(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[Call]:
    """Return the calls of a model in the layout the benchmark runs it in; nothing is computed."""
    from resnet_fused.models import create_model

    layout = torch.channels_last
    with torch.device("meta"):
        network = create_model(name).eval().to(dtype=dtype)
        network = network.to(memory_format=layout)  # type: ignore[call-overload]
        example = torch.empty(shape, dtype=dtype).contiguous(memory_format=layout)
    try:
        return [*harvest(network, example), *harvest_merged(network, example, device)]
    except ValueError as error:
        raise options.UsageError(str(error)) from None


def _calls_of_a_step(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[Call]:
    """Return the calls of a training step, in 16 bits under autocast; nothing is computed."""
    from resnet_fused.models import create_model

    with torch.device("meta"):
        network = create_model(name).train()
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    example = torch.empty(shape, device=device, memory_format=torch.channels_last)
    mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    try:
        with mixed:
            return with_parts(harvest(network, example))
    except ValueError as error:
        raise options.UsageError(str(error)) from None


class _Told(NamedTuple):
    """Who is told how far tuning is."""

    row: Callable[[Row], None]
    compiled: Callable[[], None]


@contextmanager
def _shown(console: Console, calls: int) -> Iterator[_Told]:
    """Show what is done, as `tune_calls` tells it: bars on a terminal, elsewhere a line a row."""
    if not console.is_terminal:
        plain = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
        yield _Told(row=lambda row: plain(_line(row)), compiled=lambda: None)
        return
    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("checking and timing", total=calls)
        first = progress.add_task("compiling", total=calls, visible=False)
        yield _Told(
            row=lambda row: progress.update(task, advance=1, description=_line(row)),
            compiled=lambda: progress.update(first, advance=1, visible=True),
        )


def _line(row: Row) -> str:
    if row.choice is None:
        return f"{row.call}: none was right"
    winner = f"{row.choice.backend}/{row.choice.candidate}"
    return f"{row.call}: {winner}{' (known)' if row.known else ''}"
