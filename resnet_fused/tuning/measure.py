"""Which candidates answer rightly, and which of those is fastest."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import APART, REFERENCE, candidates
from resnet_fused.ops import OPS, TRAINING, _bn, bn_act_max_pool
from resnet_fused.testing import factors_dtype, to_float64, two_x_rule
from resnet_fused.tuning import block_end
from resnet_fused.tuning.calls import argument_names

#: Backend and candidate.
Name = tuple[str, str]
#: Returns the seconds that one call takes.
Clock = Callable[[Callable[[], object]], float]

#: Images of a batch whose answers are held against float64, spread evenly over it.
CHECKED_IMAGES = 8
#: Calls that a candidate is first judged by, and how much slower than the best it may then be.
SHORT_SAMPLE, TOO_SLOW = 3, 1.5
#: For how long a GPU is kept busy before each call, so that Python has launched it by then.
LAUNCHING_S = 5e-4
#: How often that is doubled for a call that takes Python longer.
DOUBLINGS = 5
#: How many go on to the interleaved rounds, and how many rounds there are.
FINALISTS, ROUNDS = 4, 9


def calls_at_most(candidates: int) -> int:
    """Return how often so many candidates of a call are run, two of each to check it.

    On a GPU those that Python was late for are run again beside.
    """
    return (2 + SHORT_SAMPLE) * candidates + ROUNDS * min(FINALISTS, candidates)


class Outcome(NamedTuple):
    """What was found out about the candidates of one call."""

    #: Median seconds of those that were in the last rounds, fastest first.
    seconds: dict[Name, float]
    #: Why a candidate was dropped: a wrong answer, or the error it raised. Not: being slow.
    faults: dict[Name, str]
    #: How many candidates there were, the reference among them.
    tried: int


def measure(op: str, args: Sequence[Any], clock: Clock) -> Outcome:
    """Check all candidates for a call, and time those that are right.

    An op that is a chain of smaller ones has these, each as it runs now, in place of plain torch.
    """
    answers = _Answers(op, args)
    if op == block_end.OP:
        fault = answers.fault(OPS[op].decomposition or OPS[op].reference)
        return _measure_block_end(args, clock, fault)
    runs: dict[Name, Callable[..., Tensor]] = dict(candidates(op, *args))
    runs[REFERENCE, "default"] = OPS[op].decomposition or OPS[op].reference
    wrong = {name: fault for name, run in runs.items() if (fault := answers.fault(run))}
    right = {n: functools.partial(run, *args) for n, run in runs.items() if n not in wrong}
    seconds, failed = fastest(right, clock)
    return Outcome(seconds, {**wrong, **failed}, len(runs))


def _measure_block_end(args: Sequence[Any], clock: Clock, fault: str | None) -> Outcome:
    """Time a block's end, forward and backward, as the one op, if it is right, and as others."""
    name = (REFERENCE, "default")
    runs = {name: block_end.together(*args), (REFERENCE, APART): block_end.apart(*args)}
    wrong = {} if fault is None else {name: fault}
    seconds, failed = fastest({n: run for n, run in runs.items() if n not in wrong}, clock)
    return Outcome(seconds, {**wrong, **failed}, len(runs))


def fastest(
    runs: Mapping[Name, Callable[[], object]], clock: Clock
) -> tuple[dict[Name, float], dict[Name, str]]:
    """Return the median seconds of the fastest runs, fastest first, and the errors of others.

    Each gives a short sample. Those that come near the best are timed in rounds, each beginning
    with another one, so that slow drifts of the machine fall on all alike.
    """
    errors: dict[Name, str] = {}

    def sample(name: Name, calls: int) -> list[float]:
        try:
            return [] if name in errors else [clock(runs[name]) for _ in range(calls)]
        except Exception as error:  # whatever one dies of, the others are still measured
            errors[name] = in_short(error)
            return []

    short = {name: min(times) for name in runs if (times := sample(name, SHORT_SAMPLE))}
    limit = TOO_SLOW * min(short.values(), default=0.0)
    finalists = [n for n in sorted(short, key=short.__getitem__) if short[n] <= limit][:FINALISTS]
    rounds: dict[Name, list[float]] = {name: [] for name in finalists}
    for turn in range(ROUNDS if finalists else 0):
        start = turn % len(finalists)
        for name in (*finalists[start:], *finalists[:start]):
            rounds[name] += sample(name, 1)
    medians = {n: statistics.median(times) for n, times in rounds.items() if n not in errors}
    rest = {name: run for name, run in runs.items() if name not in errors}
    if rest and not medians:  # all finalists died: the next ones take their place
        medians, more = fastest(rest, clock)
        errors.update(more)
    return dict(sorted(medians.items(), key=lambda item: item[1])), errors


class _Answers:
    """What a call must answer: float64's values, and NaN where NaN goes in.

    Of an op of inference, for some images; in training statistics and sums are those of all.
    """

    def __init__(self, op: str, args: Sequence[Any]) -> None:
        reference, x = OPS[op].reference, args[0]
        self._args, self._of_all = tuple(args), op in TRAINING
        self._with_bits = op in _bn.WITH_BITS
        #: How many results are numbers to compare. Bits behind them are held to these; of what a
        #: pool took only the shape is looked at, as the oracle's dtype has none.
        self._numbers = 1 if self._with_bits else 2 if op == bn_act_max_pool.NAME else None
        batch = len(x)
        self._images = torch.linspace(0, batch - 1, min(batch, CHECKED_IMAGES)).round().long()
        part = self._of_images(op, self._images.to(x.device))
        eager, oracle = _several(reference(*part)), _several(reference(*to_float64(part)))
        self._eager, self._oracle = eager[: self._numbers], oracle[: self._numbers]
        self._behind = eager[len(self._eager) :]
        shapes = [a.shape if isinstance(a, Tensor) else a for a in part]
        given = [o.shape for o in self._oracle]
        flops = OPS[op].flops(*shapes, out_shape=given if len(given) > 1 else given[0])
        terms = flops // (2 * max(1, self._oracle[0].numel()))
        self._reduced, self._size = max(1, terms), 0.0
        self._factors = factors_dtype(x) if "conv" in op else x.dtype
        if self._of_all:
            # What is summed over a channel; its terms may cancel.
            self._reduced = max(self._reduced, x.numel() // x.shape[1])
            floats = (a for a in part if isinstance(a, Tensor) and a.is_floating_point())
            self._size = max(float(a.abs().max()) for a in floats if a.numel())
        # A channel as a whole: NaN at one pixel would be spread further by some algorithms.
        self._spoiled = x.clone()
        self._spoiled[:, 0] = torch.nan
        first = self._of_images(op, self._images[:1].to(x.device), self._spoiled)
        spoiled = _several(reference(*to_float64(first)))
        self._nan = [o.isnan() for o in spoiled[: self._numbers]]

    def _of_images(self, op: str, images: Tensor, x: Tensor | None = None) -> tuple[Any, ...]:
        """Return the arguments for some images alone, and for another x if one is given."""
        args = self._args if x is None else (x, *self._args[1:])
        if self._of_all:
            return args
        named = zip(argument_names(op), args, strict=True)
        maps = ("x", "residual")
        return tuple(a[images] if n in maps and a is not None else a for n, a in named)

    def fault(self, run: Callable[..., Any]) -> str | None:
        """Return what is wrong with the answers of ``run``, or None."""
        try:
            values = _several(run(*self._args))
            for given, found in zip(self._behind, values[len(self._eager) :], strict=True):
                if found.shape != given.shape:
                    return f"wrong: gives the shape {tuple(found.shape)}"
                held_to = _bn.bits_of(values[0]) if given.numel() else given
                if self._with_bits and not torch.equal(found, held_to):
                    return "wrong: the bits are not those of the values"
            faults = map(self._fault, values[: self._numbers], self._eager, self._oracle)
            if fault := next(filter(None, faults), None):
                return fault
            spoiled = _several(run(self._spoiled, *self._args[1:]))[: self._numbers]
            nan = [v if self._of_all else v[:1] for v in spoiled]
            kept = all(torch.equal(v.isnan(), n) for v, n in zip(nan, self._nan, strict=True))
            return None if kept else "wrong: does not keep NaN"
        except Exception as error:  # a candidate may die in any way, a compiler's among them
            return in_short(error)

    def _fault(self, value: Tensor, eager: Tensor, oracle: Tensor) -> str | None:
        images = len(oracle) if self._of_all else len(self._args[0])
        if value.shape != (images, *oracle.shape[1:]):
            return f"wrong: gives the shape {tuple(value.shape)}"
        if self._of_all:
            # Float32 sums are of terms in the input's dtype.
            size = self._size if value.dim() == 1 else 0.0
            check = two_x_rule(value, eager, oracle, self._reduced, self._factors, size)
        else:
            checked = value[self._images.to(value.device)]
            check = two_x_rule(checked, eager, oracle, self._reduced, self._factors)
        if check.ok:
            return None
        return f"wrong: error {check.error:.1e}, allowed {check.allowed:.1e}"


def _several(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def in_short(error: Exception) -> str:
    """Return an error's kind and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def wall_clock(run: Callable[[], object]) -> float:
    """Return the seconds a call takes by the wall clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class CudaClock:
    """Seconds of GPU time by CUDA events, with the L2 cache flushed before each call.

    The flushes also keep the GPU busy while the call is being launched, so that what is timed is
    the kernels and not Python, as it is inside a CUDA graph or a full queue. Where the GPU was done
    with them first, as a chain of ops takes Python long, the call is timed again behind more.
    """

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(size, 2**28), dtype=torch.uint8, device=device)
        self._flushes = 1
        seconds = min(self(self._flush.zero_) for _ in range(SHORT_SAMPLE))
        self._flushes = max(1, math.ceil(LAUNCHING_S / seconds))

    def __call__(
        self, run: Callable[[], object], before: Callable[[], object] = lambda: None
    ) -> float:
        """Return the seconds that one call takes on the current stream, after `before`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for doublings in range(1 + DOUBLINGS):
            for _ in range(self._flushes << doublings):
                self._flush.zero_()
            before()
            start.record()
            run()
            end.record()
            waited_for_python = start.query()
            end.synchronize()
            if not waited_for_python:
                break
        return start.elapsed_time(end) / 1e3
