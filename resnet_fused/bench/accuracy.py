"""Whether an answer may be timed: its error against float64 beside eager torch's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_fused.testing import max_error


def check_batch(checked: Tensor, size: int) -> Tensor:
    """Return a batch of `size` that repeats the photographs whose answers are known.

    Every row of it can be held against float64, whatever the batch size, and it runs through the
    very code that the timed batch of that size runs through.
    """
    return checked[torch.arange(size) % len(checked)]


def relative_error(output: Tensor, answers: Tensor) -> float:
    """Return max |output - answer| / max |answer| over all rows of a `check_batch`.

    Infinite for an output of another shape and for one with NaN or infinity in it.
    """
    if output.shape[1:] != answers.shape[1:]:
        return math.inf
    expected = check_batch(answers, len(output))
    return max_error(output.cpu(), expected) / float(expected.abs().max())


def allowed_error(eager_error: float, dtype: torch.dtype, reduced: int) -> float:
    """Return the largest relative error that counts as right: the 2x rule for a whole network.

    Twice eager torch's error in the same dtype, plus a floor for where eager happens to be nearly
    exact: one rounding of the output in `dtype`, and eps(float32) · √reduced for the sums, which
    every backend keeps in float32. (eps(bfloat16) · √reduced would be half the answer's size and
    let anything pass.)
    """
    floor = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(reduced)
    return 2 * (eager_error if math.isfinite(eager_error) else 0.0) + floor
