"""Two convolutions in one kernel: tile tables, and what they compile to on GPUs that are not here.

The cases are every config that the tuner would measure for the 56x56 and 28x28 stages of ResNet-50,
-101 and -152, whose shapes are the same.
"""

import functools

import pytest
import torch
from compiling import compilers

from resnet_fused.backends.triton import pair_tiles
from resnet_fused.backends.triton.cost import arch_of
from resnet_fused.backends.triton.pair_tiles import Pair, declines, heuristic, shared_bytes
from resnet_fused.backends.triton.shapes import Config
from resnet_fused.engine.capture import capture, fill
from resnet_fused.engine.merge import pairs

PRODUCTS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


@functools.cache
def found(name: str, batch: int) -> frozenset[Pair]:
    """The pairs of a model on 224x224 images that one kernel can run."""
    import resnet_fused as rf
    from resnet_fused.models import create_model

    with torch.device("meta"), torch.no_grad():
        model = rf.fuse(create_model(name).to(torch.bfloat16).eval())
        passed = capture(model, torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16))
    calls = [fill(call.args, list(passed.examples)) for _, call in pairs(passed)]
    made = (Pair.of(a[0].shape, a[1].shape, a[4].shape, *a[8:11], a[7] is not None) for a in calls)
    return frozenset(pair for pair in made if declines(pair) is None)


def test_the_pairs_of_the_bottleneck_networks():
    first = {
        (p.first.c, p.first.h, p.first.stride[0], p.o, p.residual) for p in found("resnet50", 2)
    }
    assert first == {(64, 56, 1, 256, True), (128, 56, 2, 512, True), (128, 28, 1, 512, True)}
    for name in ("resnet101", "resnet152"):
        assert found(name, 2) == found("resnet50", 2)


@pytest.mark.parametrize("batch", [1, 8, 256])
@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
def test_every_config_fits_the_device_and_the_pair(batch, capability):
    shapes = [((batch, 24, 9, 7), (20, 24, 3, 3), (12, 20, 1, 1))]
    small = [Pair.of(*s, (2, 2), (1, 1), (1, 1), residual=False) for s in shapes]
    for pair in (*found("resnet50", batch), *small):
        configs = pair_tiles.candidates(pair, "bf16", capability)
        assert 1 <= len(set(configs)) == len(configs) <= pair_tiles.MOST_CANDIDATES
        assert heuristic(pair, "bf16", capability) == configs[0]
        for c in configs:
            assert shared_bytes(pair, "bf16", c, capability) <= arch_of(capability).block_shared
            assert all(n & (n - 1) == 0 and n >= 16 for n in (c.block_m, c.block_n, c.block_k))
            assert c.block_m <= max(16, 2 * pair.first.m)
            assert c.block_n <= max(16, 2 * pair.o)
            assert Config.parse(str(c)) == c


def test_what_the_kernel_does_not_take():
    def reason(c, between):
        shapes = (2, c, 9, 9), (between, c, 3, 3), (8, between, 1, 1)
        return declines(Pair.of(*shapes, (1, 1), (1, 1), (1, 1), residual=False))

    assert reason(16, 128) is None
    assert reason(15, 128) == "takes both convolutions in one kernel from 16 channels on, x has 15"
    assert reason(16, 129).endswith(
        "128 channels between two convolutions on the chip, weight has 129"
    )


def compiled(pair: Pair, config: Config, capability: int):
    from resnet_fused.backends.triton import aot

    return aot.compile_pair(pair, torch.bfloat16, config, capability)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict:
    """The kernel of every case, compiled two at a time."""
    pytest.importorskip("triton")
    cases = [
        (pair, config, capability)
        for pair in found("resnet50", 256)
        for capability in PRODUCTS
        for config in pair_tiles.candidates(pair, "bf16", capability)
    ]
    with compilers(tmp_path_factory.mktemp("triton")) as pool:
        running = {case: pool.submit(compiled, *case) for case in cases}
        return {case: future.result() for case, future in running.items()}


def test_every_config_compiles_well(kernels):
    assert len(kernels) > 3 * 3
    for (pair, config, capability), made in kernels.items():
        name = f"{pair.first.c}x{pair.first.h} {config} sm_{capability}: {made}"
        assert made.spilled == 0, name
        assert made.registers <= 255, name
        assert made.shared <= arch_of(capability).block_shared, name
        assert made.shared <= shared_bytes(pair, "bf16", config, capability), name
        assert made.instruction == PRODUCTS[capability], name
        # Tiles and residual; what is 4 bytes wide are scale and shift, one value a row.
        assert set(made.loads) <= {"async 16", "load 16", "async 4", "load 4"}, name
        assert made.loads["async 16"] > made.loads["async 4"], name
