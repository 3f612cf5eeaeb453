"""Compilation ahead of measurement: all calls on all processors, as nothing is timed meanwhile."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from resnet_fused.backends import _tuned, candidates
from resnet_fused.backends._tuned_file import Signature
from resnet_fused.tuning.calls import Call, draw

#: Calls that are compiled at a time, each with its tensors on the GPU.
MOST_AT_ONCE = 16


def compile_ahead(
    calls: Sequence[Call],
    device: torch.device,
    known: Container[Signature],
    on_call: Callable[[], None],
) -> None:
    """Run the Triton candidates of each call once, calls side by side.

    Most of a compilation is done without the interpreter's lock, so threads are enough. What fails
    here, for want of memory too, fails again and is told when it is measured.

    Args:
        calls: what will be measured.
        device: a GPU.
        known: the calls that will not.
        on_call: is told whenever a call is done.
    """
    pool, over = ThreadPoolExecutor(min(MOST_AT_ONCE, os.cpu_count() or 1)), threading.Event()
    try:
        for _ in as_completed([pool.submit(_run, call, device, known, over) for call in calls]):
            on_call()
    finally:
        over.set()  # an interrupt waits for what is being compiled, and for no more
        pool.shutdown(cancel_futures=True)


def _run(
    call: Call, device: torch.device, known: Container[Signature], over: threading.Event
) -> None:
    with contextlib.suppress(Exception), torch.no_grad(), torch.cuda.device(device):
        args = draw(call, device)
        if _tuned.signature(call.op, args) in known:
            return
        for (backend, _), run in candidates(call.op, *args).items():
            if backend == "triton" and not over.is_set():
                with contextlib.suppress(Exception):
                    run(*args)
