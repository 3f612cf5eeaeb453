"""The backends: who runs an op, and why not the others.

A backend is a module with ``available() -> reason | None``, ``ADVICE`` (what to do about the
reason), ``supports(op, *args) -> reason | None`` and one function per op it runs, named as the op
and taking its arguments. One that knows several ways to run a call lists them for the tuner:
``candidates(op, *args) -> {name: function}``. ``ONLY_MEASURED`` names ops that it runs where it was
asked for or measured to be fastest, and not merely because it can; of these it may know calls that
it runs unmeasured: ``faster_unmeasured(op, *args)``, asked where it supports them. One that trains
says from how many multiply-adds of a convolution on it was measured to be faster, by dtype:
``FASTER_IN_TRAINING``, and in a CUDA graph ``FASTER_IN_A_GRAPH``. The reference is not a module: it
stands in the op's own file.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch

from resnet_fused.backends import _requested, _tuned, cpu, cuda, cudnn, onednn, triton
from resnet_fused.backends._requested import AUTO

#: Tried in this order by "auto"; the reference runs what none of them takes.
ORDER: dict[str, ModuleType] = {
    "cpu": cpu,
    "onednn": onednn,
    "cuda": cuda,
    "triton": triton,
    "cudnn": cudnn,
}
REFERENCE = "reference"
#: The candidate of an op that stands for several where these were faster, forward and backward.
APART = "apart"


class Backend(NamedTuple):
    """One backend as :func:`backends` lists it."""

    name: str
    available: bool
    #: Why it is not available; empty when it is.
    reason: str
    #: What to do about that; empty when it is available.
    advice: str


class Verdict(NamedTuple):
    """One backend's answer about one call, as :func:`explain` lists it."""

    name: str
    chosen: bool
    #: Why it was not chosen; empty for the chosen one.
    reason: str


class Explanation(tuple[Verdict, ...]):
    """The verdicts of all backends about one call; ``str()`` is a table."""

    @property
    def chosen(self) -> str:
        """The name of the backend that runs the call."""
        return next(v.name for v in self if v.chosen)

    def __str__(self) -> str:
        """Return one line per backend."""
        width = max(len(v.name) for v in self)
        return "\n".join(f"{v.name:<{width}}  {'runs' if v.chosen else v.reason}" for v in self)


def _check_name(name: str, source: str) -> str:
    if name in (AUTO, REFERENCE) or name in ORDER:
        return name
    names = (AUTO, *ORDER, REFERENCE)
    near = difflib.get_close_matches(str(name), names, n=2)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ValueError(f"{source}: unknown backend {name!r}{hint}; accepted: {', '.join(names)}")


def requested() -> str:
    """Return the backend asked for: :class:`use_backend`, else RESNET_FUSED_BACKEND, else auto."""
    # What use_backend sets was checked there.
    name = _requested.name()
    return name if name == AUTO else _check_name(name, "RESNET_FUSED_BACKEND")


class use_backend:
    """Ask for a backend by name, for the whole process, or within a ``with`` block.

    Args:
        name: "auto" (the first backend that supports the call), "reference" (plain torch), or a
            name that :func:`backends` lists. A backend asked for by name runs the call or raises
            with its reason; it never hands over silently.

    Raises:
        ValueError: the name is not one of these.
        RuntimeError: the backend is not available here; the message says why.
    """

    def __init__(self, name: str) -> None:
        _check_name(name, "use_backend")
        if name in ORDER and (reason := ORDER[name].available()):
            raise RuntimeError(
                f"use_backend: backend {name!r} is not available: {reason}. {ORDER[name].ADVICE}"
            )
        self._previous = _requested.swap(name)

    def __enter__(self) -> use_backend:
        """Keep the backend that the constructor set."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Return to what was asked for before."""
        _requested.swap(self._previous)


def backends() -> list[Backend]:
    """Return every backend in order of preference, with the reason for each that is not here."""
    listed = []
    for name, module in ORDER.items():
        reason = module.available()
        listed.append(Backend(name, reason is None, reason or "", module.ADVICE if reason else ""))
    return [*listed, Backend(REFERENCE, True, "", "")]


def _reason(module: ModuleType, op: str, args: tuple[Any, ...]) -> str | None:
    unavailable: str | None = module.available()
    if unavailable:
        return unavailable
    if not hasattr(module, op):
        return f"has no {op}"
    declined: str | None = module.supports(op, *args)
    return declined


def candidates(op: str, *args: Any) -> dict[tuple[str, str], Callable[..., torch.Tensor]]:
    """Return all functions that run ``op`` on ``args``, by backend and name; no reference."""
    found = {}
    for name, module in ORDER.items():
        if _reason(module, op, args) is None:
            found.update({(name, way): run for way, run in _ways(module, op, args).items()})
    return found


def _ways(
    module: ModuleType, op: str, args: tuple[Any, ...]
) -> dict[str, Callable[..., torch.Tensor]]:
    if hasattr(module, "candidates"):
        ways: dict[str, Callable[..., torch.Tensor]] = module.candidates(op, *args)
        return ways
    return {"default": getattr(module, op)}


def _measured(
    op: str, args: tuple[Any, ...]
) -> tuple[str, Callable[..., torch.Tensor] | None] | None:
    """Return the backend that was measured to be fastest and its function, if it still runs."""
    entry = _tuned.lookup(op, args)
    if entry is None:
        return None
    name = entry.choice.backend
    if name == REFERENCE:
        return REFERENCE, None
    module = ORDER.get(name)
    if module is None or _reason(module, op, args) is not None:
        return None
    if not entry.sought:
        entry.run = _ways(module, op, args).get(entry.choice.candidate)
        entry.sought = True
    return None if entry.run is None else (name, entry.run)


def measured(op: str, *args: Any) -> str | None:
    """Return the backend that was measured to be fastest at a call and still runs it, or None.

    "reference" means, for an op that is a chain of smaller ones, that these were faster apart.
    """
    found = _measured(op, args)
    return found and found[0]


def faster_together(op: str, *args: Any) -> bool:
    """Return whether ``op`` was measured to be faster, forward and backward, than what it replaces.

    Only where "auto" was asked for.
    """
    if requested() != AUTO:
        return False
    entry = _tuned.lookup(op, args)
    return entry is not None and entry.choice.candidate != APART


def choose(op: str, *args: Any) -> Callable[..., torch.Tensor] | None:
    """Return the function that runs ``op`` on ``args``, or None for the reference.

    Of those that support the call, it is the one measured to be fastest (``tune``), else the first
    in :data:`ORDER`.

    Raises:
        RuntimeError: a backend was asked for by name and does not run this call.
    """
    name = requested()
    if name == REFERENCE:
        return None
    if name != AUTO:
        reason = _reason(ORDER[name], op, args)
        if reason:
            raise RuntimeError(f"backend {name!r} was asked for but cannot run {op}: {reason}")
        return getattr(ORDER[name], op)
    if found := _measured(op, args):
        return found[1]
    for module in ORDER.values():
        if _never_unmeasured(module, op):
            continue  # before asking it anything
        if _reason(module, op, args) is None and not _only_measured(module, op, args):
            return getattr(module, op)
    return None


def _only_measured(module: ModuleType, op: str, args: tuple[Any, ...]) -> bool:
    """Return whether "auto" takes a backend for a call only where it was measured to be fastest."""
    if op not in getattr(module, "ONLY_MEASURED", ()):
        return False
    return _never_unmeasured(module, op) or not module.faster_unmeasured(op, *args)


def _never_unmeasured(module: ModuleType, op: str) -> bool:
    only = op in getattr(module, "ONLY_MEASURED", ())
    return only and not hasattr(module, "faster_unmeasured")


class _Least(NamedTuple):
    """From how many multiply-adds on :func:`trains`: outside of CUDA graphs, and within them."""

    outside: float = math.inf
    within: float = math.inf


#: By requested backend, kind of device, and dtype.
_trains: dict[tuple[str, str, torch.dtype], _Least] = {}


def trains(device: torch.device, dtype: torch.dtype, macs: float) -> bool:
    """Return whether a backend has kernels for the ops of training that make a step faster.

    One asked for by name, the reference included, need not be faster: it saves memory. Where none
    is known to be, it is enough that ``tune`` measured a training model of the dtype on the device.
    In a CUDA graph, which does not wait for Python, more is faster (``FASTER_IN_A_GRAPH``).
    On the meta device, where nothing takes time, all trains. While torch.compile traces, nothing
    can be probed: what was not asked before counts as no.

    Args:
        device: where the convolution runs.
        dtype: of its result.
        macs: its multiply-adds; each op costs a time that few of them do not make up for;
            infinitely many are enough anywhere.
    """
    if device.type == "meta":
        return True
    key = (requested(), device.type, dtype)
    if key not in _trains and not torch.compiler.is_compiling():
        probe = torch.empty((1, 1, 1, 1), dtype=dtype, device=device)
        _trains[key] = _least_to_train(key[0], probe)
    least = _trains.get(key, _Least())
    if macs >= (least.within if _requested.for_a_graph() else least.outside):
        return True
    return least.outside == math.inf and key[0] == AUTO and _tuned.trains(device, dtype)


def _least_to_train(name: str, probe: torch.Tensor) -> _Least:
    if name == REFERENCE:
        return _Least(0, 0)
    modules = ORDER.values() if name == AUTO else [ORDER[name]]
    able = [module for module in modules if _reason(module, "bn_act", (probe,)) is None]
    if name != AUTO:
        return _Least(0, 0) if able else _Least()
    outside, graph = (
        min((getattr(m, table, {}).get(probe.dtype, math.inf) for m in able), default=math.inf)
        for table in ("FASTER_IN_TRAINING", "FASTER_IN_A_GRAPH")
    )
    return _Least(outside, min(outside, graph))


def is_all_native() -> bool:
    """Return whether each op of training on the CPU goes to the native kernels that take it."""
    name = requested()
    return name == "cpu" or (name == AUTO and not _tuned.measured_on(torch.device("cpu")))


def explain(op: str, *args: Any) -> Explanation:
    """Say which backend runs ``op`` on ``args``, and for each other one why it does not.

    Args:
        op: an op's name, such as "conv_bn_act".
        args: the op's arguments in the order of its schema; those left out take the defaults of
            ``resnet_fused.functional``.

    Raises:
        ValueError: the op is unknown, or its arguments do not fit together.
    """
    from resnet_fused import functional

    args = functional.op_arguments(op, *args)
    name = requested()
    fastest = measured(op, *args) if name == AUTO else None
    unmeasured = name == AUTO and fastest is None
    verdicts, taken = [], False
    for candidate, module in ORDER.items():
        reason = _reason(module, op, args)
        if reason is None and name not in (AUTO, candidate):
            reason = f"backend {name!r} was asked for"
        elif reason is None and fastest not in (None, candidate):
            reason = f"{fastest} was measured to be faster"
        elif reason is None and unmeasured and _only_measured(module, op, args):
            reason = "was not measured to be fastest (`tune`), nor is it known to be"
        elif reason is None and taken:
            reason = "a backend before it in the order runs the call"
        verdicts.append(Verdict(candidate, reason is None, reason or ""))
        taken = taken or reason is None
    alone = name in (AUTO, REFERENCE) and not taken
    verdicts.append(Verdict(REFERENCE, alone, "" if alone else "a faster backend runs the call"))
    return Explanation(verdicts)
