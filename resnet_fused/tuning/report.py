"""What tuning found, as a table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from resnet_fused.backends._tuned_file import Choice
from resnet_fused.tuning.calls import Call


class Row(NamedTuple):
    """One call of the model and what runs it."""

    call: Call
    #: None where no candidate gave a right answer; the call then runs as if it had not been tuned.
    choice: Choice | None
    #: Why candidates were dropped, by name.
    faults: dict[str, str]
    #: How many candidates there were; 0 if the choice was known before.
    tried: int

    @property
    def known(self) -> bool:
        """Whether the choice was found in the cache, not measured now."""
        return self.tried == 0


class TuneReport(NamedTuple):
    """The choices for a model's calls; ``str()`` is a table."""

    rows: list[Row]
    #: The cache file they are kept in; None where it cannot be written.
    cache: Path | None

    @property
    def ok(self) -> bool:
        """Whether every call has a choice."""
        return all(row.choice is not None for row in self.rows)

    def __str__(self) -> str:
        """Return one line per call, then the candidates that were dropped, then the cache file."""
        head = ("call", "times", "winner", "us", "next", "of", "dropped")
        table: list[tuple[str, ...]] = [head, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        sides = "<><>>>>"
        line = "  ".join(f"{{:{s}{w}}}" for s, w in zip(sides, widths, strict=True))
        lines = [line.format(*cells).rstrip() for cells in table]
        counted = Counter(item for row in self.rows for item in row.faults.items())
        for (name, fault), calls in counted.items():
            lines.append(f"dropped: {name} in {calls} of {len(self.rows)} calls: {fault}")
        lines.append("us: median of one call; next: the second fastest over it")
        lines.append(f"kept in {self.cache}" if self.cache else "kept in this process only")
        return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    call, choice = row.call, row.choice
    if choice is None:
        found = ("none was right", "-", "-")
    else:
        margin = "-" if choice.margin is None else f"{choice.margin:.2f}x"
        winner = f"{choice.backend}/{choice.candidate}"
        found = (winner, f"{choice.microseconds:.1f}", margin)
    tried = ("known", "-") if row.known else (str(row.tried), str(len(row.faults)))
    return (str(call), str(call.count), *found, *tried)
