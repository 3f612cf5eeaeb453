"""Documents with a section between two marks, which a command writes anew."""

from __future__ import annotations

from resnet_fused.bench.options import UsageError


def replaced(text: str, begin: str, end: str, section: str, name: str) -> str:
    """Return the text with another section between its first two marks.

    Raises:
        UsageError: it, the document `name`, has not these two, in this order.
    """
    before, opened, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise UsageError(f"{name}: has no {begin} followed by {end}")
    return f"{before}{begin}\n{section}\n{end}{after}"
