"""What the ops of BatchNorm in training share: statistics, checks, ReLU's mask.

Statistics are float32, float64 for float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math
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


def asked_for(needs: Sequence[bool], given: Sequence[Tensor | None]) -> list[bool]:
    """Return which gradients to ask an op for: of what needs one and is there."""
    return [need and t is not None for need, t in zip(needs, given, strict=True)]


def only(found: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Return an op's results as autograd takes gradients: None for those that were not wanted."""
    return [t if want else None for t, want in zip(found, wanted, strict=True)]


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


#: Ops whose second result says which elements of the first passed ReLU.
WITH_BITS = ("bn_act", "dual_bn_act")


def bits_of(y: Tensor, *, summed: bool = True, act: str | None = "relu") -> Tensor:
    """Return which elements of ReLU's result passed, as bits, where the op writes any."""
    shape = _bn_math.bits_for(y, summed, act)
    if shape is None:
        return _bn_math.no_bits(y)
    each = passed(y).to(torch.uint8).unflatten(1, (shape[1], _bn_math.BITS))
    return _checks.channels_last((each << _places(y)).sum(2, dtype=torch.uint8))


def _places(like: Tensor) -> Tensor:
    return torch.arange(_bn_math.BITS, dtype=torch.uint8, device=like.device).view(-1, 1, 1)


def empty_bits(x: Tensor, *, summed: bool = True, act: str | None = "relu") -> Tensor:
    """Return empty bits for a map like ``x``, where the op writes any."""
    shape = _bn_math.bits_for(x, summed, act)
    if shape is None:
        return _bn_math.no_bits(x)
    return _checks.empty_channels_last(x, shape, torch.uint8)


def bits_nbytes(x: Tensor, *, summed: bool = True, act: str | None = "relu") -> int:
    """Return the bytes of such bits."""
    return 0 if _bn_math.bits_for(x, summed, act) is None else x.numel() // _bn_math.BITS


def kept_result(y: Tensor, bits: Tensor) -> Tensor:
    """Return what to save for ReLU's mask: the bits, or its result where there are none."""
    return bits if bits.numel() else y


def passed_by(y: Tensor) -> Tensor:
    """Return where ReLU let elements through, by its result or the bits."""
    if y.dtype != torch.uint8:
        return passed(y)
    return (y[:, :, None] >> _places(y) & 1).bool().flatten(1, 2)


def check_relu_result(op: str, y: Tensor, x: Tensor) -> None:
    """Check ReLU's result, a map like ``x``, or the bits that say what passed of it."""
    if y.dtype != torch.uint8:
        _checks.check_like(op, "y", y, x)
        return
    expected = _bn_math.bits_shape(x.shape, x.dtype)
    if expected is None:
        raise ValueError(f"{op}: y must be like x, got bits: {_bn_math.NO_BITS}, x is {x.dtype}")
    if tuple(y.shape) != expected:
        raise ValueError(
            f"{op}: y must be like x, or bits of shape {expected} for x {tuple(x.shape)} of "
            f"{x.dtype}, got {tuple(y.shape)} of {y.dtype}"
        )
    _checks.check_device(op, "y", y, x)


def vector_like(x: Tensor) -> Tensor:
    """Return an empty per-channel vector for ``x`` in the accumulation dtype."""
    return x.new_empty(x.shape[1], dtype=_checks.accumulate_dtype(x.dtype))
