"""Interleaved timing: every contender once a round, each round beginning with another one.

Slow drifts of the machine (heat, a neighbour) then fall on all contenders alike, and ratios are
taken within a round, where both sides saw the same machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch

from resnet_fused.backends import _device
from resnet_fused.tuning.measure import CudaClock

T = TypeVar("T")
#: What a call finds in the caches. Hot: all that the call before it left there, as in a loop over
#: one layer. Fed: its input, just written, and the code, but none of its weights, as a layer in a
#: model does. Cold: nothing.
CACHES = HOT, FED, COLD = ("hot", "fed", "cold")

SHORTEST_SAMPLE_S = 0.04
#: Bytes of a last-level cache where the system does not tell: more than most.
LARGE_CACHE = 2**27
#: The rule of what is a difference is here alone: `Spread.covers` for ratios within rounds,
#: `Spread.overlaps` for two runs. Each takes two equal contenders for different in at most so many
#: cases of a hundred. From `FEW` rounds on the middle three fifths decide, below it every round
#: must say the same, and where even that is likely by chance nothing is a difference.
CHANCE = 0.07
FEW = 11
#: Rounds that are made unless that takes `PATIENCE` times the seconds there are, those that are
#: made in any case, and the most.
MIN_ROUNDS, LEAST_ROUNDS, MAX_ROUNDS = FEW, 5, 30
PATIENCE = 4.0


class Clock(Protocol):
    """Tells the seconds per call of a function that is called so many times."""

    def __call__(
        self, run: Callable[[], object], calls: int, feed: Callable[[], object] = ...
    ) -> float:
        """Time the calls; where caches are emptied before each, `feed` follows, untimed."""


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentile: the middle three fifths of what was seen."""

    median: float
    p20: float
    p80: float
    #: Of how many values, the least and the most of them. Not said in records of before, of which
    #: the middle three fifths decide, however few.
    rounds: int | None = None
    least: float | None = None
    most: float | None = None

    def covers(self, value: float) -> bool:
        """Whether a difference of this ratio, taken round by round, from a value may be noise."""
        if self.rounds is not None and 2 * 0.5**self.rounds > CHANCE:
            return True
        low, high = self._range
        return low <= value <= high

    def overlaps(self, other: Spread) -> bool:
        """Whether a difference from what another run saw may be noise."""
        if self.rounds is not None and other.rounds is not None:
            orders = math.comb(self.rounds + other.rounds, self.rounds)
            if 2 / orders > CHANCE:
                return True
        (low, high), (other_low, other_high) = self._range, other._range
        return low <= other_high and other_low <= high

    @property
    def _range(self) -> tuple[float, float]:
        if self.rounds is None or self.least is None or self.most is None or self.rounds >= FEW:
            return self.p20, self.p80
        return self.least, self.most


@dataclass(frozen=True)
class Rounds:
    """How many rounds: between `least` and `most`, as many as fit into `seconds`.

    Short of `least` and long past the seconds there are fewer, but for the first few.
    """

    least: int = MIN_ROUNDS
    most: int = MAX_ROUNDS
    seconds: float = math.inf

    def goes_on(self, done: int, elapsed: float) -> bool:
        """Whether another round is due, taking it to last as long as those done did."""
        if done < min(self.least, LEAST_ROUNDS):
            return True
        ends = elapsed * (done + 1) / done if done else 0.0
        limit = PATIENCE * self.seconds if done < self.least else self.seconds
        return done < self.most and ends <= limit


def spread(values: Sequence[float]) -> Spread:
    """Return median, p20 and p80 of at least one value, interpolated linearly."""
    p20, median, p80 = np.percentile(values, (20, 50, 80))
    return Spread(
        float(median), float(p20), float(p80), len(values), float(min(values)), float(max(values))
    )


def paired_ratio(reference: Sequence[float], other: Sequence[float]) -> Spread:
    """Return the spread of `reference / other` taken round by round (above 1: other is faster)."""
    return spread([a / b for a, b in zip(reference, other, strict=True)])


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """Return the items in their order, beginning with number `turn` (counted round and round)."""
    start = turn % len(items)
    return [*items[start:], *items[:start]]


def nothing() -> None:
    """Feed nobody."""


def elapsed_cpu(
    run: Callable[[], object], calls: int, feed: Callable[[], object] = nothing
) -> float:
    """Seconds per call of `run`, by the wall clock."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def elapsed_thread(
    run: Callable[[], object], calls: int, feed: Callable[[], object] = nothing
) -> float:
    """Seconds per call of `run` that this thread was on a processor, for work that is all its own.

    What else runs on the machine then costs it its caches, but not its turns.
    """
    start = time.thread_time()
    for _ in range(calls):
        run()
    return (time.thread_time() - start) / calls


def elapsed_cuda(
    run: Callable[[], object], calls: int, feed: Callable[[], object] = nothing
) -> float:
    """Seconds per call of `run` on the current CUDA stream, by its events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def finished(run: Callable[[], object], device: str) -> Callable[[], object]:
    """Return the run for a clock that knows nothing of GPUs: it ends when its work there has."""
    if device != "cuda":
        return run

    def whole() -> object:
        result = run()
        torch.cuda.synchronize()
        return result

    return whole


def clock_for(device: str, *, emptied: bool = False, elapsed: Clock = elapsed_cpu) -> Clock:
    """Return the function that times calls on `device`, with caches emptied before each or not.

    `elapsed` times them on a CPU.
    """
    if not emptied:
        return elapsed_cuda if device == "cuda" else elapsed
    single: Callable[[Callable[[], object], Callable[[], object]], float]
    if device == "cuda":
        single = CudaClock(torch.device("cuda", torch.cuda.current_device()))
    else:
        single = _flushed_cpu(
            torch.empty(2 * (_device.last_cache_bytes() or LARGE_CACHE), dtype=torch.uint8), elapsed
        )

    def clock(run: Callable[[], object], calls: int, feed: Callable[[], object] = nothing) -> float:
        return sum(single(run, feed) for _ in range(calls)) / calls

    return clock


def _flushed_cpu(
    flushed: torch.Tensor, elapsed: Clock
) -> Callable[[Callable[[], object], Callable[[], object]], float]:
    def single(run: Callable[[], object], feed: Callable[[], object]) -> float:
        flushed.add_(1)
        feed()
        return elapsed(run, 1)

    return single


def interleave(
    runs: Mapping[str, Callable[[], object]],
    rounds: Rounds,
    *,
    clock: Clock = elapsed_cpu,
    single: bool = False,
    feeds: Mapping[str, Callable[[], object]] | None = None,
    on_round: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Time every run once per round and return its seconds per call, one value per round.

    All runs make the same number of calls per sample, enough for the quickest to last
    `SHORTEST_SAMPLE_S`; a `single` one where the clock itself takes most of the time, as one that
    empties the caches does, which then lets each one's `feeds` write its input again. Where there
    are more, an untimed call goes first: it brings the contender's weights back into the cache that
    the one before it filled.
    """
    quickest = min(clock(run, 1) for run in runs.values())
    calls = 1 if single else max(1, math.ceil(SHORTEST_SAMPLE_S / max(quickest, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    begin = time.perf_counter()
    done = 0
    while rounds.goes_on(done, time.perf_counter() - begin):
        for name in rotated(names, done):
            if calls > 1:
                runs[name]()
            seconds[name].append(clock(runs[name], calls, (feeds or {}).get(name, nothing)))
        done += 1
        on_round(done)
    return seconds
