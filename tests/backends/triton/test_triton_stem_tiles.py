"""How stems and heads are cut, without triton or a GPU."""

import itertools
import subprocess
import sys

import pytest

from resnet_fused.backends.triton import stem
from resnet_fused.backends.triton.cost import ARCHS, arch_of
from resnet_fused.backends.triton.head import head_config
from resnet_fused.backends.triton.shapes import ITEMSIZE
from resnet_fused.backends.triton.stem import Stem, StemConfig


def problem(batch=256, channels=3, size=224, outputs=64, pool=(3, 2, 1)) -> Stem:
    pairs = ((2, 2), (3, 3), (1, 1), *((v, v) for v in pool))
    return Stem.of((batch, channels, size, size), (outputs, channels, 7, 7), *pairs)


@pytest.mark.parametrize("capability", ARCHS)
@pytest.mark.parametrize("precision", ITEMSIZE)
def test_every_config_fits_the_device_and_the_problem(precision, capability):
    sizes = itertools.product((1, 8, 256), (1, 3, 64), (32, 224), (8, 64, 100))
    for p in itertools.starmap(problem, sizes):
        configs = stem.candidates(p, precision, capability)
        assert 1 <= len(configs) <= stem.MOST_CANDIDATES
        assert stem.heuristic(p, precision, capability) == configs[0]
        costs = [stem.cost(p, precision, c, capability) for c in configs]
        assert costs == sorted(costs)
        for c in configs:
            assert StemConfig.parse(str(c)) == c
            assert stem.shared_bytes(precision, c) <= arch_of(capability).block_shared
            assert c.band <= p.out_size[0]
            assert c.block_m <= max(16, 2 * p.pairs)
            assert c.block_n <= max(16, 2 * p.conv.o)
            run = p.run(precision, c.block_k)
            assert run.length % c.block_k == run.length % run.align == 0
            assert run.length >= p.span


def test_products_are_those_of_the_convolution_and_what_neighbours_share():
    p, counted = problem(1), 112 * 112 * 64 * 147
    assert counted == 118_013_952
    # 5 columns for 2 windows; of rows, 2 for each window and one more for each band.
    assert stem.products(p, 1) / counted == 5 / 4 * 3 / 2
    assert stem.products(p, 8) / counted == 5 / 4 * 17 / 16
    assert stem.products(p, 28) < stem.products(p, 7) < stem.products(p, 4)
    # Windows side by side share nothing.
    assert stem.products(problem(1, pool=(2, 2, 0)), 7) == counted


def test_a_large_batch_walks_down_long_bands_and_a_small_one_does_not():
    assert stem.heuristic(problem(256), "bf16", 90).band >= 4
    assert stem.heuristic(problem(1), "bf16", 90).band == 1


def test_how_rows_of_taps_are_read():
    assert problem().run("bf16", 32) == (8, 32)
    assert problem().run("tf32", 32) == (4, 32)
    assert problem(size=222).run("bf16", 32) == (2, 32)  # rows of 1332 bytes
    assert problem(size=221).run("bf16", 32) == (1, 32)
    assert problem(channels=1).run("bf16", 16) == (8, 16)


@pytest.mark.parametrize("name", ["", "m32", "m32n64k32w4", "m32n64k32w4b8 ", "m32n64k32w4s3x1g8"])
def test_what_is_no_config_name_is_refused(name):
    with pytest.raises(ValueError, match="is not the name of a config; accepted: such as m32n64"):
        StemConfig.parse(name)


@pytest.mark.parametrize("images", [1, 8, 256])
def test_the_head_s_tiles(images):
    config = head_config(images, 1000, False, 90)
    assert config.block_m <= max(16, 2 * images)
    assert config.block_m * config.block_k == 4096
    blocks = -(-images // config.block_m) * -(-1000 // config.block_n)
    assert blocks >= arch_of(90).processors or config.block_n == 16


def test_the_head_s_steps_are_as_short_as_its_longer_side_asks():
    """At 256 channels a step of 64 classes took more shared memory than sm_86 has."""
    assert head_config(1, 21841, False, 86)[:3] == (16, 64, 64)
    assert head_config(256, 1000, False, 80)[:3] == (64, 32, 64)


@pytest.mark.parametrize("images", [1, 16, 32, 64, 256, 1024])
@pytest.mark.parametrize("classes", [100, 1000, 21841])
def test_exact_products_of_sm_80_take_steps_whose_operands_fit_registers(images, classes):
    """Triton 3.9 reads all of them first: of these none spilled, on 3.7.1 neither."""
    m, n, k, *_ = head_config(images, classes, True, 80)
    assert (m, n) == (16, 16) or k * max(m, 2 * n) == 2048
    assert head_config(images, classes, True, 90) == head_config(images, classes, False, 90)


def test_tables_need_no_triton():
    code = "import sys; sys.modules['triton'] = None; from resnet_fused.backends.triton import "
    subprocess.run([sys.executable, "-c", code + "head, stem"], check=True)
