"""Packing weights for the CPU kernels: the same bytes from every layout, and from float32."""

import itertools

import pytest
import torch
from test_native_conv import ISAS, NAMES, aligned

_C = pytest.importorskip("resnet_fused._C")

#: O, C of a group, KH, KW, groups: one register and two, panels with room left, odd channels, rows
#: longer than a register's steps and shorter, groups.
SIZES = [
    (32, 64, 1, 1, 1),
    (80, 70, 1, 1, 1),
    (33, 8, 3, 3, 1),
    (64, 32, 3, 3, 1),
    (16, 34, 3, 2, 1),
    (5, 3, 7, 7, 1),
    (24, 7, 2, 3, 1),
    (64, 16, 3, 3, 2),
    (36, 10, 1, 1, 3),
    (70, 130, 3, 3, 1),
]
ALGORITHMS = ("direct", "winograd2", "winograd4", "narrow", "amx")
each_kind = pytest.mark.parametrize(
    ("isa", "dtype", "algorithm"),
    [
        (isa, dtype, algorithm)
        for isa, dtype, algorithm in itertools.product(ISAS, NAMES, ALGORITHMS)
        if algorithm not in ("narrow", "amx") or (dtype == torch.bfloat16 and isa.endswith("_bf16"))
        if (algorithm == "amx") == (isa == "amx_bf16")
    ],
)


@pytest.fixture(autouse=True)
def _best_isa():
    isa = _C.cpu_isa()
    yield
    _C.set_cpu_isa(isa)


def takes(algorithm, size):
    _, c, kh, kw, groups = size
    if algorithm == "narrow":
        return groups == 1 and c < 16
    if algorithm == "amx":
        return groups == 1
    return algorithm == "direct" or (kh, kw, groups) == (3, 3, 1)


def packed(weight, algorithm, dtype, groups, *, turned=False):
    """What a weight (O, C, KH, KW) of any strides is packed to, in bytes."""
    o, c, kh, kw = weight.shape
    layout = (NAMES[dtype], algorithm, o, c, kh, kw, groups)
    size = _C.conv_bn_act_packed_bytes(*layout)
    raw, address = aligned(size, fill=0x55)
    along_o, along_c, along_row, along_column = weight.stride()
    along_tap = along_column if kw > 1 else along_row
    _C.conv_bn_act_pack(
        weight.data_ptr(), address, size, *layout, along_o, along_c, along_tap, turned,
        weight.dtype != dtype,
    )  # fmt: skip
    start = address - raw.data_ptr()
    assert (raw[start + size :] == 0x55).all(), "written behind the packed weight"
    return raw[start : start + size].clone()


def drawn(size, dtype):
    o, c, kh, kw, _ = size
    weight = torch.randn(o, c, kh, kw, generator=torch.Generator().manual_seed(o + c))
    weight.view(-1)[::17] = float("nan")
    return weight.to(dtype)


@each_kind
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_from_every_layout_the_same_bytes(size, isa, dtype, algorithm):
    if not takes(algorithm, size):
        pytest.skip("another algorithm's shape")
    _C.set_cpu_isa(isa)
    weight, groups = drawn(size, dtype), size[-1]
    expected = packed(weight, algorithm, dtype, groups)
    last = weight.to(memory_format=torch.channels_last)
    assert torch.equal(packed(last, algorithm, dtype, groups), expected)
    # Output channels side by side: how the gradient of an input reads a channels_last weight.
    across = weight.transpose(0, 1).contiguous(memory_format=torch.channels_last).transpose(0, 1)
    assert across.stride(0) == 1 or size[0] == 1
    assert torch.equal(packed(across, algorithm, dtype, groups), expected)
    flipped = weight.flip(2, 3).to(memory_format=torch.channels_last)
    assert torch.equal(packed(flipped, algorithm, dtype, groups, turned=True), expected)


@each_kind
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_wide_weight_is_rounded_as_torch_rounds(size, isa, dtype, algorithm):
    if dtype == torch.float32 or not takes(algorithm, size):
        pytest.skip("nothing to round, or another algorithm's shape")
    _C.set_cpu_isa(isa)
    weight, groups = drawn(size, torch.float32), size[-1]
    weight.view(-1)[1::13] = 3e38  # an infinity in float16
    weight.view(-1)[2::13] = 1 + torch.finfo(dtype).eps / 2  # half way between two values
    if algorithm.startswith("winograd"):  # the others' products take it for zero
        weight.view(-1)[3::13] = 1e-39
    last = weight.to(memory_format=torch.channels_last)
    across = weight.transpose(0, 1).contiguous(memory_format=torch.channels_last).transpose(0, 1)
    for wide in (weight, last, across):
        for turned in (False, True):
            got, want = (
                packed(w, algorithm, dtype, groups, turned=turned) for w in (wide, wide.to(dtype))
            )
            # There are many NaN.
            pairs = dtype == torch.bfloat16 and isa.endswith("_bf16")
            kind = dtype if pairs and not algorithm.startswith("winograd") else torch.float32
            torch.testing.assert_close(
                got.view(kind), want.view(kind), rtol=0, atol=0, equal_nan=True
            )
