"""What TMA reads and writes, on host tensors: boxes of a tensor, and windows in im2col mode."""

import torch
from torch import Tensor


def walk(size, lower, upper, stride, start, pixels):
    """The (image, row, column) of windows' first taps, from ``start`` on.

    Columns go from the lower corner to the last one that the upper corner allows, then the next
    row begins, then the next image; corners count from the map's first and last pixel.
    """
    image, row, column = start
    (last_row, last_column) = (n - 1 + u for n, u in zip(size, upper, strict=True))
    for _ in range(pixels):
        yield image, row, column
        column += stride[1]
        if column > last_column:
            column = lower[1]
            row += stride[0]
        if row > last_row:
            row = lower[0]
            image += 1


def read_windows(x: Tensor, lower, upper, stride, start, tap, channel, block) -> Tensor:
    """One tap of ``block[0]`` windows, ``block[1]`` channels each; x is (N, H, W, C).

    What lies outside of the tensor is zero.
    """
    n, h, w, _ = x.shape
    out = x.new_zeros(block)
    for i, (image, row, column) in enumerate(walk((h, w), lower, upper, stride, start, block[0])):
        row, column = row + tap[0], column + tap[1]
        if image < n and 0 <= row < h and 0 <= column < w:
            found = x[image, row, column, channel : channel + block[1]]
            out[i, : len(found)] = found
    return out


def _inside(shape, start, block):
    """Which part of a box is in the tensor: its place there and in the box."""
    there = tuple(
        slice(max(s, 0), min(s + b, n)) for n, s, b in zip(shape, start, block, strict=True)
    )
    return there, tuple(slice(t.start - s, t.stop - s) for t, s in zip(there, start, strict=True))


def read_box(t: Tensor, start, block) -> Tensor:
    out = t.new_zeros(block)
    there, here = _inside(t.shape, start, block)
    out[here] = t[there]
    return out


def write_box(t: Tensor, start, value: Tensor) -> None:
    there, here = _inside(t.shape, start, value.shape)
    t[there] = value[here]


def as_described(desc) -> Tensor:
    """The tensor that a descriptor describes, on its base's memory."""
    return torch.as_strided(desc.base, tuple(desc.shape), tuple(desc.strides))
