"""What the command lines share: one line for what cannot be done, consoles, progress."""

from __future__ import annotations

import errno
import io
import os
import sys
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


def run(app: typer.Typer, program: str) -> None:
    """Run a command line; that its output cannot be shown, or not all of it, costs no traceback.

    A character that the output's encoding lacks is shown as "?".
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app(prog_name=program)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        # What is still to be printed would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"{program}: the output cannot be printed: {error.strerror}")


def refuse(program: str, message: str) -> NoReturn:
    """Say in one line what is wrong, and exit with 2."""
    typer.echo(f"{program}: {message}", err=True)
    raise typer.Exit(2)


@contextmanager
def one_line_errors(program: str, interrupted: str = "") -> Iterator[None]:
    """Turn a `UsageError` into its one line and exit code 2; other errors keep their traceback.

    `interrupted` says what is left of a command that Ctrl-C ended.
    """
    try:
        yield
    except UsageError as error:
        refuse(program, str(error))
    except KeyboardInterrupt:
        typer.echo(f"{program}: {'; '.join(filter(None, ('interrupted', interrupted)))}", err=True)
        raise typer.Exit(130) from None


def given(context: typer.Context) -> dict[str, str]:
    """Return the options that the command line gives: how each is written, by its parameter."""
    found = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE":
            found[str(parameter.name)] = parameter.opts[0]
    return found


def refuse_beside(context: typer.Context, what: str, *taken: str) -> None:
    """Raise `UsageError` for a given option that changes nothing of `what`: all but the `taken`."""
    for name, option in given(context).items():
        if name not in taken:
            raise UsageError(f"{option}: changes nothing of {what}; leave it out")


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

    Raises `UsageError` for a file that is no record, two without a case in common, or a threshold
    that is no share.
    """
    if threshold is not None and not threshold >= 0:
        raise UsageError(f"--threshold: {threshold:g} given; accepted: 0 or more, as 0.05")
    old, new = results.load(before), results.load(after)
    if complaint := compare.report(old, new, threshold, console()):
        typer.echo(f"{program}: {complaint}", err=True)
        raise typer.Exit(1)
