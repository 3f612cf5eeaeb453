"""Argument checks shared by the ops. Each names the argument, what came and what is accepted."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = (None, "relu")
AUTOCAST_DEVICES = ("cpu", "cuda")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which an op accumulates and applies scale and shift."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(op: str, name: str, value: object) -> None:
    """Check that an argument is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_feature_map(op: str, x: torch.Tensor, name: str = "x") -> None:
    """Check that ``x`` is a floating point (N, C, H, W) tensor."""
    check_tensor(op, name, x)
    if x.dim() != 4:
        raise ValueError(
            f"{op}: {name} must have 4 dimensions (N, C, H, W), got {x.dim()}: {tuple(x.shape)}"
        )
    if x.dtype not in FLOAT_DTYPES:
        accepted = ", ".join(str(d) for d in FLOAT_DTYPES)
        raise TypeError(f"{op}: {name} must be one of {accepted}, got {x.dtype}")


def check_like(op: str, name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    """Check that ``tensor`` has the shape, dtype and device of ``x``."""
    if tensor.shape != x.shape:
        raise ValueError(
            f"{op}: {name} must have x's shape {tuple(x.shape)}, got {tuple(tensor.shape)}"
        )
    check_same(op, name, tensor, x)


def check_same(op: str, name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    """Check that ``tensor`` has the dtype and device of ``x``."""
    if tensor.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    check_device(op, name, tensor, x)


def check_weight(op: str, weight: torch.Tensor, x: torch.Tensor) -> None:
    """Check a weight of training: x's dtype or the accumulation dtype, x's device."""
    _check_narrow_or_wide(op, "weight", weight.dtype, x)
    check_device(op, "weight", weight, x)


def check_result_dtype(op: str, dtype: torch.dtype, x: torch.Tensor) -> None:
    """Check the dtype asked of a weight's gradient, as :func:`check_weight` checks the weight's."""
    _check_narrow_or_wide(op, "dtype", dtype, x)


def _check_narrow_or_wide(op: str, name: str, dtype: torch.dtype, x: torch.Tensor) -> None:
    accepted = (x.dtype, accumulate_dtype(x.dtype))
    if dtype not in accepted:
        raise TypeError(
            f"{op}: {name} must be {' or '.join(str(d) for d in dict.fromkeys(accepted))} "
            f"for x of {x.dtype}, got {dtype}"
        )


def check_device(op: str, name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    """Check that ``tensor`` is on the device of ``x``."""
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {tensor.device}")


def check_channels(
    op: str, name: str, vector: torch.Tensor | None, channels: int, x: torch.Tensor
) -> None:
    """Check a per-channel vector: shape (channels,), x's dtype or the accumulation dtype."""
    if vector is None:
        return
    if vector.dim() != 1 or vector.shape[0] != channels:
        raise ValueError(
            f"{op}: {name} must have shape ({channels},), one value per output channel, "
            f"got {tuple(vector.shape)}"
        )
    _check_narrow_or_wide(op, name, vector.dtype, x)
    check_device(op, name, vector, x)


def check_residual(
    op: str, residual: torch.Tensor | None, shape: Sequence[int], x: torch.Tensor
) -> None:
    """Check that a residual has exactly the output's shape, x's dtype and device."""
    if residual is None:
        return
    if tuple(residual.shape) != tuple(shape):
        raise ValueError(
            f"{op}: residual must have the output's shape {tuple(shape)}, "
            f"got {tuple(residual.shape)}"
        )
    check_same(op, "residual", residual, x)


def check_act(op: str, act: str | None, name: str = "act") -> None:
    """Check the name of an activation."""
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: {name} must be one of {ACTIVATIONS}, got {act!r}")


def check_pair(op: str, name: str, value: Sequence[int], least: int) -> None:
    """Check a pair of integers, each at least ``least``."""
    if len(value) != 2 or any(v < least for v in value):
        raise ValueError(
            f"{op}: {name} must be one or two integers of at least {least}, got {tuple(value)}"
        )


def channels_last(y: torch.Tensor) -> torch.Tensor:
    """Return ``y`` with channels_last strides, to the letter where torch calls them ambiguous.

    ``contiguous`` leaves a map of one channel or one pixel as it came, so that the strides of a
    result would depend on the way it was computed; a compiled caller relies on one answer.
    """
    _, c, h, w = y.shape
    if y.stride() == (h * w * c, 1, w * c, c):
        return y
    return empty_channels_last(y, y.shape).copy_(y)


def empty_channels_last(
    x: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return an empty channels_last tensor of ``shape`` on x's device, in x's dtype or another."""
    kind = torch.channels_last
    return torch.empty(tuple(shape), dtype=dtype or x.dtype, device=x.device, memory_format=kind)


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which ops on x's device keep their arguments' dtypes."""
    if x.device.type in AUTOCAST_DEVICES:
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
