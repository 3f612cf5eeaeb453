"""The paths of the kernels, at sizes that leave tiles unfilled on every side."""

import pytest
import torch
from formulas import eager, reduced

from resnet_fused.backends.triton.shapes import Problem
from resnet_fused.testing import factors_dtype, to_float64, two_x_rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype, each_half = (
    pytest.mark.parametrize("dtype", dtypes, ids=lambda d: str(d).removeprefix("torch."))
    for dtypes in (DTYPES, DTYPES[1:])
)


def arguments(
    x,
    o,
    k=1,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    dtype=torch.float32,
    residual=False,
    device="cpu",
) -> tuple:
    """conv_bn_act's arguments, channels_last, with scale, shift and ReLU."""
    kernel, stride, padding, dilation = (
        (v, v) if isinstance(v, int) else v for v in (k, stride, padding, dilation)
    )

    def draw(*shape):
        t = torch.randn(shape).to(device, dtype)
        return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t

    weight = draw(o, x[1] // groups, *kernel)
    problem = Problem.of(x, weight.shape, stride, padding, dilation, groups, residual)
    added = draw(x[0], o, *problem.out_size) if residual else None
    vectors = torch.randn(2, o).to(device)
    return (draw(*x), weight, *vectors, added, stride, padding, dilation, groups, "relu")


def assert_right(args: tuple, out: torch.Tensor, op: str = "conv_bn_act") -> None:
    oracle, plain = eager(op, to_float64(args)), eager(op, args)
    layout = torch.channels_last if oracle.dim() == 4 else torch.contiguous_format
    assert out.stride() == torch.empty(oracle.shape, memory_format=layout).stride()
    check = two_x_rule(out, plain, oracle, reduced(op, args), factors_dtype(out))
    assert check.ok, check


#: name: (arguments, config).
PATHS = {
    "pointwise, both edges": (((1, 24, 5, 7), 20), "m16n16k16w4s2x1g2"),
    "pointwise, K tail": (((1, 20, 5, 7), 20), "m32n16k16w4s2x1g8"),
    "3x3": (((2, 16, 5, 7), 20, 3, 1, 1), "m16n16k16w4s2x1g8"),
    "3x3, K tail": (((1, 24, 6, 5), 18, 3, 1, 1), "m32n16k16w4s2x1g1"),
    "3x3, stride, dilation": (((1, 16, 9, 11), 8, 3, 2, 2, 2), "m16n16k16w4s2x1g8"),
    "unpadded": (((1, 16, 6, 5), 8, 3), "m16n16k16w4s2x1g8"),
    "rectangular": (((1, 16, 7, 6), 8, (3, 1), (1, 2), (1, 0)), "m16n16k16w4s2x1g8"),
    "flat: the stem": (((1, 3, 13, 11), 20, 7, 2, 3), "m16n16k32w4s2x1g8"),
    "flat: odd channels": (((1, 5, 6, 6), 7, 3, 1, 1), "m16n16k16w4s2x1g8"),
    "flat: one channel": (((1, 1, 6, 6), 7, 3, 1, 1), "m16n16k16w4s2x1g8"),
    "groups": (((1, 32, 5, 5), 24, 3, 1, 1, 1, 2), "m16n16k16w4s2x1g8"),
    "flat groups": (((2, 8, 5, 5), 12, 3, 2, 1, 1, 4), "m16n16k16w4s2x1g8"),
    "depthwise": (((1, 20, 7, 5), 20, 3, 2, 1, 1, 20), "m16n16k1w4s1x1g8"),
    "depthwise, two filters": (((1, 9, 5, 5), 18, 3, 1, 2, 2, 9), "m16n16k1w4s1x1g8"),
    "split K": (((1, 32, 4, 5), 20, 3, 1, 1), "m16n16k16w4s2x4g8"),
    "split K unevenly": (((1, 48, 4, 3), 18, 1), "m16n16k16w4s2x2g8"),
    "split flat K": (((1, 6, 5, 5), 9, 3, 1, 1), "m16n16k16w4s2x2g8"),
    "split groups": (((1, 64, 4, 4), 32, 3, 1, 1, 1, 2), "m16n16k16w4s2x2g8"),
    "tma, pointwise": (((2, 24, 5, 7), 24), "m32n16k32w4s2x1g2-tma"),
    "tma, 3x3": (((3, 16, 5, 7), 24, 3, 1, 1), "m32n16k16w4s2x1g8-tma"),
    "tma, stride 2": (((2, 16, 6, 10), 8, 3, 2, 1), "m16n16k16w4s2x1g8-tma"),
    "tma, strided pointwise": (((2, 32, 6, 4), 40, 1, 2), "m16n16k32w4s2x1g8-tma"),
    "tma, 5x5 stride 3": (((1, 16, 9, 6), 8, 5, 3, 2), "m16n16k16w4s2x1g8-tma"),
    "tma, dilation": (((1, 16, 8, 8), 8, 3, 1, 2, 2), "m16n16k16w4s2x1g8-tma"),
    "tma, padded pointwise": (((1, 16, 4, 4), 8, 1, 1, 1), "m16n16k16w4s2x1g8-tma"),
    "tma, even kernel": (((1, 16, 6, 6), 8, 2, 2, 1), "m16n16k16w4s2x1g8-tma"),
}
each_path = pytest.mark.parametrize("path", PATHS)

#: The same for TMA's im2col mode, which takes float16 and bfloat16.
IM2COL_PATHS = {
    "several tiles a block": (((2, 24, 9, 7), 72, 3, 1, 1), "m32n64k32w4s3x1g8-im2col"),
    "channels of two tiles": (((2, 64, 6, 5), 136, 3, 1, 1), "m32n64k64w4s4x1g2-im2col"),
    "eight warps": (((1, 64, 6, 5), 64, 3, 1, 1), "m32n64k64w8s3x1g8-im2col"),
    "odd geometry": (
        ((2, 40, 9, 7), 72, (3, 2), (2, 3), (2, 1), (2, 1)),
        "m32n64k64w4s4x1g2-im2col",
    ),
    "fewer steps than stages": (((3, 8, 7, 9), 8, 1, 2), "m32n64k16w4s3x1g8-im2col"),
    "even kernel": (((1, 16, 6, 6), 8, 2, 2, 1), "m32n64k16w4s3x1g8-im2col"),
    "wide tiles": (((2, 80, 13, 11), 136, 3, 1, 1), "m128n128k64w8s5x1g8-im2col"),
}
each_im2col_path = pytest.mark.parametrize("path", IM2COL_PATHS)
