"""Tile tables: what they promise for every convolution of the ResNets, without triton or a GPU."""

import itertools
import math
import subprocess
import sys

import pytest
import torch

from resnet_fused.backends.triton import tiles
from resnet_fused.backends.triton.cost import ARCHS, arch_of, cost, shared_bytes
from resnet_fused.backends.triton.shapes import ITEMSIZE, Config, Problem, box, count
from resnet_fused.inspection import convolutions

MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d")
BATCHES = (1, 8, 256)
CAPABILITIES = (80, 86, 89, 90, 100, 120)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    """Every distinct convolution of the models, at every batch size."""
    found = {p for name in MODELS for p in convolutions(name, 1, torch.bfloat16)}
    return [Problem(**{**vars(p), "n": n}) for p in found for n in BATCHES]


def problem(x, weight, stride=1, padding=0, dilation=1, groups=1, residual=False) -> Problem:
    pairs = ((v, v) for v in (stride, padding, dilation))
    return Problem.of(x, weight, *pairs, groups, residual)


def test_the_models_have_the_convolutions_expected():
    found = convolutions("resnet50", 2, torch.bfloat16)
    assert sum(found.values()) == 53
    assert sum(n for p, n in found.items() if p.residual) == 16
    assert problem((2, 64, 56, 56), (64, 64, 3, 3), padding=1) in found


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", ITEMSIZE)
def test_every_config_fits_the_device_and_the_problem(problems, precision, capability):
    limit = arch_of(capability).block_shared
    for p in problems:
        configs = tiles.candidates(p, precision, capability)
        assert 1 <= len(configs) <= tiles.MOST_CANDIDATES
        assert len(set(configs)) == len(configs)
        assert tiles.heuristic(p, precision, capability) == configs[0]
        for c in configs:
            assert shared_bytes(p, precision, c, capability) <= limit
            assert all(n & (n - 1) == 0 and n >= 16 for n in (c.block_m, c.block_n, c.block_k))
            assert c.num_warps in (4, 8)
            # No part of K is empty, no tile is wider than twice what there is.
            assert c.split_k <= p.steps(c.block_k)
            assert c.block_n <= max(16, 2 * p.o)
            assert c.block_m <= max(16, 2 * p.m)
            assert not c.tma or tiles.takes_tma(p, precision, c, capability)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_channels_of_any_number_have_configs_that_load_little_at_a_time(precision, capability):
    for c, o, batch in itertools.product((1, 12, 17, 20, 63, 130), (1, 17, 65, 250), (1, 32)):
        p = problem((batch, 3 * c, 14, 14), (3 * o, c, 3, 3), padding=1, groups=3, residual=True)
        configs = tiles.candidates(p, precision, capability)
        assert configs
        width = tiles.at_once(p, precision)
        if p.depthwise or p.flat or width * ITEMSIZE[precision] == 16:
            continue
        for x in configs:
            loads = (x.block_m + x.block_n) * x.block_k / (32 * x.num_warps * width)
            assert loads <= 16 or x.block_m * x.block_n <= 1024, (p, x)


def test_tiles_cover_the_output(problems):
    for p in problems:
        c = tiles.heuristic(p, "bf16", 90)
        assert count(p, c) * c.block_m * c.block_n >= p.m * p.o * p.groups
        if c.tma:
            n, h, w = box(p, c.block_m)
            assert n * h * w == c.block_m
            assert max(n, h, w) <= 256


def test_candidates_are_ordered_by_the_model(problems):
    for p in problems[::7]:
        costs = [cost(p, "bf16", c, 90) for c in tiles.candidates(p, "bf16", 90)]
        assert all(a <= b + 1 for a, b in itertools.pairwise(costs))


def test_no_waste_in_the_boxes_of_a_large_batch():
    for size in (56, 28, 14, 7):
        p = problem((256, 64, size, size), (64, 64, 3, 3), padding=1)
        assert count(p, Config(128, 64, 64, 4, 3, tma=True)) * 128 == p.m


def test_small_maps_split_k_and_large_ones_do_not():
    small = problem((1, 512, 7, 7), (512, 512, 3, 3), padding=1)
    assert tiles.heuristic(small, "bf16", 80).split_k > 1
    large = problem((256, 512, 7, 7), (512, 512, 3, 3), padding=1)
    assert all(c.split_k == 1 for c in tiles.candidates(large, "bf16", 80))


@pytest.mark.parametrize("precision", ITEMSIZE)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_k_is_split_on_small_maps_wherever_the_model_says_it_pays(precision, capability):
    """And is measured at any batch whose tiles leave processors idle."""
    seen = set()
    for size, batch in itertools.product((7, 4), (1, 8, 16, 32, 64, 128, 256)):
        p = problem((batch, 512, size, size), (512, 512, 3, 3), padding=1)
        configs = tiles.candidates(p, precision, capability)
        legal = list(tiles._legal(p, precision, capability))
        assert configs[0] in legal
        least = {
            parts: min(
                (cost(p, precision, c, capability) for c in legal if (c.split_k > 1) == parts),
                default=math.inf,
            )
            for parts in (False, True)
        }
        if abs(least[True] - least[False]) > 1:
            assert (configs[0].split_k > 1) == (least[True] < least[False])
        if count(p, configs[0]) < arch_of(capability).processors:
            assert any(c.split_k > 1 for c in configs), (size, batch)
        seen.add(configs[0].split_k > 1)
    assert seen == {True, False}


def test_tma_where_descriptors_can_say_it():
    config = Config(128, 64, 64, 4, 3, tma=True)

    def taken(*args, precision="bf16", capability=90, **kwargs):
        return tiles.takes_tma(problem(*args, **kwargs), precision, config, capability)

    assert taken((8, 64, 14, 14), (64, 64, 3, 3), padding=1)
    assert taken((8, 64, 14, 14), (64, 64, 3, 3), stride=2, padding=1)
    assert taken((8, 72, 14, 14), (64, 72, 1, 1))
    assert not taken((8, 64, 14, 14), (64, 64, 3, 3), padding=1, capability=80)
    assert not taken((8, 64, 15, 14), (64, 64, 3, 3), stride=2, padding=1)  # a row left over
    assert not taken((8, 72, 14, 14), (64, 72, 3, 3), padding=1)  # runs into the next tap
    assert not taken((8, 68, 14, 14), (64, 68, 1, 1))  # rows of 136 bytes
    assert not taken((8, 64, 14, 14), (12, 64, 1, 1))  # rows of 24 bytes
    assert not taken((8, 64, 14, 14), (64, 32, 1, 1), groups=2)
    assert not taken((8, 64, 14, 14), (64, 64, 1, 1), precision="fp32")
    assert taken((2**11, 16, 1000, 1000), (8, 16, 1, 1))
    assert not taken((2**11, 16, 1024, 1024), (8, 16, 1, 1))  # 2³¹ rows: coordinates have 32 bits


@pytest.mark.parametrize("capability", [81, 87, 103, 121])
def test_an_architecture_that_is_not_listed_is_the_next_lower(capability):
    assert arch_of(capability) is ARCHS[max(a for a in ARCHS if a <= capability)]


def test_config_names_are_stable_and_read_back(problems):
    assert str(Config(128, 64, 32, 4, 3)) == "m128n64k32w4s3x1g8"
    assert str(Config(16, 256, 64, 8, 2, 4, 16, True)) == "m16n256k64w8s2x4g16-tma"
    for p in problems:
        for c in tiles.candidates(p, "fp16", 90):
            assert Config.parse(str(c)) == c


@pytest.mark.parametrize("name", ["", "m128", "m128n64k32w4s3x1g8-tmb", "m128n64k32w4s3x1g8 ", "x"])
def test_what_is_no_config_name_is_refused(name):
    with pytest.raises(ValueError, match="is not the name of a config; accepted: such as m128"):
        Config.parse(name)


def test_geometry_is_that_of_the_convolution():
    p = problem((2, 6, 11, 9), (8, 3, 3, 3), stride=2, padding=1, dilation=2, groups=2)
    x, w = torch.empty(2, 6, 11, 9, device="meta"), torch.empty(8, 3, 3, 3, device="meta")
    out = torch.nn.functional.conv2d(x, w, None, 2, 1, 2, 2)
    assert p.out_size == tuple(out.shape[2:])
    assert p.m * p.o * p.groups == out.numel()
    assert (p.flat, p.depthwise, p.pointwise) == (True, False, False)
    assert p.steps(16) == math.ceil(27 / 16)


def test_tables_need_no_triton():
    code = "import sys; sys.modules['triton'] = None; import resnet_fused.backends.triton.tiles"
    subprocess.run([sys.executable, "-c", code], check=True)
