"""How gradients and passes are cut: numbers alone, without triton."""

import itertools
import math

import pytest

from resnet_fused.backends.triton import passes
from resnet_fused.backends.triton.gradients import phases, weight_config
from resnet_fused.backends.triton.shapes import Problem

AXES = list(itertools.product((1, 2, 5, 8), (1, 2, 3, 7), (1, 2, 3), (0, 1, 3), (1, 2, 3)))


def met(size, kernel, stride, padding, dilation) -> set:
    """(pixel of the input, tap, pixel of the output) of every product along one axis."""
    out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    found = ((j * stride - padding + t * dilation, t, j) for j in range(out) for t in range(kernel))
    return {(i, t, j) for i, t, j in found if 0 <= i < size}


def test_phases_make_every_product_once_and_no_other():
    for size, kernel, stride, padding, dilation in AXES:
        out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if out < 1:
            continue
        made, pixels = [], []
        for p in phases(size, kernel, stride, padding, dilation):
            reached = [
                (p.first + q * stride, p.tap + t * p.every, p.shift + q - t * p.dilation)
                for q in range(p.size)
                for t in range(p.taps)
            ]
            pixels += [p.first + q * stride for q in range(p.size)]
            outside = [j for _, _, j in reached if not 0 <= j < out]
            assert p.leaves(out) == bool(outside) or not p.taps
            made += [product for product in reached if 0 <= product[2] < out]
        assert sorted(made) == sorted(met(size, kernel, stride, padding, dilation))
        assert sorted(pixels) == list(range(size))


def test_a_strided_pointwise_convolution_has_one_phase_with_products():
    assert [p.taps for p in phases(56, 1, 2, 0, 1)] == [1, 0]


@pytest.mark.parametrize("pixels", [1, 7, 128, 1000, 802816])
@pytest.mark.parametrize("channels", [1, 3, 64, 100, 2048])
def test_passes_cover_the_map(pixels, channels):
    for cut in (passes.passing(pixels, channels), passes.staying(channels)):
        across, along, _ = cut.grid(pixels, channels)
        assert across * cut.block_m * cut.steps >= pixels > (across - 1) * cut.block_m * cut.steps
        assert along * cut.block_c >= channels
        assert cut.block_c <= 64


@pytest.mark.parametrize("parts", [1, 2, 3, 100, 128, 129, 6272, 10**6])
def test_merging_ends(parts):
    levels = 0
    while parts > 1 or not levels:
        parts, levels = math.ceil(parts / passes.merging(parts).block_m), levels + 1
    assert levels <= 3


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_the_weight_s_gradient_fills_a_device_where_there_is_work(precision, capability):
    pairs = ((1, 1), (0, 0), (1, 1))
    large = Problem.of((256, 64, 56, 56), (64, 64, 1, 1), *pairs, 1, False)
    small = Problem.of((1, 64, 4, 4), (64, 64, 1, 1), *pairs, 1, False)
    assert weight_config(large, precision, capability).split_k == 256
    assert weight_config(small, precision, capability).split_k == 1
