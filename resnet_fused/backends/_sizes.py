"""The sizes of what convolutions and pools give: one formula for every layer above and below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Where an op with a max pool has its window, stride and padding.
_POOLS: Mapping[str, slice] = {
    "conv_bn_act_max_pool": slice(-3, None),
    "bn_act_max_pool": slice(-3, None),
    "bn_act_max_pool_backward": slice(-4, -1),
    "max_pool_backward": slice(-3, None),
}


def output_size(
    sides: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> tuple[int, int]:
    """Return how many windows lie down and across a map: ⌊(S + 2P - D(K - 1) - 1) / stride⌋ + 1."""
    (h, w), (kh, kw), (sh, sw), (ph, pw), (dh, dw) = sides, kernel, stride, padding, dilation
    down = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    return down, (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1


def output_shape(
    x: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """Return (N, O, OH, OW) of a convolution of ``x`` with ``weight`` (O, C/groups, KH, KW)."""
    return x[0], weight[0], *output_size(x[2:], weight[2:], stride, padding, dilation)


def pool_shape(
    x: Sequence[int], size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int, int, int]:
    """Return (N, C, PH, PW) of a max pool of ``x``."""
    return x[0], x[1], *output_size(x[2:], size, stride, padding)


def pool_of(op: str, args: Sequence[Any]) -> Sequence[Sequence[int]] | None:
    """Return window, stride and padding among an op's arguments, None for an op without a pool."""
    return args[_POOLS[op]] if op in _POOLS else None


def is_product(
    weight_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """Return whether a convolution is one matrix product: 1x1, stride 1, no padding, no groups."""
    return (*weight_size[2:], *stride, groups) == (1,) * 5 and not any(padding)
