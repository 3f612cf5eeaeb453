"""Maps and vectors for the tests of the native training kernels, and what results are held to."""

import itertools

import pytest
import torch

from resnet_fused.backends import native
from resnet_fused.ops.bn_act_max_pool import corners
from resnet_fused.testing import two_x_rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_extension = native.extension()
_BEST = "none" if _extension is None else _extension.cpu_isa()
#: With amx_bf16 the training kernels are those of the last one.
ISAS = ["avx2", "avx512", "avx512_bf16"]
ISAS = ISAS if _BEST == "amx_bf16" else ISAS[: ISAS.index(_BEST) + 1] if _BEST in ISAS else []
each_run = pytest.mark.parametrize(
    ("isa", "dtype"),
    list(itertools.product(ISAS, DTYPES)),
    ids=lambda v: str(v).removeprefix("torch."),
)
#: (N, C, H, W): one vector and less, tails, many parts, an empty batch.
SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 7, 5),
    (2, 3, 5, 5),
    (1, 16, 1, 1),
    (2, 17, 3, 2),
    (1, 40, 9, 7),
    (2, 64, 24, 24),
    (2, 300, 7, 7),
    (0, 8, 3, 3),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def maps(shape, dtype, count=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=g).to(dtype) for _ in range(count)]
    return [t.contiguous(memory_format=torch.channels_last) for t in made]


def vectors(c, count, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(c, generator=g) for _ in range(count)]


def per_channel(v):
    return v.view(-1, 1, 1)


def rule(got, formula, *args, reduced=1, dtype=None, size=0.0):
    """Hold ``got`` to the 2x rule beside ``formula`` in the arguments' own dtypes."""
    up = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    check = two_x_rule(got, formula(*args).to(got.dtype), formula(*up), reduced, dtype, size)
    assert check.ok, f"{check} for {tuple(got.shape)}"


def at_places(x, index, side, stride, padding):
    """What of x the places of a square pool name, in channels_last."""
    top, left = corners(index, (stride,) * 2, (padding,) * 2)
    places = index.long()
    at = (places // side + top) * x.shape[3] + places % side + left
    taken = x.flatten(2).gather(2, at.flatten(2)).view(index.shape)
    return taken.contiguous(memory_format=torch.channels_last)


def is_channels_last(t):
    _, c, h, w = t.shape
    return t.stride() == (c * h * w, 1, w * c, c)


def backward_maps(shape, dtype, seed=0):
    """grad, x, x2 and an output of which about half is positive."""
    grad, x, x2, y = maps(shape, dtype, 4, seed)
    return grad, x, x2, torch.relu(y)
