"""bn_update_stats: BatchNorm's running statistics moved towards a batch's, in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math
from resnet_fused.ops import _checks
from resnet_fused.ops._op import Op

NAME = "bn_update_stats"


def check(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit the others."""
    for name, vector in (
        ("running_mean", running_mean), ("running_var", running_var), ("var", var),
    ):  # fmt: skip
        if vector.shape != mean.shape or vector.dim() != 1:
            raise ValueError(
                f"{NAME}: {name} must have mean's shape {tuple(mean.shape)}, "
                f"got {tuple(vector.shape)}"
            )
        if vector.dtype not in _checks.FLOAT_DTYPES:
            raise TypeError(f"{NAME}: {name} must be a floating point vector, got {vector.dtype}")
        _checks.check_device(NAME, name, vector, mean)
    if count < 2:
        raise ValueError(f"{NAME}: count must be at least 2 values per channel, got {count}")
    if momentum is None and num_batches_tracked is None:
        raise ValueError(f"{NAME}: num_batches_tracked must be given for momentum=None, got None")
    if num_batches_tracked is not None:
        _check_tracked(num_batches_tracked, momentum)


def _check_tracked(tracked: Tensor, momentum: float | None) -> None:
    """Accept what BatchNorm's own ``num_batches_tracked.add_(1)`` and ``1 / float(...)`` do."""
    if tracked.dtype == torch.bool or tracked.dtype.is_complex:
        raise TypeError(
            f"{NAME}: num_batches_tracked must be an integer or floating point tensor, "
            f"got {tracked.dtype}"
        )
    if momentum is None and tracked.numel() != 1:
        raise ValueError(
            f"{NAME}: num_batches_tracked must hold one number for momentum=None, "
            f"got {tuple(tracked.shape)}"
        )


def reference(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
) -> None:
    """Compute the op in plain torch, as ``torch.nn.BatchNorm2d`` does.

    running = (1 - m) · running + m · batch, with the unbiased variance; momentum None averages
    over all batches: m = 1 / num_batches_tracked. All stays on the device.
    """
    running = running_mean, running_var, num_batches_tracked
    _bn_math.bn_update_stats(*running, mean, var, count, momentum)


def fake(*_: Any) -> None:
    """Return nothing; shapes do not change."""


def nbytes(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
) -> int:
    """Four vectors read, two written."""
    return 2 * (running_mean.nbytes + running_var.nbytes) + mean.nbytes + var.nbytes


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield with a fixed momentum, a cumulative average, and without a count of batches."""
    wide = _checks.accumulate_dtype(dtype)

    def draw(seed: int, to: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(7, generator=generator, dtype=torch.float64).to(device, to)

    tracked = torch.tensor(3, device=device)
    for momentum in (0.1, None, 1.0, 0.0):
        vectors = (draw(0, dtype), draw(1, dtype)), (draw(2, wide), draw(3, wide))
        yield *vectors[0], tracked.clone(), *vectors[1], 12, momentum
    yield draw(0, wide), draw(1, wide), None, draw(2, wide), draw(3, wide), 2, 0.5


OP = Op(
    name=NAME,
    schema=(
        "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, "
        "Tensor mean, Tensor var, SymInt count, float? momentum) -> ()"
    ),
    check=check,
    reference=reference,
    fake=fake,
    autocast=(),
    nbytes=nbytes,
    samples=samples,
    mutates=(0, 1, 2),
)
