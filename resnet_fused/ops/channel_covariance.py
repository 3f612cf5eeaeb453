"""channel_covariance: mean and covariance of a map's channels.

Of a 1x1 convolution's input they say the mean and variance of its output before there is one; see
`pointwise_bn_act`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops import _bn, _checks
from resnet_fused.ops._op import Op

NAME = "channel_covariance"
Result = tuple[Tensor, Tensor]


def check(x: Tensor) -> None:
    """Raise ValueError or TypeError naming the argument that does not fit."""
    _checks.check_feature_map(NAME, x)


def reference(x: Tensor) -> Result:
    """Compute the op in plain torch, in float32 (float64 for float64); NaN of an empty map."""
    rows = x.to(_checks.accumulate_dtype(x.dtype)).permute(0, 2, 3, 1).flatten(0, 2)
    mean = rows.mean(0)
    centred = rows - mean
    return mean, centred.t() @ centred / len(rows) if len(rows) else mean.outer(mean)


def fake(x: Tensor) -> Result:
    """Return an empty vector and an empty square matrix."""
    mean = _bn.vector_like(x)
    return mean, mean.new_empty(x.shape[1], x.shape[1])


def flops(x_shape: Sequence[int], *args: Any, out_shape: Sequence[Any], **kwargs: Any) -> int:
    """Two per multiply-add of the product of the map with itself."""
    n, c, h, w = x_shape
    return 2 * n * h * w * c * c


def nbytes(x: Tensor) -> int:
    """The map read once, mean and covariance written once."""
    c = x.shape[1]
    return x.nbytes + (c + c * c) * _checks.accumulate_dtype(x.dtype).itemsize


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield odd and many channels, few and many pixels, channels that depend on each other."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 16, 5, 3), (3, 7, 4, 4), (1, 40, 9, 9), (2, 4, 1, 1), (1, 3, 2, 1))
    for i, (n, c, h, w) in enumerate(shapes):
        x = torch.randn((n, c, h, w), generator=generator, dtype=torch.float64)
        mixed = torch.einsum("nchw,cd->ndhw", x, torch.randn((c, c), generator=generator).to(x))
        x = mixed.relu() if i % 2 else mixed + 1
        layout = torch.channels_last if i == 0 else torch.contiguous_format
        yield (x.to(device, dtype).contiguous(memory_format=layout),)


OP = Op(
    name=NAME,
    schema="(Tensor x) -> (Tensor, Tensor)",
    check=check,
    reference=reference,
    fake=fake,
    autocast=(),
    flops=flops,
    nbytes=nbytes,
    samples=samples,
)
