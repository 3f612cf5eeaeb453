"""What is shown while the job works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from resnet_fused.bench.results import OK, SKIPPED, Case, Row


class Watch:
    """Is told how the job gets on; this one keeps quiet."""

    def begin(self, cases: int) -> None:
        """Learn how many cases there are."""

    def doing(self, step: str, contender: str | None = None) -> None:
        """Learn what happens now, and who alone is at work."""

    def case_done(self, case: Case, rows: list[Row]) -> None:
        """Learn what a case gave."""


class LineWatch(Watch):
    """Writes a line per finished case."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def case_done(self, case: Case, rows: list[Row]) -> None:
        """Write the case's line."""
        self.console.print(line(case, rows), highlight=False, markup=False, soft_wrap=True)


class BarWatch(Watch, AbstractContextManager["BarWatch"]):
    """Shows a progress bar, to be used in a `with` block."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task("photographs", total=None)

    def __enter__(self) -> BarWatch:
        """Show the bar."""
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        self.progress.stop()

    def begin(self, cases: int) -> None:
        """Set the bar's length."""
        self.progress.update(self.task, total=cases)

    def doing(self, step: str, contender: str | None = None) -> None:
        """Show the step beside the bar."""
        self.progress.update(self.task, description=step)

    def case_done(self, case: Case, rows: list[Row]) -> None:
        """Move the bar on by one case."""
        self.progress.advance(self.task)


def line(case: Case, rows: list[Row]) -> str:
    """Return one line about a finished case."""
    parts = [f"{row.contender} {_outcome(row)}" for row in rows if row.verdict != SKIPPED]
    return f"{case}: {', '.join(parts)}"


def _outcome(row: Row) -> str:
    if row.verdict != OK or row.img_s is None:
        return f"{row.verdict} ({row.note})"
    ratio = f" ({row.ratio.median:.2f}x)" if row.ratio else ""
    return f"{row.img_s.median:.1f} img/s{ratio}"
