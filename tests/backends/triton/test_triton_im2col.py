"""TMA's im2col mode without it: which windows a descriptor means, and what it cannot say.

The kernel's own arithmetic (``kernels/places.py``) runs here on numbers, against unfold.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tma_model import read_windows, walk

from resnet_fused.backends.triton import im2col, tiles
from resnet_fused.backends.triton.cost import arch_of, shared_bytes
from resnet_fused.backends.triton.im2col import Windows
from resnet_fused.backends.triton.shapes import Config, Problem, count
from resnet_fused.inspection import convolutions

#: The others have no convolution that these have not.
MODELS = ("resnet34", "resnet50")
#: (height, width), (O, C, KH, KW), stride, padding, dilation
ODD = [
    ((9, 7), (8, 8, 3, 3), (1, 1), (1, 1), (1, 1)),
    ((9, 7), (8, 8, 3, 2), (2, 3), (2, 1), (2, 1)),
    ((5, 11), (8, 8, 5, 5), (3, 2), (0, 4), (1, 2)),
    ((6, 6), (8, 8, 1, 1), (4, 5), (0, 0), (1, 1)),
    ((3, 4), (8, 8, 2, 2), (8, 7), (3, 6), (1, 1)),
    ((1, 1), (8, 8, 3, 3), (1, 1), (1, 1), (1, 1)),
    ((13, 12), (8, 8, 3, 3), (1, 1), (4, 4), (4, 4)),
    ((7, 9), (8, 8, 1, 1), (1, 1), (2, 3), (1, 1)),
]


def problem(size, weight, stride=(1, 1), padding=(0, 0), dilation=(1, 1), n=2, groups=1) -> Problem:
    x = (n, weight[1] * groups, *size)
    return Problem.of(x, weight, stride, padding, dilation, groups, False)


def test_the_model_reads_what_gpus_were_seen_to_read():
    """Triton's tutorial of im2col asserts these on Hopper: a map of 4x4, its pixels numbered."""
    x = torch.arange(1.0, 33).reshape(2, 4, 4, 1)

    def read(corner, start, tap, images=2):
        corners = ((corner, corner), (corner, corner))
        found = read_windows(x[:images], *corners, (1, 1), start, tap, 0, (16, 1))
        return found.flatten().int().tolist()

    padded = [0, 0, 0, 0, 0, 1, 2, 3, 0, 5, 6, 7, 0, 9, 10, 11]
    assert read(0, (0, 0, 0), (0, 0), 1) == [*range(1, 17)]
    assert read(-1, (0, -1, -1), (0, 0), 1) == padded
    assert read(-1, (0, -1, -1), (1, 1), 1) == [*range(1, 17)]
    assert read(0, (0, 1, 3), (0, 0)) == [*range(8, 24)]
    seen = [7, 0, 9, 10, 11, 0, 0, 0, 0, 0, 17, 18, 19, 0, 21, 22]
    assert read(-1, (0, 1, 2), (0, 0)) == seen


def all_problems() -> list[Problem]:
    """Every convolution of the ResNets that descriptors take, on two images, and odd ones."""
    found = {p for name in MODELS for p in convolutions(name, 2, torch.bfloat16)}
    geometries = {dataclasses.replace(p, c=8, o=8, residual=False) for p in found}
    taken = [p for p in geometries if im2col.declines(p, "bf16", 90) is None]
    return [*sorted(taken, key=str), *(problem(*case) for case in ODD)]


def test_windows_are_those_of_the_output_pixels():
    """From any pixel on, TMA walks through the windows in the order of the output pixels."""
    places = pytest.importorskip("resnet_fused.backends.triton.kernels.places")
    problems = all_problems()
    assert len(problems) > len(ODD) + 8
    for p in problems:
        (oh, ow), windows = p.out_size, Windows.of(p)
        expected = [
            (image, row * p.stride[0] - p.padding[0], column * p.stride[1] - p.padding[1])
            for image in range(p.n)
            for row in range(oh)
            for column in range(ow)
        ]
        for first in (0, p.m // 3):
            start = places.window_of.fn(first, oh, ow, *p.stride, *p.padding)
            walked = walk((p.h, p.w), *windows, start, p.m - first)
            assert list(walked) == expected[first:], p


def test_taps_of_windows_are_the_columns_of_unfold():
    """Tile by tile, step by step, past the last pixel and the last channel."""
    places = pytest.importorskip("resnet_fused.backends.triton.kernels.places")
    block_m, block_k = 16, 16
    for p in (problem(size, (8, 24, *w[2:]), *rest) for size, w, *rest in ODD):
        torch.manual_seed(0)
        x = torch.randn(p.n, p.c, p.h, p.w)
        columns = F.unfold(x, p.kernel, p.dilation, p.padding, p.stride)  # (N, C · taps, OH · OW)
        columns = columns.view(p.n, p.c, p.taps, -1).permute(0, 3, 2, 1).reshape(p.m, p.taps, p.c)
        wanted = F.pad(columns, (0, -p.c % block_k, 0, 0, 0, -p.m % block_m))
        for first in range(0, p.m, block_m):
            start = places.window_of.fn(first, *p.out_size, *p.stride, *p.padding)
            for step in range(p.steps(block_k)):
                blocks = -(-p.c // block_k)
                tap, down, right, channel = places.tap_of.fn(
                    step, blocks, block_k, p.kernel[1], *p.dilation
                )
                found = read_windows(
                    x.permute(0, 2, 3, 1), *Windows.of(p), start, (down, right), channel,
                    (block_m, block_k),
                )  # fmt: skip
                expected = wanted[first : first + block_m, tap, channel : channel + block_k]
                assert torch.equal(found, expected), p


OUTSIDE = {
    "takes groups of 1, got 2": problem((8, 8), (16, 8, 3, 3), groups=2),
    "takes input pixels of whole 16 bytes, got 12 channels": problem((8, 8), (16, 12, 3, 3)),
    "takes output pixels of whole 16 bytes, got 20 channels": problem((8, 8), (20, 16, 3, 3)),
    "takes a stride of 8 at most": problem((64, 64), (16, 16, 3, 3), stride=(1, 9)),
    "pixels of a map's ends, got -129": problem((8, 8), (16, 16, 3, 3), padding=(129, 1)),
    "pixels of a map's ends, got -130": problem((200, 200), (16, 16, 3, 3), dilation=(65, 1)),
    "a matrix product": problem((8, 8), (16, 16, 1, 1)),
    "in 32 bits": problem((2**10, 2**10), (16, 16, 3, 3), padding=(1, 1), n=2**11),
    "takes taps 255 pixels from the first": problem(
        (200, 200), (16, 16, 3, 3), padding=(128, 1), dilation=(128, 1)
    ),
    "takes no statistics": dataclasses.replace(problem((8, 8), (16, 16, 3, 3)), training=True),
}


@pytest.mark.parametrize("reason", OUTSIDE)
def test_what_a_descriptor_cannot_say_is_declined_in_words(reason):
    assert reason in (im2col.declines(OUTSIDE[reason], "bf16", 90) or "")
    assert im2col.candidates(OUTSIDE[reason], "bf16", 90) == ()


def test_other_precisions_and_devices_have_no_candidates():
    p = problem((14, 14), (64, 64, 3, 3), padding=(1, 1))
    assert im2col.declines(p, "fp16", 90) is None
    assert im2col.declines(p, "tf32", 90) == "takes bfloat16 and float16, got tf32"
    assert im2col.declines(p, "bf16", 100) == "runs on sm_90, got sm_100"
    assert [bool(im2col.candidates(p, "bf16", arch)) for arch in (80, 90, 100)] == [0, 1, 0]


def test_candidates_fit_the_device_and_leave_only_the_last_tile_partly_empty():
    found = {p for name in MODELS for p in convolutions(name, 1, torch.bfloat16)}
    for p in (dataclasses.replace(p, n=n) for p in found for n in (1, 8, 256)):
        configs = im2col.candidates(p, "bf16", 90)
        taken = im2col.declines(p, "bf16", 90) is None
        assert (1 <= len(configs) <= im2col.MOST_CANDIDATES) if taken else not configs
        for c in configs:
            assert c == Config.parse(str(c))
            assert str(c).endswith("-im2col")
            assert c.block_k <= 64  # the widest swizzle
            assert shared_bytes(p, "bf16", c, 90) <= arch_of(90).block_shared
            assert count(p, c) == -(-p.m // c.block_m) * -(-p.o // c.block_n)


def test_no_heuristic_chooses_them():
    p = problem((14, 14), (64, 64, 3, 3), padding=(1, 1))
    assert not any(c.im2col for c in tiles.candidates(p, "bf16", 90))


def test_without_descriptors_there_are_no_candidates_and_a_launch_says_why(monkeypatch):
    launch = pytest.importorskip("resnet_fused.backends.triton.launch")
    p = problem((14, 14), (64, 64, 3, 3), padding=(1, 1))
    config = im2col.candidates(p, "bf16", 90)[0]
    monkeypatch.setattr(im2col, "missing", lambda: "no such luck")
    assert im2col.candidates_here(p, "bf16", 90) == ()
    x = torch.empty(2, 64, 14, 14, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(64, 64, 3, 3, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match=r"-im2col does not run .*: no such luck"):
        launch.conv(x, weight, None, None, None, x, p, config, None, 90)
    monkeypatch.setattr(im2col, "missing", lambda: None)
    flat = problem((14, 14), (64, 64, 1, 1))
    with pytest.raises(ValueError, match="a matrix product"):
        launch.conv(x, weight, None, None, None, x, flat, config, None, 90)


def test_an_older_triton_is_named_as_the_reason():
    triton = pytest.importorskip("triton")
    newer = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
    reason = "the installed triton has no im2col descriptors: 3.8 or later has"
    assert im2col.missing() == (None if newer else reason)
