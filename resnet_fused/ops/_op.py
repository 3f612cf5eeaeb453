"""What an op is: the record that registration, tests, FLOP counts and benchmarks all read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Op:
    """The definition of one op; everything else about the op derives from it.

    All callables but ``setup_context`` and ``backward`` take the op's arguments in schema order.
    """

    name: str
    #: Argument list and result, as ``torch.library`` writes them, without the name.
    schema: str
    #: Raises before anything has run if an argument is not acceptable.
    check: Callable[..., None]
    #: The op in plain torch: the definition every backend is held to.
    reference: Callable[..., torch.Tensor]
    #: An empty result of the right shape, dtype and layout.
    fake: Callable[..., torch.Tensor]
    #: Saves for backward; torch.library's own signature ``(ctx, inputs, output)``.
    setup_context: Callable[..., None]
    #: Gradients, one per argument in schema order; ``(ctx, grad)``.
    backward: Callable[..., Any]
    #: The arguments autocast casts; the others keep their dtype (statistics stay float32).
    autocast: tuple[str, ...]
    #: Floating point operations, two per multiply-add, as torch's FlopCounterMode counts.
    flops: Callable[..., int]
    #: Bytes that must cross memory once: each input read, the output written.
    nbytes: Callable[..., int]
    #: ``samples(device, dtype)`` yields argument tuples that touch every branch of the op.
    samples: Callable[..., Iterator[tuple[Any, ...]]]
