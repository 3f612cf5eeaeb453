"""The cache file of measured choices: one per device and versions, shared between processes.

It is JSON in RESNET_FUSED_CACHE_DIR (default: ``resnet_fused`` in XDG_CACHE_HOME or ~/.cache). It
is replaced whole, under a lock, by what it held and what is new, so that processes that tune at the
same time lose nothing. A file that cannot be read is set aside, not written over.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resnet_fused.backends import _device
from resnet_fused.files import write_atomically

SCHEMA = 1

#: Tables that come with the package, for those who have tuned nothing.
SHIPPED = Path(__file__).parent.parent / "tuned"

#: Backends whose version is among the conditions, by the same name.
_VERSIONED = ("cudnn", "triton")

#: Seconds to wait for another process that is writing; it takes milliseconds.
PATIENCE_S = 30.0

#: What a call is known by: nested tuples of text, numbers, None and dtypes.
Signature = tuple[Any, ...]

#: As JSON names them.
_DTYPES = {_name: _d for _name, _d in vars(torch).items() if isinstance(_d, torch.dtype)}


class Choice(NamedTuple):
    """The fastest right candidate for one signature."""

    backend: str
    candidate: str
    #: Its median time.
    microseconds: float
    #: The time of the second fastest over its own; None if it was alone.
    margin: float | None


class Unusable(Exception):
    """A cache file is not what it should be; the message says why."""


def directory() -> Path:
    """Return the directory of the cache files; it need not exist."""
    asked = os.environ.get("RESNET_FUSED_CACHE_DIR")
    if asked:
        return Path(asked).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    root = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    return Path(root, "resnet_fused")


def conditions(device: torch.device) -> dict[str, Any]:
    """Return what measured times hold under; choices measured under others are not read."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability, threads = f"{major}.{minor}", None
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        threads = torch.get_num_threads()
    from resnet_fused import __version__

    return {
        "device": _device.name(device),
        "capability": capability,
        "threads": threads,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "resnet_fused": __version__,
    }


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def path(device: torch.device) -> Path:
    """Return where the choices of a device are kept."""
    found = conditions(device)
    number = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]
    return directory() / f"tuned-{_slug(found['device'])}-{number}.json"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read(file: Path, expected: dict[str, Any]) -> dict[Signature, Choice]:
    """Return the choices in a file, none if there is no such file.

    Args:
        file: the cache file.
        expected: the conditions that must stand in it, all or some of them.

    Raises:
        Unusable: it is not a whole file of this schema and of these conditions.
        OSError: it cannot be read.
    """
    try:
        table = _table(file)
    except FileNotFoundError:
        return {}
    table.check(expected)
    return table.choices


class _Table(NamedTuple):
    """What a file holds."""

    conditions: dict[str, Any]
    choices: dict[Signature, Choice]

    def check(self, expected: dict[str, Any]) -> None:
        """Raise `Unusable` if it was measured under other conditions."""
        found = {name: self.conditions[name] for name in expected if name in self.conditions}
        if found != expected:
            raise Unusable(f"it was measured under {found}, not {expected}")


def _table(file: Path) -> _Table:
    """Return what a file holds; raises as :func:`read`, and FileNotFoundError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Unusable(f"it is not JSON ({error})") from None
    except RecursionError:
        raise Unusable("it is not JSON of ours: it is nested too deeply") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise Unusable(f"its schema is {schema!r}, this version reads {SCHEMA}")
    try:
        return _Table(
            dict(content["conditions"]),
            {_signature(call): _choice(*choice) for call, *choice in content["choices"]},
        )
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError) as error:
        raise Unusable(f"it is not a whole table ({error!r})") from None


def _choice(backend: Any, candidate: Any, microseconds: Any, margin: Any) -> Choice:
    margin = None if margin is None else float(margin)
    if not isinstance(backend, str) or not isinstance(candidate, str):
        raise TypeError(f"{backend!r}, {candidate!r} are not names")
    return Choice(backend, candidate, float(microseconds), margin)


def measured(device: torch.device) -> dict[Signature, Choice]:
    """Return the choices that were measured here.

    A file that cannot be used gives one warning and no choices.
    """
    file = path(device)
    try:
        return read(file, conditions(device))
    except OSError as error:
        _warn(f"{file} cannot be read: {error.strerror}; nothing tuned before is in force")
    except Unusable as error:
        try:
            with _locked(file):
                # Once more: whoever held the lock may have put a good one there.
                return _read_or_set_aside(file, conditions(device))
        except OSError:
            _warn(f"{file} is not used: {error}")
    return {}


def shipped(device: torch.device) -> dict[Signature, Choice]:
    """Return the choices that came with the package, for what was not measured here.

    Its file is not ours to write to. Those of cuDNN and Triton are for the version that they were
    measured with: another may drop NaN, or not compile.
    """
    file, here = SHIPPED / f"{_slug(_device.name(device))}.json", conditions(device)
    try:
        table = _table(file)
        table.check({"device": here["device"]})
        return {
            key: choice
            for key, choice in table.choices.items()
            if choice.backend not in _VERSIONED
            or table.conditions.get(choice.backend) == here[choice.backend]
        }
    except FileNotFoundError:
        return {}
    except OSError as error:
        _warn(f"{file} cannot be read: {error.strerror}; nothing that was shipped is in force")
    except Unusable as error:
        _warn(f"{file} is not used: {error}; nothing that was shipped is in force")
    return {}


def merge(device: torch.device, choices: dict[Signature, Choice]) -> Path | None:
    """Write choices into the device's file, beside and over those it holds; return the file.

    Where that cannot be done, warn once and return None.
    """
    file = path(device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file):
            held = _read_or_set_aside(file, conditions(device))
            text = _text(conditions(device), {**held, **choices})
            write_atomically(file, lambda temporary: _write(temporary, text))
    except OSError as error:  # filelock's Timeout is one too
        reason = error.strerror or error
        _warn(f"{file.parent} cannot be written to: {reason}; what was tuned holds in this process")
        return None
    return file


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _text(found: dict[str, Any], choices: dict[Signature, Choice]) -> str:
    """Return the file's content: JSON with one line per choice, to be read and compared."""
    head = json.dumps({"schema": SCHEMA, "conditions": found}, indent=1)
    rows = ([call, *choice] for call, choice in choices.items())
    lines = ",\n".join(json.dumps(row, default=_dtype_name) for row in rows)
    return f'{head[:-2]},\n "choices": [\n{lines}\n ]\n}}\n'


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the file's lock. It lies beside the file and goes with the process that holds it."""
    from filelock import FileLock

    with FileLock(f"{file}.lock", timeout=PATIENCE_S):
        yield


def _read_or_set_aside(file: Path, expected: dict[str, Any]) -> dict[Signature, Choice]:
    """Return the choices in a file; rename one that is unusable, with a warning. Needs the lock."""
    try:
        return read(file, expected)
    except Unusable as error:
        number = 1
        while (aside := file.with_name(f"{file.name}.bad-{number}")).exists():
            number += 1
        file.rename(aside)
        _warn(f"{file} is not used: {error}; it was renamed to {aside.name}, tune again")
        return {}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _signature(value: Any) -> Any:
    """Return a part of a signature from what JSON made of it."""
    if isinstance(value, list):
        return tuple(map(_signature, value))
    return _DTYPES.get(value, value) if isinstance(value, str) else value


_warned: set[str] = set()


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"resnet_fused: {message}", RuntimeWarning, stacklevel=3)
