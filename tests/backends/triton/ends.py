"""The stem and the head on small maps: a shape for each branch of their kernels."""

import pytest
import torch

#: name: (x, O, kernel, stride, padding, dilation, pool's size, stride, padding; config).
STEMS = {
    "the stem": (((1, 3, 8, 8), 10, 7, 2, 3, 1, 3, 2, 1), "m16n16k32w4b2"),
    "16-byte rows": (((1, 4, 5, 8), 6, 3, 2, 1, 1, 3, 2, 1), "m16n16k16w4b4"),
    "odd rows, blocks of K": (((1, 5, 3, 3), 4, 4, 1, 1, 1, 3, 2, 1), "m16n16k16w4b1"),
    "dilation": (((1, 3, 4, 5), 18, 3, 1, 2, (1, 2), 3, 2, 1), "m16n32k32w4b3"),
    "windows apart": (((2, 2, 4, 5), 4, 3, 1, 1, 1, 2, 2, 0), "m16n16k16w4b2"),
    "pixels that no window reads": (((1, 2, 5, 8), 4, 1, 1, 0, 1, 2, 3, 0), "m16n16k16w4b2"),
    "windows that share most": (((1, 2, 3, 4), 4, 3, 1, 1, 1, 3, 1, 1), "m16n16k16w4b3"),
    "rectangular": (((1, 2, 5, 6), 4, (3, 1), (1, 2), (1, 0), 1, (3, 2), (2, 1), (1, 0)),
                    "m16n16k16w4b2"),
    "one pixel, the rest padding": (((1, 3, 2, 2), 4, 2, 1, 0, 1, 2, 2, 1), "m16n16k16w4b1"),
    "several tiles": (((9, 1, 2, 7), 17, 3, 1, 1, 1, 2, 2, 1), "m16n16k16w4b1"),
}  # fmt: skip
each_stem = pytest.mark.parametrize("path", STEMS)

#: (N, C, H, W), K.
HEADS = (((2, 16, 7, 7), 10), ((17, 7, 3, 2), 18), ((1, 300, 1, 1), 3), ((3, 5, 4, 5), 1))
each_head = pytest.mark.parametrize("shape", HEADS, ids=str)


def stem_arguments(
    x, o, k, *pairs, dtype=torch.float32, device="cpu", act="relu", vectors=True
) -> tuple:
    """conv_bn_act_max_pool's arguments in default layout; some scales are negative."""
    kernel, stride, padding, dilation, *pool = (
        (v, v) if isinstance(v, int) else v for v in (k, *pairs)
    )
    values, weight = torch.randn(x).to(device, dtype), torch.randn(o, x[1], *kernel)
    vector = torch.randn(2, o).to(device) if vectors else (None, None)
    weight = weight.to(device, dtype)
    return (values, weight, *vector, stride, padding, dilation, 1, act, *pool)


def head_arguments(x, k, bias=True, *, dtype=torch.float32, device="cpu") -> tuple:
    values, weight, b = torch.randn(x), torch.randn(k, x[1]), torch.randn(k)
    values, weight, b = (t.to(device, dtype) for t in (values, weight, b))
    return values, weight, b if bias else None
