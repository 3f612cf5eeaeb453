"""What an op is: the record that registration, tests, FLOP counts and benchmarks all read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


def no_flops(*args: Any, **kwargs: Any) -> int:
    """None: torch's counter counts matrix products and convolutions only, as the paper does."""
    return 0


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
    reference: Callable[..., Any]
    #: An empty result of the right shape, dtype and layout, of arguments that were checked.
    fake: Callable[..., Any]
    #: The arguments autocast casts; the others keep their dtype (statistics stay float32).
    autocast: tuple[str, ...]
    #: Bytes that must cross memory once: each input read, the output written.
    nbytes: Callable[..., int]
    #: ``samples(device, dtype)`` yields argument tuples that touch every branch of the op.
    samples: Callable[..., Iterator[tuple[Any, ...]]]
    #: Saves for backward; torch.library's own signature ``(ctx, inputs, output)``.
    setup_context: Callable[..., None] | None = None
    #: Gradients, one per argument in schema order; ``(ctx, grad)``. None for an op that is part of
    #: another one's forward or backward, and differentiated there alone.
    backward: Callable[..., Any] | None = None
    #: Floating point operations, two per multiply-add, as torch's FlopCounterMode counts, of the
    #: arguments' shapes and ``out_shape``.
    flops: Callable[..., int] = no_flops
    #: The op as calls of smaller ops, each on the backend of its choice: what runs where no backend
    #: has the op whole, and what one that has it is measured against. None: the op is not a chain.
    decomposition: Callable[..., Any] | None = None
    #: The arguments, by place, that the op writes.
    mutates: tuple[int, ...] = ()
    #: The arguments that may be float32 beside 16-bit maps, as a weight's gradient may by its own
    #: argument ``dtype``. Autocast leaves them so on the CPU, where kernels round what they read.
    wide: tuple[str, ...] = ()
    #: Whether ``backward`` takes, behind the gradients of the results, one of the first argument by
    #: its other readers, and adds it to its own.
    hands_on: bool = False

    def kept_by_autocast(self, name: str, device: str) -> tuple[torch.dtype, ...]:
        """Return the dtypes that autocast on a device leaves an argument it casts."""
        wide = device == "cpu" and name in self.wide
        return (torch.float64, torch.float32) if wide else (torch.float64,)
