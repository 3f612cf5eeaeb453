"""What a person asked the benchmark for, checked before anything is loaded or timed."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

MODELS = ("resnet34", "resnet50", "resnet152")
BATCHES = {"cpu": (1, 8), "cuda": (1, 256)}
DEVICES = ("cpu", "cuda")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: float32 tensors whose products a GPU rounds to 10 bits of mantissa.
TF32 = "tf32"
#: What can be measured: the dtypes, and one of them at another precision.
PRECISIONS = {**DTYPES, TF32: torch.float32}
#: More than processors have; from some ten thousand on OpenMP's runtime crashes.
MOST_THREADS = 1024
SHORT_DTYPES = {"float32": "fp32", TF32: "tf32", "bfloat16": "bf16", "float16": "fp16"}


#: The environment variable that names a backend where no option does.
BACKEND = "RESNET_FUSED_BACKEND"


class UsageError(ValueError):
    """What was asked for cannot be done; the message is one line that says why and what can."""


@dataclass(frozen=True)
class Settings:
    """Everything the job needs to know, each value already checked.

    `rounds` is None where the time budget decides how many there are.
    """

    models: tuple[str, ...]
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    device: str
    threads: int
    backend: str
    rounds: int | None
    seed: int
    images: Path | None
    out: Path
    peers: tuple[str, ...]


def split(option: str, values: Iterable[str] | None) -> list[str]:
    """`["a,b", "c"]` as `["a", "b", "c"]`: every repeatable option also takes commas.

    Raises `UsageError` for values that name nothing.
    """
    given = list(values or ())
    parts = (part.strip() for value in given for part in value.split(","))
    found = list(dict.fromkeys(part for part in parts if part))
    if given and not found:
        raise UsageError(f"{option}: {','.join(given)!r} given, which names nothing; leave it out")
    return found


def one_of(option: str, value: str, accepted: Iterable[str]) -> str:
    """Return `value` if it is accepted.

    Raises `UsageError` naming the option, the nearest names and all accepted ones.
    """
    names = list(accepted)
    if value in names:
        return value
    near = difflib.get_close_matches(value, names, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(f"{option}: unknown value {value!r}; {hint}accepted: {', '.join(names)}")


def positive(option: str, value: str | int, *, least: int = 1, most: int | None = None) -> int:
    """Return `value` as a whole number from `least` to `most`, or raise `UsageError`."""
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least or (most is not None and number > most):
        end = "or more" if most is None else f"to {most}"
        raise UsageError(f"{option}: {value!r} given; accepted: a whole number, {least} {end}")
    return number


def thread_count(option: str, value: int | None) -> int:
    """Return the number of threads that was asked for, or else torch's, or raise `UsageError`."""
    if value is None:
        return torch.get_num_threads()
    return positive(option, value, most=max(MOST_THREADS, os.cpu_count() or 1))


def usable_seed(option: str, value: int) -> int:
    """Return the seed if torch's generators take it, or raise `UsageError`."""
    return positive(option, value, least=0, most=2**64 - 1)


def input_size(option: str, value: str) -> tuple[int, ...]:
    """Return the four numbers of an input's shape, or raise `UsageError`."""
    size = tuple(positive(option, part) for part in value.split(","))
    if len(size) != 4:
        raise UsageError(f"{option}: {value!r} given; accepted: four numbers, as 1,3,224,224")
    return size


def dtype_name(option: str, value: str, accepted: Iterable[str] = DTYPES) -> str:
    """Return torch's name of a dtype given by that name or its short one (`bf16`)."""
    names = {SHORT_DTYPES[name]: name for name in accepted}
    names |= {name: name for name in names.values()}
    return names[one_of(option, value, names)]


def precision_name(option: str, value: str, device: str) -> str:
    """Return the name of a dtype, or tf32 where the device has it."""
    if value == TF32 and device == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        return TF32
    if value == TF32:
        raise UsageError(f"{option}: tf32 is a precision of NVIDIA GPUs from sm_80; accepted: fp32")
    return dtype_name(option, value, PRECISIONS)


def default_dtypes(device: str) -> tuple[str, ...]:
    """float32, and bfloat16 where the device computes in it rather than imitating it."""
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return ("float32", "bfloat16") if native else ("float32",)


def usable_device(option: str, value: str) -> str:
    """Return the device's name, or raise `UsageError` where this machine has none of its kind."""
    name = one_of(option, value, DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA at all"
        raise UsageError(
            f"{option}: no usable CUDA device here (this torch was built for {built}); "
            "accepted: cpu; `resnet-fused doctor` says more"
        )
    return name


def usable_backend(option: str, value: str | None) -> str:
    """Return the backend's name, without a value that of the environment, or else "auto".

    One that is known but not available is refused with its reason.
    """
    import resnet_fused as rf
    from resnet_fused.backends import _requested

    if value is None:
        option, value = BACKEND, _requested.name()
    known = {backend.name: backend for backend in rf.backends()}
    name = one_of(option, value, ["auto", *known])
    if name != "auto" and not known[name].available:
        missing = known[name]
        raise UsageError(f"{option}: {name} is not available: {missing.reason}; {missing.advice}")
    return name


def usable_models(option: str, values: Sequence[str]) -> tuple[str, ...]:
    """Return the names if `create_model` knows every one."""
    from resnet_fused.models import MODELS as known

    return tuple(one_of(option, value, known) for value in values)


def writable_directory(option: str, path: Path, names: Iterable[str] = ()) -> Path:
    """Make `path` a directory that was just written to, or raise `UsageError`.

    `names` are files that shall be written there, whose places no directories may take.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle, probe = tempfile.mkstemp(dir=path, prefix=".writable-")
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise UsageError(f"{option}: cannot write to {path}: {error.strerror}") from None
    for name in names:
        if (path / name).is_dir():
            raise UsageError(f"{option}: cannot write {path / name}: Is a directory")
    return path


def checked(
    *,
    models: Iterable[str] | None,
    batches: Iterable[str] | None,
    dtypes: Iterable[str] | None,
    threads: int | None,
    device: str,
    backend: str | None,
    rounds: int | None,
    seed: int,
    images: Path | None,
    out: Path,
    peers: Iterable[str] | None,
) -> Settings:
    """Return the settings that the benchmark's options ask for, or raise `UsageError`.

    `out` is not made yet: what is refused leaves nothing behind.
    """
    from resnet_fused.bench.peers import usable_peers

    device = usable_device("--device", device)
    return Settings(
        models=usable_models("--model", split("--model", models)) or MODELS,
        dtypes=tuple(precision_name("--dtype", d, device) for d in split("--dtype", dtypes))
        or default_dtypes(device),
        batches=tuple(positive("--batch", size) for size in split("--batch", batches))
        or BATCHES[device],
        device=device,
        threads=thread_count("--threads", threads),
        backend=usable_backend("--backend", backend),
        rounds=None if rounds is None else positive("--rounds", rounds),
        seed=usable_seed("--seed", seed),
        images=images,
        peers=usable_peers("--peers", split("--peers", peers)),
        out=out,
    )
