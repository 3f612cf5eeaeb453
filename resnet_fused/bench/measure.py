"""One case: every contender is built, checked, timed against the others, and checked again."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from resnet_fused.bench import accuracy, memory, timing
from resnet_fused.bench.contenders import OWN, REFERENCE, Build, Runner, Setup
from resnet_fused.bench.networks import Network
from resnet_fused.bench.options import TF32
from resnet_fused.bench.peers import PEERS
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import FAILED, OK, OUT_OF_MEMORY, SKIPPED, WRONG, Case, Row


@dataclass(frozen=True)
class Method:
    """Who takes part in a case, and how long and by which clock they are timed."""

    #: By name, how each is built: a `Build`, for training what makes a network ready for it, for a
    #: pass of BatchNorm what makes a call of its maps.
    contenders: Mapping[str, Callable[..., Any]]
    #: Asked for when the timing begins, after the building and checking.
    rounds: Callable[[], timing.Rounds]
    clock: timing.Clock
    #: What a call finds in the caches, which the clock empties unless they are hot.
    caches: str = timing.HOT

    def time(
        self,
        runs: Mapping[str, Callable[[], object]],
        on_round: Callable[[int], None],
        feeds: Mapping[str, Callable[[], object]] | None = None,
    ) -> dict[str, list[float]]:
        """Return the seconds per call of every run, one value per round."""
        if not runs:
            return {}
        return timing.interleave(
            runs,
            self.rounds(),
            clock=self.clock,
            single=self.caches != timing.HOT,
            feeds=feeds if self.caches == timing.FED else None,
            on_round=on_round,
        )


#: Seconds that a twin runs before a call whose input alone shall be in the caches: after some
#: milliseconds of waiting for memory a Zen 5 takes as long to be at full speed again.
WARM_S = 0.005
#: On a GPU the twin's calls are launched and not waited for, so that the device is still at work
#: when the timed call is launched. Counted out beforehand, they are never more than these.
MOST_WARM = 32


@dataclass
class Entry:
    """A contender in one case: what is known of it so far."""

    row: Row
    runner: Runner | None = None
    input: Any = None
    #: A call of another instance, with weights of its own.
    twin: Callable[[], object] = timing.nothing
    #: How often the twin runs before a call; None: as often as it does in `WARM_S`.
    warm_calls: int | None = None

    def call(self) -> object:
        """Run once on the example: what is timed."""
        assert self.runner is not None
        return self.runner.run(self.input)

    def feed(self) -> None:
        """Leave the caches as the layer before would have: code warm, the input just written."""
        if self.warm_calls is None:
            ends = time.perf_counter() + WARM_S
            while time.perf_counter() < ends:
                self.twin()
        for _ in range(self.warm_calls or 0):
            self.twin()
        if isinstance(self.input, torch.Tensor | np.ndarray):  # not JAX's, which are read only
            torch.as_tensor(self.input).mul_(1)


def contenders(peers: tuple[str, ...]) -> dict[str, Build]:
    """Return the package's own contenders and the peers, the reference first."""
    return {**OWN, **{name: PEERS[name].build for name in peers}}


def run_case(network: Network, case: Case, setup: Setup, method: Method, watch: Watch) -> list[Row]:
    """Return a row per contender.

    A contender whose answer is wrong before the timing is not timed, and one whose answer is wrong
    after it (a reused buffer, say) loses its times.
    """
    forget_compiled()
    with precision(case.dtype):
        return _run_case(network, case, setup, method, watch)


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Let float32 mean float32 and tf32 mean TF32 on a GPU; let cuDNN choose by measurement.

    torch convolves float32 in TF32 unless told otherwise. The reference on a GPU deserves cuDNN's
    measured choice, as a person in earnest would set it.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == TF32
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=True, allow_tf32=dtype != "float32"
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def run_entered(
    case: Case,
    method: Method,
    enter: Callable[[str, Callable[..., Any]], tuple[Row, Callable[[], object]]],
    blank: Callable[[str], Row],
    watch: Watch,
    again: Callable[[Row], Row] = lambda row: row,
) -> list[Row]:
    """Return a row per contender: `enter` builds and judges one, those that are right are timed.

    `blank` gives the row of one that an error ended. `again` judges one that was timed, which
    loses its times where it is wrong.
    """
    forget_compiled()
    rows: dict[str, Row] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name, build in method.contenders.items():
        watch.doing(f"{case}: building {name}", contender=name)
        try:
            rows[name], run = enter(name, build)
        # Whatever a contender dies of is its own result; the others must still be measured.
        except Exception as error:
            if device_lost(error):
                raise
            rows[name] = failed(blank(name), error)
            continue
        if rows[name].verdict == OK:
            runs[name] = run
    seconds = method.time(runs, lambda done: watch.doing(f"{case}: round {done}"))
    rows |= {name: again(rows[name]) for name in seconds}
    right = {name: values for name, values in seconds.items() if rows[name].verdict == OK}
    return [with_speed(row, right) for row in rows.values()]


def with_speed(row: Row, seconds: Mapping[str, list[float]]) -> Row:
    """Return the row with the speeds that its seconds per call give, if it has any.

    GFLOP/s counts two operations per multiply-add of the convolutions and linear layers. `ratio`
    is taken round by round against the reference and is above 1 for what is quicker.
    """
    own, reference = seconds.get(row.contender), seconds.get(REFERENCE)
    if own is None:
        return row
    img_s = timing.spread([row.case.batch / value for value in own])
    return replace(
        row,
        img_s=img_s,
        gflop_s=2 * row.gmacs * img_s.median,
        ratio=timing.paired_ratio(reference, own) if reference else None,
        seconds=own,
    )


def failed(row: Row, error: BaseException) -> Row:
    """Return the row of a contender that an error ended: out of memory, or failed."""
    reason = (str(error).strip().splitlines() or [""])[0]
    verdict = OUT_OF_MEMORY if _is_out_of_memory(error) else FAILED
    return replace(row, verdict=verdict, note=f"{type(error).__name__}: {reason}")


def device_lost(error: BaseException) -> bool:
    """Whether an error has cost this process its GPU: all that comes after would fail as well."""
    if _is_out_of_memory(error):
        return False
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
        return True
    if not torch.cuda.is_initialized():
        return False
    try:  # what a compiler, a library or a kernel of ours raises has words of its own
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _is_out_of_memory(error: BaseException) -> bool:
    # What torch's CPU allocator raises is a RuntimeError like any other, and what another process
    # died of is known by its words alone.
    kinds, words = (MemoryError, torch.OutOfMemoryError), ("can't allocate memory", "out of memory")
    return isinstance(error, kinds) or any(word in str(error).lower() for word in words)


def entered(
    network: Network,
    case: Case,
    setup: Setup,
    builds: Mapping[str, Build],
    watch: Watch,
    *,
    twins: bool = False,
) -> list[Entry]:
    """Build every contender, and its twin if asked for, and hold its answer to the rule.

    The reference comes first.
    """
    entries: list[Entry] = []
    eager_error = math.inf
    for name, build in builds.items():
        watch.doing(f"{case}: building {name}", contender=name)
        entry = _enter(name, build, network, case, setup, twins=twins)
        if entry.runner:
            error = _error(entry.runner, case, network)
            eager_error = error if name == REFERENCE else eager_error
            allowed = accuracy.allowed_error(eager_error, setup.dtype, network.reduced)
            entry.row = judged(entry.row, error, allowed)
        entries.append(entry)
    return entries


def _run_case(
    network: Network, case: Case, setup: Setup, method: Method, watch: Watch
) -> list[Row]:
    twins = method.caches == timing.FED
    entries = entered(network, case, setup, method.contenders, watch, twins=twins)
    timed = {entry.row.contender: entry for entry in entries if entry.row.verdict == OK}
    runs = {name: entry.call for name, entry in timed.items()}
    feeds = {name: entry.feed for name, entry in timed.items()}
    with torch.inference_mode():
        seconds = method.time(runs, lambda done: watch.doing(f"{case}: round {done}"), feeds)
    for entry in entries:
        row = entry.row
        if row.verdict == OK and entry.runner:
            error = max(row.error or 0.0, _error(entry.runner, case, network))
            entry.row = judged(row, error, row.allowed_error or 0.0)
    right = {e.row.contender: seconds[e.row.contender] for e in entries if e.row.verdict == OK}
    return [with_speed(entry.row, right) for entry in entries]


def forget_compiled() -> None:
    """Forget what torch.compile made for cases before: past some eight it would give up."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _enter(
    name: str, build: Build, network: Network, case: Case, setup: Setup, *, twins: bool
) -> Entry:
    """Build a contender and run it twice, the second time for its peak memory."""
    row = Row(case, name, OK, network.macs / 1e9, network.params / 1e6)
    declined = PEERS[name].declines(setup.dtype, setup.device) if name in PEERS else None
    if declined:
        return Entry(replace(row, verdict=SKIPPED, note=declined))
    meter = memory.meter_for(setup.device)
    before = meter.now()
    try:
        runner = build(setup)
        # In inference mode, as the batches that are checked: a compiled peer tells them apart.
        with torch.inference_mode():
            example = runner.prepare(setup.example)
            runner.run(example)
            meter.restart()
            runner.run(example)
        peak = memory.growth_mib(before, meter.peak())
        twin = _call(build(setup), setup) if twins else timing.nothing
        warm_calls = _warm_calls(twin, setup.device)
    # Whatever a contender dies of is its own result; the others must still be measured.
    except Exception as error:
        if device_lost(error):
            raise
        return Entry(failed(row, error))
    return Entry(replace(row, peak_mib=peak), runner, example, twin, warm_calls)


def _warm_calls(twin: Callable[[], object], device: str) -> int | None:
    """Return how many calls of a twin keep a GPU busy for `WARM_S`, but not too many."""
    if device != "cuda" or twin is timing.nothing:
        return None
    with torch.inference_mode():
        seconds = timing.elapsed_cuda(twin, 1)
    return min(MOST_WARM, max(1, math.ceil(WARM_S / max(seconds, 1e-9))))


def _call(runner: Runner, setup: Setup) -> Callable[[], object]:
    with torch.inference_mode():
        example = runner.prepare(setup.example)
        runner.run(example)
    return lambda: runner.run(example)


def _error(runner: Runner, case: Case, network: Network) -> float:
    check = accuracy.check_batch(network.checked, case.batch)
    with torch.inference_mode():
        output = runner.read(runner.run(runner.prepare(check)))
        return accuracy.relative_error(output, network.answers)


def judged(row: Row, error: float, allowed: float) -> Row:
    """Return the row with its error, and WRONG where that is more than allowed."""
    finite = math.isfinite(error)
    if error <= allowed:
        verdict, note = OK, ""
    elif finite:
        verdict, note = WRONG, f"error {error:.1e}, allowed {allowed:.1e}"
    else:
        verdict, note = WRONG, "output of the wrong shape or not finite"
    return replace(
        row,
        verdict=verdict,
        error=error if finite else None,
        allowed_error=allowed if math.isfinite(allowed) else None,
        note=note,
    )
