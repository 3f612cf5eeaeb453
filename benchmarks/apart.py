"""Training in a process of its own, of which a call here runs a step, or an epoch.

Whether what a step frees goes back to the system, to be faulted in anew by the next one, depends on
what else the process has done, and makes up to a tenth of the step. So on a CPU nobody trains in a
process where others did.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.worker import Done, Raised, Worker
from resnet_fused.backends import requested, use_backend
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import Row

#: The case has a limit, and whoever holds to it ends this process, and the other one with it.
NO_LIMIT_S = 1e6


class Apart:
    """One contender's process, from `enter` to `close`."""

    def __init__(self) -> None:
        self._worker = Worker()

    def close(self) -> None:
        """End the process."""
        self._worker.close()

    def enter(self, enter: Callable[..., tuple[Row, Callable[[], None]]], *arguments: Any) -> Row:
        """Call `enter` there and return its row; its step stays there."""
        sent = io.BytesIO()  # not tensors by themselves, which would be moved to shared memory
        torch.save((enter, arguments), sent)
        return self._call(_enter, sent.getvalue(), torch.get_num_threads(), requested())

    def __call__(self) -> None:
        """Take a step."""
        self._call(_step)

    def ask(self, method: str) -> Any:
        """Return what a method of the step comes to there."""
        return self._call(_ask, method)

    def _call(self, *call: Any) -> Any:
        outcome = self._worker.call(*call, limit=NO_LIMIT_S)
        if isinstance(outcome, Done):
            return outcome.result
        raise outcome.error if isinstance(outcome, Raised) else RuntimeError(str(outcome))


#: In the other process: the step that was entered.
_entered: list[Callable[[], None]] = []


def _enter(sent: bytes, threads: int, backend: str, *, watch: Watch) -> Row:
    torch.set_num_threads(threads)
    use_backend(backend)
    # From the process that has started this one.
    enter, arguments = torch.load(io.BytesIO(sent), weights_only=False)
    row, step = enter(*arguments)
    _entered.append(step)
    return row


def _step(*, watch: Watch) -> None:
    _entered[-1]()


def _ask(method: str, *, watch: Watch) -> Any:
    return getattr(_entered[-1], method)()
