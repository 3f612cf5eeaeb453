"""What the command lines share: one line for what cannot be done, consoles, progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console

from resnet_fused.bench import compare, results
from resnet_fused.bench.options import UsageError
from resnet_fused.bench.progress import BarWatch, LineWatch, Watch

#: Columns where there is no terminal: a file or a pipe has no width to keep to.
WIDE = 120


def refuse(program: str, message: str) -> NoReturn:
    """Say in one line what is wrong, and exit with 2."""
    typer.echo(f"{program}: {message}", err=True)
    raise typer.Exit(2)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a `UsageError` into its one line and exit code 2; other errors keep their traceback."""
    try:
        yield
    except UsageError as error:
        refuse(program, str(error))


def console(*, stderr: bool = False) -> Console:
    """Return a console, a wide one where there is no terminal."""
    made = Console(stderr=stderr)
    if not made.is_terminal:
        made.width = max(made.width, WIDE)
    return made


@contextmanager
def progress() -> Iterator[Watch]:
    """Show how a job gets on, on stderr: a bar on a terminal, plain lines elsewhere."""
    shown = console(stderr=True)
    if not shown.is_terminal:
        yield LineWatch(shown)
        return
    with BarWatch(shown) as watch:
        yield watch


def compare_files(program: str, before: Path, after: Path, threshold: float | None) -> None:
    """Print two records side by side; exit with 1 if B is worse by more than the threshold.

    Raises `UsageError` for a file that is no record, or two without a case in common.
    """
    old, new = results.load(before), results.load(after)
    if complaint := compare.report(old, new, threshold, console()):
        typer.echo(f"{program}: {complaint}", err=True)
        raise typer.Exit(1)
