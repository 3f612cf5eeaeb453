"""What the ops of BatchNorm in training share: statistics, checks, ReLU's mask.

Statistics are float32, float64 for float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from resnet_fused.ops import _checks


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per channel, in the accumulation dtype."""
    wide = x.to(_checks.accumulate_dtype(x.dtype))
    if not x.numel():
        nothing = torch.full_like(vector_like(x), torch.nan)
        return nothing, nothing.clone()
    variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return mean, variance


def check_statistics(op: str, mean: Tensor, var: Tensor, x: Tensor, prefix: str = "") -> None:
    """Check batch statistics: one value per channel of ``x``, in the accumulation dtype."""
    for name, vector in (("mean", mean), ("var", var)):
        check_vector(op, prefix + name, vector, x)


def check_vector(op: str, name: str, vector: Tensor, x: Tensor) -> None:
    """Check a per-channel vector in the accumulation dtype."""
    wide = _checks.accumulate_dtype(x.dtype)
    if vector.dtype != wide:
        raise TypeError(f"{op}: {name} must be {wide} for x of {x.dtype}, got {vector.dtype}")
    _checks.check_channels(op, name, vector, x.shape[1], x)


def check_affine(
    op: str, weight: Tensor | None, bias: Tensor | None, x: Tensor, prefix: str = ""
) -> None:
    """Check a BatchNorm's own weight and bias."""
    _checks.check_channels(op, prefix + "weight", weight, x.shape[1], x)
    _checks.check_channels(op, prefix + "bias", bias, x.shape[1], x)


def check_wanted(op: str, wanted: Sequence[bool], given: Mapping[str, Tensor | None]) -> None:
    """Check which gradients are asked for: a value for each argument, False for a None."""
    if len(wanted) != len(given):
        *names, last = given
        raise ValueError(
            f"{op}: wanted must have {len(given)} values, for {', '.join(names)} and {last}, "
            f"got {wanted}"
        )
    for (name, argument), want in zip(given.items(), wanted, strict=True):
        if want and argument is None:
            raise ValueError(f"{op}: wanted must be False for {name}, which is None")


def kept_bias(bias: Tensor | None) -> Tensor | None:
    """Return a bias to save for backward, where ReLU's mask is made of it again.

    A copy, as torch's BatchNorm saves none: its owner may write it between forward and backward.
    """
    return None if bias is None else bias.detach().clone()


def check_eps(op: str, eps: float) -> None:
    """Check the constant under the root."""
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")


def values_per_channel(shape: Sequence[int]) -> int:
    """Return M, how many values one channel of an (N, C, H, W) tensor has."""
    return int(shape[0] * shape[2] * shape[3])


def passed(y: Tensor) -> Tensor:
    """Return where ReLU let ``y`` through, as torch's backward sees it: NaN passes."""
    return ~(y <= 0)


def vector_like(x: Tensor) -> Tensor:
    """Return an empty per-channel vector for ``x`` in the accumulation dtype."""
    return x.new_empty(x.shape[1], dtype=_checks.accumulate_dtype(x.dtype))
