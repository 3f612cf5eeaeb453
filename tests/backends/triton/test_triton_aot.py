"""What the kernels compile to on GPUs that are not here: nothing spilled, wide loads, tensor cores.

Most cases are the config that is used where none was measured: for all convolutions of ResNet-50
at batch 256 in bfloat16 on sm_90, as that is what the tables are made for; on the other
architectures, precisions and sizes for a handful, each for one path of the kernels. Of what the
tuner would time beside these a sample is compiled; `resnet-fused inspect -m resnet50 --all`
compiles the whole table and exits with 1 if anything spills.
"""

import itertools
import random

import pytest
import torch
from compiling import compiled, compilers

from resnet_fused.backends.triton import tiles
from resnet_fused.backends.triton.cost import arch_of
from resnet_fused.backends.triton.shapes import Config, Problem
from resnet_fused.inspection import convolutions

pytest.importorskip("triton")

DTYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32
}  # fmt: skip
PRODUCTS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def problem(n, c, size, o, k, stride=1, groups=1, residual=False) -> Problem:
    pairs = ((stride, stride), (k // 2, k // 2), (1, 1))
    return Problem.of((n, c, size, size), (o, c // groups, k, k), *pairs, groups, residual)


STEM = problem(256, 3, 224, 64, 7, 2)
BASIC = problem(64, 128, 28, 128, 3, residual=True)
STRIDED = problem(64, 128, 56, 128, 3, 2)
# Not of a ResNet: K in parts of a tile that is wide in channels, and windows that lie apart.
WIDE = Problem.of((7, 20, 7, 7), (200, 20, 7, 7), (1, 1), (3, 3), (1, 1), 1, False)
APART = Problem.of((7, 32, 28, 28), (32, 1, 5, 5), (3, 3), (4, 4), (2, 2), 32, False)
FOUR = Problem.of((1, 96, 56, 56), (800, 24, 2, 2), (1, 1), (1, 1), (1, 1), 4, True)
IN_TWO = Problem.of((1, 200, 13, 13), (144, 100, 3, 3), (1, 1), (1, 1), (1, 1), 2, False)
# Products of mma on sm_100, and channels that no load of 16 bytes divides.
NARROW = Problem.of((1, 4096, 14, 14), (1024, 128, 7, 7), (1, 1), (3, 3), (1, 1), 32, False)
ODD = Problem.of((32, 63, 28, 28), (65, 63, 3, 3), (1, 1), (1, 1), (1, 1), 1, True)
ODD_DEPTHWISE = Problem.of((1, 37, 28, 28), (37, 1, 5, 5), (1, 1), (2, 2), (1, 1), 37, False)
ATROUS = Problem.of((32, 2048, 65, 65), (256, 2048, 3, 3), (1, 1), (6, 6), (6, 6), 1, False)
EXPAND = problem(64, 256, 14, 1024, 1, residual=True)
SMALL = problem(1, 512, 7, 512, 3)
GROUPED = problem(32, 128, 56, 128, 3, groups=32)
DEPTHWISE = problem(32, 64, 56, 64, 3, groups=64)
OTHERS = [
    *((p, "fp16", 80) for p in (STEM, BASIC, STRIDED, EXPAND, SMALL, DEPTHWISE)),
    *((p, "tf32", 90) for p in (STEM, BASIC, EXPAND)),
    *((p, "fp32", 80) for p in (STEM, BASIC, EXPAND)),
    *((p, "fp32", 90) for p in (WIDE, IN_TWO, FOUR)),
    *((p, "bf16", 100) for p in (BASIC, STRIDED, EXPAND, APART)),
    *((p, "bf16", 90) for p in (SMALL, GROUPED)),
]
#: Of these every candidate: some spilled that are now left out or have a limit of registers.
BEYOND = [
    (NARROW, "bf16", 100), (ODD, "fp16", 100), (ODD, "tf32", 80), (ODD, "fp32", 90),
    (ODD_DEPTHWISE, "bf16", 80), (ATROUS, "bf16", 80),
    (Problem.of((1, 32, 28, 28), (128, 1, 3, 3), (1, 1), (1, 1), (1, 1), 32, False), "fp16", 100),
    (problem(1, 3, 224, 32, 3, 2), "fp32", 100), (problem(1, 40, 28, 72, 5), "fp32", 90),
    (problem(1, 32, 112, 96, 7), "fp32", 80), (problem(1, 512, 14, 512, 3, groups=32), "fp16", 100),
]  # fmt: skip


#: What else the tuner would time, drawn from tables of seven thousand configs: so many for each
#: architecture. Most in float32, where ptxas was seen to spill in one config of twenty.
SAMPLE = {"fp16": 4, "bf16": 8, "tf32": 6, "fp32": 24}
MODELS, BATCHES = ("resnet34", "resnet50"), (1, 256)


def drawn() -> list:
    """Cases with one of their candidates: of every precision, architecture and, in turn, tile."""
    rng = random.Random(0)
    problems = [
        p for name in MODELS for batch in BATCHES for p in convolutions(name, batch, torch.float16)
    ]
    cases = []
    for precision, capability in itertools.product(DTYPES, PRODUCTS):
        by_tile: dict = {}
        for p in problems:
            case = (p, precision, capability)
            for c in tiles.candidates(*case)[1:]:
                cut = (c.block_m, c.block_n, c.num_warps, c.tma, c.split_k > 1)
                by_tile.setdefault(cut, []).append((case, c))
        groups = rng.sample(list(by_tile.values()), len(by_tile))
        cases += [rng.choice(groups[i % len(groups)]) for i in range(SAMPLE[precision])]
    return cases


def named(p: Problem, precision: str, capability: int) -> str:
    return (
        f"{p.n}x{p.c * p.groups}x{p.h}-{p.o}k{p.kernel[0]}s{p.stride[0]}-{precision}-{capability}"
    )


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict:
    """The kernels of every case, compiled two at a time."""
    cases = [(p, "bf16", 90) for p in convolutions("resnet50", 256, torch.bfloat16)] + OTHERS
    with compilers(tmp_path_factory.mktemp("triton")) as pool:
        running = {}
        for p, precision, capability in cases:
            config = tiles.heuristic(p, precision, capability)
            task = (p, DTYPES[precision], config, capability, precision)
            running[p, precision, capability] = pool.submit(compiled, *task)
        return {case: (tiles.heuristic(*case), f.result()) for case, f in running.items()}


def check(case, config: Config, made: list) -> None:
    p, precision, capability = case
    name = f"{named(*case)} {config}"
    main = made[0]
    assert len(made) == (2 if config.split_k > 1 else 1), name
    for kernel in made:
        assert kernel.spilled == 0, f"{name}: {kernel}"
        assert kernel.registers <= 255, f"{name}: {kernel}"
        assert kernel.shared <= arch_of(capability).block_shared, f"{name}: {kernel}"
    if p.depthwise:
        return
    tensor_cores = PRODUCTS[capability] if p.o >= 64 else "mma.sync"
    assert main.instruction == ("fma" if precision == "fp32" else tensor_cores), f"{name}: {main}"
    assert ("tma" in main.loads) == config.tma, f"{name}: {main}"
    assert main.rounds == (precision == "tf32"), f"{name}: {main}"
    if not p.flat:  # the tiles themselves, not the scale and shift, which are "load"
        widths = {width for width in main.loads if width.startswith("async")}
        if p.steps(config.block_k) == 1:  # nothing to fetch ahead
            widths = {width for width in main.loads if width == "load 16"}
        assert config.tma or widths in ({"async 16"}, {"load 16"}), f"{name}: {main}"


def test_the_convolutions_of_resnet50(kernels):
    cases = [case for case in kernels if case not in OTHERS]
    assert len(cases) == 24
    for case in cases:
        check(case, *kernels[case])
    # Everything but the stem, whose pixels are 6 bytes wide, is fetched by TMA.
    assert [case[0].c for case in cases if not kernels[case][0].tma] == [3]


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: named(*case))
def test_other_architectures_and_precisions(kernels, case):
    check(case, *kernels[case])


def test_a_sample_of_the_other_candidates(tmp_path):
    with compilers(tmp_path) as pool:
        running = [
            (case, config, pool.submit(compiled, case[0], DTYPES[case[1]], config, *case[:0:-1]))
            for case, config in drawn()
        ]
        for case, config, made in running:
            check(case, config, made.result())


def test_no_candidate_spills_beyond_the_resnets(tmp_path):
    with compilers(tmp_path) as pool:
        running = [
            (case, config, pool.submit(compiled, case[0], DTYPES[case[1]], config, *case[:0:-1]))
            for case in BEYOND
            for config in tiles.candidates(*case)
        ]
        for (p, precision, capability), config, made in running:
            for kernel in made.result():
                name = f"{named(p, precision, capability)} {config}: {kernel}"
                assert kernel.spilled == 0, name
                assert kernel.shared <= arch_of(capability).block_shared, name


def test_a_group_of_four_channels_is_loaded_whole(kernels):
    """As wide as one group's pixel; its weights are too few for 16 bytes of each thread."""
    _, (made,) = kernels[GROUPED, "bf16", 90]
    pixels, weights = made.loads["async 8"], made.loads["async 4"]
    assert 2 * weights <= pixels
    assert not any(name in made.loads for name in ("async 2", "load 2"))


def test_the_model_of_shared_memory_is_no_lower_than_triton_s(kernels):
    from resnet_fused.backends.triton.cost import shared_bytes

    for (p, precision, capability), (config, made) in kernels.items():
        if not p.depthwise:
            estimate = shared_bytes(p, precision, config, capability)
            assert made[0].shared <= estimate, named(p, precision, capability)


def test_split_k_ends_with_wide_loads(kernels):
    config, (first, second) = kernels[SMALL, "bf16", 90]
    assert config.split_k > 1
    assert (first.kernel, second.kernel) == ("conv_fwd_kernel", "affine_kernel")
    assert second.loads == {"load 16": second.loads["load 16"]}


def test_interpreted_kernels_are_not_compiled(monkeypatch):
    from resnet_fused.backends.triton import aot

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interpreted kernels cannot be compiled"):
        aot.compile_conv(SMALL, torch.bfloat16, tiles.heuristic(SMALL, "bf16", 90), 90)
