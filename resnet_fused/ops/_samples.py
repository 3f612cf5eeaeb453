"""What the ops' samples are drawn by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def normal(seed: int, device: torch.device | str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return a function that draws a tensor of a shape, in ``dtype`` or another it is given.

    The numbers are the same on every device and, but for their rounding, in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, to)

    return draw
