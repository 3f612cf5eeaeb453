"""TF32: operands are rounded to it, as torch's libraries do, and not cut off, as tensor cores do.

The first tests model both on the host. A kernel that cut off would break the 2x rule against one
that rounds; one that rounds holds it, whichever of the two torch does on a GPU.
"""

import pytest
import torch
import torch.nn.functional as F
from compiling import compilers

from resnet_fused.backends.triton.shapes import Config, Problem
from resnet_fused.testing import two_x_rule

#: C, size, O, kernel, stride: ResNet-50's stem, and a 1x1 and a 3x3 of short and of long sums.
LAYERS = [(3, 224, 64, 7, 2), (64, 56, 256, 1, 1), (128, 28, 128, 3, 1), (512, 7, 512, 3, 1)]
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)


def cut_off(t: torch.Tensor) -> torch.Tensor:
    """What tensor cores read of float32: the first 10 bits of its mantissa."""
    return (t.view(torch.int32) & -0x2000).view(torch.float32)


def rounded(t: torch.Tensor) -> torch.Tensor:
    """What cvt.rna.tf32.f32 makes of finite values."""
    return cut_off((t.view(torch.int32) + 0x1000).view(torch.float32))


def answers(c, size, o, k, stride) -> tuple:
    """A layer's sums: exact, of rounded and of cut off operands, and the terms of one."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, c, size, size), torch.randn(o, c, k, k) / (c * k * k) ** 0.5
    if c > 3:
        x = x.relu()

    def conv(x, weight):
        return F.conv2d(x, weight, None, stride, k // 2)

    ways = (conv(way(x), way(weight)) for way in (rounded, cut_off))
    return conv(x.double(), weight.double()), *ways, c * k * k


@each_layer
def test_rounding_holds_the_rule_whatever_torch_does_and_cutting_off_does_not(layer):
    oracle, nearest, cut, terms = answers(*layer)
    assert two_x_rule(nearest, cut, oracle, terms).ok
    check = two_x_rule(cut, nearest, oracle, terms)
    assert not check.ok
    # All of ResNet-50's layers: 2.3 to 3.2 times the error of rounding.
    assert 2 < check.error / (nearest - oracle).abs().max() < 4


@each_layer
def test_rounding_has_no_bias_and_cutting_off_loses_a_part_in_1400(layer):
    oracle, nearest, cut, _ = answers(*layer)

    def bias(y):
        return float(((y - oracle) * oracle).sum() / oracle.square().sum())

    assert abs(bias(nearest)) < 5e-5
    assert -8e-4 < bias(cut) < -6e-4


# --- the kernels ---------------------------------------------------------------------------------

TMA, POINTER, SPLIT = "m128n64k32w4s3x1g8-tma", "m64n64k32w4s3x1g8", "m64n64k32w4s3x4g8"
CASES = [
    *((kind, precision, POINTER, capability)
      for kind in ("conv", "statistics", "data", "weight", "head", "stem")
      for precision, capability in (("tf32", 80), ("tf32", 90), ("fp32", 90))),
    ("conv", "tf32", SPLIT, 100), ("conv", "tf32", TMA, 90), ("conv", "tf32", TMA, 100),
]  # fmt: skip


def launches(kind: str, precision: str, name: str, capability: int) -> list:
    from resnet_fused.backends.triton import conv_launch, launch, launch_ends, stem
    from resnet_fused.backends.triton.stem import Stem

    for flags in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):
        flags.fp32_precision = "tf32" if precision == "tf32" else "ieee"

    def meta(*shape):
        return torch.empty(shape, device="meta")

    pairs = ((1, 1), (1, 1), (1, 1))
    x, weight, y = meta(8, 64, 28, 28), meta(64, 64, 3, 3), meta(8, 64, 28, 28)
    problem = Problem.of(x.shape, weight.shape, *pairs, 1, False)
    if kind == "conv":
        config = Config.parse(name)
        return launch.conv(x, weight, None, None, None, y, problem, config, None, capability)
    if kind == "head":
        return launch_ends.head(x, meta(10, 64), None, meta(8, 10), capability)
    if kind == "stem":
        image, taps, pool = meta(8, 3, 56, 56), meta(64, 3, 7, 7), ((3, 3), (2, 2), (1, 1))
        ends = Stem.of(image.shape, taps.shape, (2, 2), (3, 3), (1, 1), *pool)
        config = stem.heuristic(ends, precision, capability)
        out = meta(8, 64, *ends.out_size)
        return [launch_ends.stem(image, taps, None, None, out, ends, config, "relu")]
    if kind == "data":
        return conv_launch.backward_data(y, weight, x, problem, capability)
    if kind == "weight":
        return conv_launch.backward_weight(y, x, meta(64, 9 * 64), problem, capability)
    training = Problem(**{**vars(problem), "training": True, "gathered": True})
    return conv_launch.conv_bn_stats(x, weight, y, training, capability)[0]


def compiled(*case) -> list:
    from resnet_fused.backends.triton import aot

    return [aot.compile_launch(step, case[-1]) for step in launches(*case)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict:
    pytest.importorskip("triton")
    with compilers(tmp_path_factory.mktemp("triton")) as pool:
        running = {case: pool.submit(compiled, *case) for case in CASES}
        return {case: future.result() for case, future in running.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_products_in_tf32_are_of_rounded_operands(kernels, case):
    if case[1] == "fp32":
        assert not any(k.rounds for k in kernels[case]), kernels[case]
        return
    multiplying = [k for k in kernels[case] if k.instruction != "fma"]
    assert multiplying
    for kernel in multiplying:
        assert kernel.rounds, kernel
        assert kernel.spilled == 0, kernel
    assert any("tma" in k.loads for k in kernels[case]) == (case[2] == TMA)


@pytest.fixture
def flags():
    kept = [(f, f.fp32_precision) for f in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)]
    yield
    for flag, value in kept:
        flag.fp32_precision = value


@pytest.mark.usefixtures("flags")
def test_descriptors_round_what_is_multiplied_and_nothing_else():
    pytest.importorskip("triton")
    from resnet_fused.backends.triton import launch

    if not launch.DESCRIPTORS_ROUND:
        pytest.skip("descriptors round from Triton 3.7 on")
    (step,) = launches("conv", "tf32", TMA, 90)
    rounding = {n for n, d in step.arguments.items() if getattr(d, "round_f32_to_tf32", False)}
    assert rounding == {"x_desc", "w_desc"}


@pytest.mark.usefixtures("flags")
def test_where_descriptors_cannot_round_the_kernel_does(monkeypatch):
    """As before Triton 3.7."""
    pytest.importorskip("triton")
    from resnet_fused.backends.triton import launch

    monkeypatch.setattr(launch, "DESCRIPTORS_ROUND", False)
    (step,) = launches("conv", "tf32", TMA, 90)
    assert not step.arguments["ROUNDED"]
    assert not getattr(step.arguments["x_desc"], "round_f32_to_tf32", False)
