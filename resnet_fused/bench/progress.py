"""What is shown while the job works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from resnet_fused.bench.results import OK, SKIPPED, Case, Row
from resnet_fused.bench.tables import ratio_text


class Watch:
    """Is told how the job gets on; this one keeps quiet."""

    def begin(self, cases: int, share: float | None = None) -> None:
        """Learn how many cases there are, and the share of the time that those done should take.

        Without a share all cases count alike.
        """

    def doing(self, step: str, contender: str | None = None) -> None:
        """Learn what happens now, and who alone is at work."""

    def case_done(self, case: Case, rows: list[Row]) -> None:
        """Learn what a case gave."""


class Pace:
    """How long what is left should take, by what all that is done took.

    (Rich goes by the steps of the last 30 seconds, in which there may be none.)
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._last = clock()
        self._share: float | None = None
        self.done = self.cases = 0

    def begin(self, cases: int, share: float | None) -> None:
        """Learn how many cases there are, and the share of the time of those done."""
        if not self.cases:
            self._began = self._last = self._clock()
        self.cases, self._share = cases, share

    def step(self) -> None:
        """Count a case."""
        self.done, self._last = self.done + 1, self._clock()

    @property
    def left(self) -> float | None:
        """Seconds that are left, or None before the first case is done."""
        if not self.done or not self.cases:
            return None
        share = self.done / self.cases if self._share is None else self._share
        whole = (self._last - self._began) / max(share, 1e-9)
        return max(0.0, whole - (self._clock() - self._began))

    def __str__(self) -> str:
        """Return the seconds left as a clock shows them."""
        if (left := self.left) is None:
            return "-:--:--"
        minutes, seconds = divmod(round(left), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class LineWatch(Watch):
    """Writes a line per finished case: how many are done, and how long the rest should take."""

    def __init__(self, console: Console) -> None:
        self.console, self._pace = console, Pace()

    def begin(self, cases: int, share: float | None = None) -> None:
        """Remember what there is to do."""
        self._pace.begin(cases, share)

    def case_done(self, case: Case, rows: list[Row]) -> None:
        """Write the case's line."""
        self._pace.step()
        pace = self._pace
        count = f"[{pace.done}/{pace.cases}, {pace} left] " if pace.cases else ""
        self.console.print(count + line(case, rows), highlight=False, markup=False, soft_wrap=True)


class _Left(ProgressColumn):
    """The time that is left by a pace."""

    max_refresh = 0.5

    def __init__(self, pace: Pace) -> None:
        super().__init__(Column(no_wrap=True))
        self._pace = pace

    def render(self, task: Task) -> Text:
        """Return the time left."""
        return Text(f"{self._pace} left", style="progress.remaining")


class BarWatch(Watch, AbstractContextManager["BarWatch"]):
    """Shows a progress bar, to be used in a `with` block."""

    def __init__(self, console: Console) -> None:
        self._pace = Pace()
        # A long step is cut off, and pushes nothing out.
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self.progress = Progress(
            BarColumn(bar_width=min(24, console.width // 8)),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _Left(self._pace),
            TextColumn("{task.description}", markup=False, table_column=rest),
            console=console,
            transient=True,
            expand=True,
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

    def begin(self, cases: int, share: float | None = None) -> None:
        """Set the bar's length."""
        self._pace.begin(cases, share)
        self.progress.update(self.task, total=cases)

    def doing(self, step: str, contender: str | None = None) -> None:
        """Show the step beside the bar."""
        self.progress.update(self.task, description=step)

    def case_done(self, case: Case, rows: list[Row]) -> None:
        """Move the bar on by one case."""
        self._pace.step()
        self.progress.advance(self.task)


def line(case: Case, rows: list[Row]) -> str:
    """Return one line about a finished case."""
    parts = [f"{row.contender} {_outcome(row)}" for row in rows if row.verdict != SKIPPED]
    return f"{case}: {', '.join(parts)}"


def _outcome(row: Row) -> str:
    if row.verdict != OK or row.img_s is None:
        return f"{row.verdict} ({row.note})"
    ratio = f" ({ratio_text(row.ratio)})" if row.ratio else ""
    return f"{row.img_s.median:.1f} img/s{ratio}"
