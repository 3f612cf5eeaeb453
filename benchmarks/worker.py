"""A process that does the measuring, so that a crash, a hang or the system's end costs one case.

It is kept from case to case, as starting one costs seconds, and replaced after it was lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from resnet_fused.bench.measure import device_lost

#: Seconds that a process whose pipe has closed is given to end.
GRACE_S = 5.0
#: See prctl(2).
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Step:
    """What the process does now, and for which contender."""

    text: str
    contender: str | None


@dataclass(frozen=True)
class Done:
    """What the call returned."""

    result: Any


@dataclass(frozen=True)
class Raised:
    """The error that ended the call; the process lives."""

    error: Exception


@dataclass(frozen=True)
class Broken:
    """The error that ended the call, and that has left the process without its GPU."""

    text: str


@dataclass(frozen=True)
class Lost:
    """The process did not live to return, or not to run another call.

    It hung, ended by itself with an exit code, or lost its GPU by an error, whose text this is.
    """

    hung: bool
    exit_code: int | None
    #: The last step that it told of.
    step: Step | None
    error: str = ""

    @property
    def killed(self) -> bool:
        """Whether the system ended it, which it does to who takes the last of the memory."""
        return not self.hung and self.exit_code == -signal.SIGKILL

    def __str__(self) -> str:
        """Return what happened, and during what."""
        during = f" while {self.step.text}" if self.step else ""
        if self.error:
            return f"{self.error}{during}"
        if self.hung:
            return f"gave no result within its limit{during}"
        if self.exit_code is not None and self.exit_code < 0:
            return f"ended by {signal.Signals(-self.exit_code).name}{during}"
        return f"ended with exit code {self.exit_code}{during}"


class Worker:
    """Calls functions in a process of its own, one after another."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Connection | None = None

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        limit: float,
        on_step: Callable[[Step], None] = lambda step: None,
    ) -> Done | Raised | Lost:
        """Return what ``function(*arguments, watch=...)`` comes to within `limit` seconds.

        Both must pickle; `watch` tells of the steps, and `on_step` hears of them here.
        """
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._connection is not None
        ends, step = time.monotonic() + limit, None
        try:
            self._connection.send((function, arguments))
            while self._connection.poll(max(0.0, ends - time.monotonic())):
                message = self._connection.recv()
                if isinstance(message, Broken):
                    self._end()
                    return Lost(False, None, step, message.text)
                if not isinstance(message, Step):
                    return message
                step = message
                on_step(step)
        except (EOFError, OSError):  # it is gone, and the pipe with it
            self._process.join(GRACE_S)
            exit_code = self._process.exitcode
            self._end()
            return Lost(False, exit_code, step)
        self._end()
        return Lost(True, None, step)

    def close(self) -> None:
        """Let the process end, as it does when nobody can call it any more."""
        if self._process is None or self._connection is None:
            return
        self._connection.close()
        self._process.join(GRACE_S)
        self._end()

    def _end(self) -> None:
        """End the process and those it started, whatever they do."""
        with contextlib.suppress(ProcessLookupError):  # gone, or not yet a group of its own
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._process = self._connection = None

    def _start(self) -> None:
        # A forked process would share this one's CUDA context and thread pools, which cannot work.
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), daemon=False)
        self._process.start()
        theirs.close()


class Teller:
    """The watch of the process: it sends its steps to the other side."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def doing(self, step: str, contender: str | None = None) -> None:
        """Tell what happens now."""
        self._connection.send(Step(step, contender))


def serve(connection: Connection) -> None:
    """Answer calls until the other side is gone."""
    os.setsid()  # a group of its own: Ctrl-C passes it by, and what it starts ends with it
    with contextlib.suppress(OSError, AttributeError):  # Linux: it ends when the asking one does
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    teller = Teller(connection)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            function, arguments = connection.recv()
            try:
                answer: Done | Raised | Broken = Done(function(*arguments, watch=teller))
            except Exception as error:  # whatever ends a case is told, and the next one may come
                answer = Broken(_line(error)) if device_lost(error) else Raised(_plain(error))
            connection.send(answer)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _plain(error: Exception) -> Exception:
    """Return the error as one that surely pickles, of a kind the other side knows."""
    if type(error) in (MemoryError, RuntimeError):
        return type(error)(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
