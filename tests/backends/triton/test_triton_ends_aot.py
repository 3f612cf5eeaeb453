"""What the stem and the head compile to on GPUs that are not here, at ResNet's sizes."""

import pytest
import torch
from compiling import NEWER_TRITON, compilers
from test_triton_aot import DTYPES, PRODUCTS

from resnet_fused.backends.triton import stem
from resnet_fused.backends.triton.cost import arch_of
from resnet_fused.backends.triton.stem import Stem

pytest.importorskip("triton")

#: Batch, precision, capability.
CASES = [(batch, "bf16", capability) for batch in (1, 256) for capability in PRODUCTS]
CASES += [(256, "fp16", 80), (256, "tf32", 90), (1, "tf32", 100), (256, "fp32", 80)]


def resnet_stem(batch: int) -> Stem:
    pairs = ((2, 2), (3, 3), (1, 1), (3, 3), (2, 2), (1, 1))
    return Stem.of((batch, 3, 224, 224), (64, 3, 7, 7), *pairs)


def compiled(batch: int, precision: str, capability: int) -> tuple[list, list]:
    from resnet_fused.backends.triton import aot

    for flags in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):
        flags.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    problem, dtype = resnet_stem(batch), DTYPES[precision]
    config = stem.heuristic(problem, precision, capability)
    head = ((batch, 2048, 7, 7), 1000, dtype, capability)
    return aot.compile_stem(problem, dtype, config, capability), aot.compile_head(*head)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict:
    with compilers(tmp_path_factory.mktemp("triton")) as pool:
        running = {case: pool.submit(compiled, *case) for case in CASES}
        return {case: f.result() for case, f in running.items()}


each_case = pytest.mark.parametrize("case", CASES, ids=str)


@each_case
def test_the_stem(kernels, case):
    batch, precision, capability = case
    (kernel,), _ = kernels[case]
    config = stem.heuristic(resnet_stem(batch), precision, capability)
    assert (kernel.kernel, kernel.spilled) == ("stem_fwd_kernel", 0), f"{config} {kernel}"
    assert kernel.registers <= 255
    assert kernel.shared <= stem.shared_bytes(precision, config) <= arch_of(capability).block_shared
    assert kernel.instruction == ("fma" if precision == "fp32" else expected(config, capability))
    # Pixels of 6 bytes, fetched 16 at a time where a tile has so many for every thread.
    widths = {name for name in kernel.loads if name.startswith("async")}
    assert "async 16" in widths or precision == "fp32"
    assert widths
    assert widths <= {"async 16", "async 8"}


def heads(*cases) -> list:
    from resnet_fused.backends.triton import aot

    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return [kernel for case in cases for kernel in aot.compile_head(*case)]


@pytest.mark.skipif(not NEWER_TRITON.exists(), reason=f"{NEWER_TRITON} is not there")
def test_the_head_spills_on_a_newer_triton_neither(tmp_path):
    exact = [((batch, 512, 7, 7), 1000, torch.float32, 80) for batch in (32, 256, 1024)]
    cases = (*exact, ((64, 512, 7, 7), 100, torch.bfloat16, 90))
    with compilers(tmp_path, NEWER_TRITON) as pool:
        made = pool.submit(heads, *cases).result()
    assert [kernel.spilled for kernel in made] == [0] * 8, made


def test_the_head_of_many_classes_fits_small_devices(tmp_path):
    case = ((1, 512, 7, 7), 21841, torch.bfloat16, 86)
    with compilers(tmp_path) as pool:
        made = pool.submit(heads, case).result()
    for kernel in made:
        assert kernel.shared <= arch_of(86).block_shared, kernel
        assert kernel.spilled == 0, kernel


def expected(config, capability: int) -> str:
    return PRODUCTS[capability] if config.block_n >= 64 else "mma.sync"


@each_case
def test_the_head(kernels, case):
    _, precision, capability = case
    _, made = kernels[case]
    assert [kernel.kernel for kernel in made] == ["mean_kernel", "linear_kernel"]
    for kernel in made:
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= arch_of(capability).block_shared, kernel
    mean, linear = made
    assert set(mean.loads) == {"load 16"}
    assert "async 16" in linear.loads
    # Tiles of 16 or 32 classes: fewer rows than wgmma and tcgen05 take.
    assert linear.instruction == ("fma" if precision == "fp32" else "mma.sync")
