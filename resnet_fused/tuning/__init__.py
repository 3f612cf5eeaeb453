"""The verb ``tune``: for each op call of a model, measure who runs it fastest, and remember it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from resnet_fused.backends import _tuned, _tuned_file
from resnet_fused.backends._tuned_file import Choice
from resnet_fused.tuning.ahead import compile_ahead
from resnet_fused.tuning.calls import Call, draw, harvest, harvest_merged, with_parts
from resnet_fused.tuning.measure import Clock, CudaClock, Outcome, in_short, measure, wall_clock
from resnet_fused.tuning.report import Row, TuneReport


def tune(model: nn.Module, example_input: Tensor, *, force: bool = False) -> TuneReport:
    """Measure the candidates of all backends for each op call of ``model``; the fastest will run.

    The calls are found by running a copy without data; the model is not changed and need not be
    fused. Every candidate is held to the 2x rule against float64 and must keep NaN before it is
    timed; plain torch is one of them. Each choice is in force at once, in all models of this
    process, and is written to the cache file as soon as it is made, so that an interrupted run goes
    on where it stopped. A choice is for these shapes, dtypes and strides: another batch size is
    tuned by another call.

    On a GPU every later process reads the choices by itself. On the CPU they hold only in
    processes that call ``tune``, which then measures nothing again: the fixed order is good there.
    A call whose check needs more memory than there is has no choice; the table says so.
    A frozen engine keeps what was chosen when it was made, so tune before ``freeze``. Calls that an
    engine could make as one (a stem, a head, a bottleneck's 3x3 and 1x1) are timed as one, too,
    after their parts: two convolutions are merged only where that was faster than the fastest of
    each, a stem that one kernel runs unless its parts were faster.

    In training mode the calls are those of a step, forward and backward; a convolution with the
    BatchNorm before it is timed as one op and as two, each of these by its fastest. In 16 bits a
    bottleneck's end, and a projection of stride 1, are timed with their backward as one op
    (`pointwise_bn_act`) and as those that it replaces; in the table that is "default" or "apart".
    Once they are measured on a GPU, fused models train by them there without being asked to.

    Args:
        model: a module in the mode it will run in, fused or not.
        example_input: what the model takes, in the dtype, layout and on the device it will run on.
        force: measure again what is known.

    Returns:
        The choices; ``str()`` is a table.

    Raises:
        TypeError: ``model`` is not a module, or ``example_input`` not a floating point tensor.
        ValueError: the model is frozen, fails on such an input, or makes no fused call.
    """
    calls, device = with_parts(harvest(model, example_input)), example_input.device
    return tune_calls([*calls, *harvest_merged(model, example_input, device)], device, force=force)


def tune_calls(
    calls: Sequence[Call],
    device: torch.device,
    *,
    force: bool = False,
    clock: Clock | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    on_compiled: Callable[[], None] = lambda: None,
) -> TuneReport:
    """Tune calls that were harvested, as :func:`tune` does.

    Args:
        calls: what to tune.
        device: where.
        force: measure again what is known.
        clock: times one call; by default CUDA events on a GPU and the wall clock elsewhere.
        on_row: is told each row when it is there.
        on_compiled: is told, on a GPU, whenever a call is compiled; all are before the first row.
    """
    cuda = device.type == "cuda"
    cache: Path | None = _tuned_file.path(device)
    rows = []
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.cuda.device(device) if cuda else contextlib.nullcontext(),
    ):
        known = _tuned_file.measured(device)
        _tuned.remember(device, known)
        if cuda:
            compile_ahead(calls, device, () if force else known, on_compiled)
        clock = clock or (CudaClock(device) if cuda else wall_clock)
        for call in calls:
            try:
                args = draw(call, device)
                key = _tuned.signature(call.op, args)
                if key in known and not force:
                    row = Row(call, known[key], {}, 0)
                else:
                    outcome = measure(call.op, args, clock)
                    choice = _choice(outcome)
                    if choice is not None:
                        _tuned.remember(device, {key: choice})
                        cache = _tuned_file.merge(device, {key: choice}) and cache
                    row = Row(call, choice, _named(outcome), outcome.tried)
            except torch.OutOfMemoryError as error:
                # For the call's own tensors, or what its answers are held against; float64 takes
                # up to four times as much. The next calls may be smaller.
                row = Row(call, None, {"all": f"{call}: {in_short(error)}"}, 1)
            rows.append(row)
            on_row(row)
    return TuneReport(rows, cache)


def _choice(outcome: Outcome) -> Choice | None:
    if not outcome.seconds:
        return None
    (backend, candidate), best = next(iter(outcome.seconds.items()))
    others = list(outcome.seconds.values())[1:]
    margin = others[0] / best if others and best else None
    return Choice(backend, candidate, best * 1e6, margin)


def _named(outcome: Outcome) -> dict[str, str]:
    return {
        f"{backend}/{candidate}": fault for (backend, candidate), fault in outcome.faults.items()
    }
