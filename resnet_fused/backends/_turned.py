"""The data gradient at stride 1 as what it also is: a convolution of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def declines(
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> str | None:
    """Return why the data gradient of a convolution is no convolution, or None."""
    if max(stride) > 1:
        return f"turns convolutions of stride 1, got {tuple(stride)}"
    if min(around(weight_size, padding, dilation)) < 0:
        return f"turns convolutions that pad less than they reach, got {tuple(padding)}"
    return None


def convolution(
    grad: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
) -> tuple[Any, ...]:
    """Return conv_bn_act's arguments for the gradient of a convolution of stride 1.

    The weight's rows are its columns, and its taps run backwards: with padding D (K - 1) - P pixel
    i of the result meets through tap K - 1 - t what the input's pixel i met through tap t.
    """
    rows = turned(weight.to(grad.dtype), groups)
    geometry = ((1, 1), around(weight.shape, padding, dilation), tuple(dilation), groups)
    return grad, rows, None, None, residual, *geometry, None


def size(weight_size: Sequence[int], groups: int) -> tuple[int, ...]:
    """Return the size of the weight that :func:`convolution` takes."""
    o, c, *kernel = weight_size
    return c * groups, o // groups, *kernel


def around(
    weight_size: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Return its padding."""
    sides = zip(weight_size[2:], padding, dilation, strict=True)
    return tuple(d * (k - 1) - p for k, p, d in sides)


def turned(weight: Tensor, groups: int) -> Tensor:
    """Return a weight (O, C/groups, KH, KW) as (C, O/groups, KH, KW), its taps backwards.

    In one copy, channels_last, and at every call: a step has moved the weight, and what `tune`
    times is to be what a step waits for.
    """
    taps = weight.detach().unflatten(0, (groups, -1)).flatten(3)  # (G, O/G, C/G, KH KW)
    rows = taps.permute(0, 2, 3, 1)
    if rows.shape[2] > 1:
        backwards = torch.arange(rows.shape[2] - 1, -1, -1, device=weight.device)
        rows = rows.index_select(2, backwards)
    c, o, kh, kw = size(weight.shape, groups)
    return rows.contiguous().view(c, kh, kw, o).permute(0, 3, 1, 2)
