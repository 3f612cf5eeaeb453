"""What the kernels of training compile to on GPUs that are not here: see test_triton_aot.py.

The cases are some of ResNet-50's layers, each with the tiles that are used where none was measured;
of statistics in tiles that TMA fetches, some that `tune` would time beside these.
"""

import dataclasses
import functools

import pytest
import torch
from async_dots import Operand, pending_operands
from compiling import compiled_launches, compilers, left_running

from resnet_fused.backends.triton.cost import arch_of
from resnet_fused.backends.triton.shapes import Problem

pytest.importorskip("triton")

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
PRODUCTS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def problem(n, c, size, o, k, stride=1) -> Problem:
    pairs = ((stride, stride), (k // 2, k // 2), (1, 1))
    made = Problem.of((n, c, size, size), (o, c, k, k), *pairs, 1, False)
    return dataclasses.replace(made, training=True)


LAYERS = {
    "stem": problem(256, 3, 224, 64, 7, 2),
    "3x3": problem(256, 64, 56, 64, 3),
    "strided": problem(256, 128, 56, 128, 3, 2),
    "shortcut": problem(256, 256, 56, 512, 1, 2),
    "expand": problem(256, 256, 14, 1024, 1),
    "reduce": problem(256, 1024, 14, 256, 1),
    "small": problem(256, 128, 28, 512, 1),
    "large": problem(256, 512, 7, 2048, 1),
    "wide": problem(12000, 64, 56, 256, 1),
}


def tensor(*shape, dtype=torch.float32) -> torch.Tensor:
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def normalisation(channels):
    from resnet_fused.backends.triton.bn_launch import BatchNorm

    return BatchNorm(*(tensor(channels) for _ in range(4)), 1e-5)


def maps(p: Problem, dtype) -> tuple:
    y = tensor(p.n, p.o, *p.out_size, dtype=dtype)
    return tensor(p.n, p.c, p.h, p.w, dtype=dtype), tensor(p.o, p.c, *p.kernel, dtype=dtype), y


def statistics(layer, dtype, capability):
    from resnet_fused.backends.triton import conv_launch

    p = LAYERS[layer]
    launches, *_ = conv_launch.conv_bn_stats(*maps(p, dtype), p, capability)
    return launches


def normalised(layer, dtype, capability):
    """The output's statistics, the input normalised as it is read."""
    from resnet_fused.backends.triton import conv_launch

    p = dataclasses.replace(LAYERS[layer], gathered=True)
    own = normalisation(p.c)
    launches, *_ = conv_launch.conv_bn_stats(*maps(p, dtype), p, capability, own, "relu")
    return launches


def candidates(layer, dtype, capability):
    """The output's statistics, in every third of the TMA tiles that `tune` would time."""
    from resnet_fused.backends.triton import conv_launch, launch, tiles

    p = LAYERS[layer]
    configs = [c for c in tiles.candidates(p, launch.precision(dtype), capability) if c.tma]
    assert len(configs) > 4
    given = maps(p, dtype)
    made = [conv_launch.conv_bn_stats(*given, p, capability, config=c) for c in configs[1::3]]
    return [launches[0] for launches, *_ in made]


def data(layer, dtype, capability, *, joined=False):
    from resnet_fused.backends.triton import conv_launch

    x, weight, y = maps(LAYERS[layer], dtype)
    residual = x if joined else None
    return conv_launch.backward_data(y, weight, x, LAYERS[layer], capability, residual)


def joined(layer, dtype, capability):
    """The input's gradient, added to what its other readers gave."""
    return data(layer, dtype, capability, joined=True)


def before(layer, dtype, capability):
    """The input's gradient, past the ReLU and with the sums of the BatchNorm in front."""
    from resnet_fused.backends.triton import conv_launch

    x, w, y = maps(LAYERS[layer], dtype)
    own = normalisation(x.shape[1])
    launches, _ = conv_launch.bn_act_backward_data(
        y, w, x, own, "relu", x, LAYERS[layer], capability
    )
    return launches


def past_relu(layer, dtype, capability):
    """The input's gradient with what is added, past the ReLU in front, and its sums."""
    from resnet_fused.backends.triton import conv_launch

    x, w, y = maps(LAYERS[layer], dtype)
    launches, _ = conv_launch.relu_backward_data(y, w, x, x, LAYERS[layer], capability, x)
    return launches


def weight(layer, dtype, capability, own=None):
    from resnet_fused.backends.triton import conv_launch

    p = LAYERS[layer]
    x, w, y = maps(p, dtype)
    rows = tensor(p.o, w[0].numel(), dtype=dtype)
    return conv_launch.backward_weight(y, x, rows, p, capability, own, "relu")


def activation(layer, dtype, capability):
    """The weight's gradient, whose input is normalised as it is read."""
    return weight(layer, dtype, capability, normalisation(LAYERS[layer].c))


def passes(layer, dtype, capability):
    from resnet_fused.backends.triton import bn_launch as bn

    x = maps(LAYERS[layer], dtype)[2]
    c, h = x.shape[1:3]
    own, sums = normalisation(c), [tensor(c) for _ in range(3)]
    pool, y = ((3, 3), (2, 2), (1, 1)), tensor(x.shape[0], c, h // 2, h // 2, dtype=dtype)
    return [
        bn.bn_act(x, x, own, "relu", x),
        bn.bn_act(x, x, own, "relu", x, own),
        bn.backward_apply(x, x, own, None, sums[:2], "relu", 9, x),
        bn.backward_apply(x, x, own, x, sums, "relu", 9, x, x, own, x),
        *bn.backward_reduce(x, x, own, None, "relu", x)[0],
        *bn.backward_reduce(x, x, own, x, "relu", None, x, sums[0])[0],
        *bn.bn_stats(x)[0],
        bn.max_pool(x, own, "relu", pool, y, y.to(torch.uint8), y),
        bn.max_pool_backward(y, y.to(torch.uint8), x, pool),
    ]


def by_bits(layer, dtype, capability):
    """The passes that write or read what passed ReLU."""
    from resnet_fused.backends.triton import bn_launch as bn

    x = maps(LAYERS[layer], dtype)[2]
    n, c, h, w = x.shape
    own, sums = normalisation(c), [tensor(c) for _ in range(3)]
    bits = tensor(n, c // 8, h, w, dtype=torch.uint8)
    return [
        bn.bn_act(x, x, own, "relu", x, bits=bits),
        bn.bn_act(x, x, own, "relu", x, own, bits),
        bn.backward_apply(x, x, own, bits, sums, "relu", 9, x, x, own, x),
        *bn.backward_reduce(x, x, own, bits, "relu", x)[0],
    ]


def covariance(layer, dtype, capability):
    """A 1x1 convolution's BatchNorm by its input's covariance, and what its backward wants."""
    from resnet_fused.backends.triton import covariance_launch as launches

    x, w, y = maps(LAYERS[layer], dtype)
    products, mean, cov = launches.channel_covariance(x, capability)
    vectors = [tensor(y.shape[1]) for _ in range(4)]
    first, _ = launches.pointwise_bn_stats(w, mean, cov, *vectors[:2], 1e-5)
    given = (w, tensor(*w.shape), *vectors[:3], mean, cov, vectors[3], 1e-5, y.numel(), dtype)
    gradients, _ = launches.pointwise_bn_gradients(*given)
    return [*products, first, *gradients]


CASES = [
    *((statistics, layer, "bf16", 90) for layer in ("stem", "3x3", "strided", "expand")),
    *((statistics, *case) for case in (("3x3", "fp16", 80), ("3x3", "tf32", 90))),
    (statistics, "expand", "bf16", 100),
    *((normalised, layer, "bf16", 90) for layer in ("3x3", "expand")),
    *((normalised, *case) for case in (("3x3", "fp16", 80), ("3x3", "tf32", 90))),
    (normalised, "expand", "bf16", 100),
    *((candidates, layer, "bf16", 90) for layer in ("3x3", "shortcut", "reduce")),
    (candidates, "reduce", "tf32", 90),
    *((data, layer, "bf16", 90) for layer in ("3x3", "strided", "shortcut")),
    *((data, *case) for case in (("3x3", "fp16", 80), ("3x3", "tf32", 90))),
    (data, "expand", "bf16", 100),
    *((joined, *case) for case in (("3x3", "bf16", 90), ("reduce", "bf16", 90))),
    *((joined, *case) for case in (("reduce", "fp16", 80), ("reduce", "bf16", 100))),
    *((past_relu, layer, "bf16", 90) for layer in ("3x3", "reduce")),
    *((past_relu, *case) for case in (("reduce", "fp16", 80), ("reduce", "bf16", 100))),
    *((weight, layer, "bf16", 90) for layer in ("stem", "3x3", "shortcut")),
    *((weight, *case) for case in (("strided", "fp16", 80), ("3x3", "tf32", 90))),
    (weight, "expand", "bf16", 100),
    *((before, layer, "bf16", 90) for layer in ("3x3", "strided", "expand")),
    *((before, *case) for case in (("3x3", "fp16", 80), ("3x3", "tf32", 90))),
    (before, "expand", "bf16", 100),
    *((activation, layer, "bf16", 90) for layer in ("3x3", "strided", "expand")),
    *((activation, *case) for case in (("strided", "fp16", 80), ("3x3", "tf32", 90))),
    (activation, "expand", "bf16", 100),
    (passes, "stem", "bf16", 90),
    (by_bits, "stem", "bf16", 90),
    *((covariance, layer, "bf16", 90) for layer in ("expand", "large", "wide")),
    *((covariance, *case) for case in (("expand", "fp16", 80), ("expand", "bf16", 100))),
    *((covariance, *case) for case in (("small", "bf16", 90), ("small", "bf16", 100))),
    *((covariance, *case) for case in (("small", "fp16", 80), ("wide", "bf16", 100))),
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with compilers(tmp_path_factory.mktemp("triton")) as pool:
        yield pool


def of_cases(pool, function, cases) -> dict:
    """What ``function`` finds of the kernels of some cases, two cases at a time."""
    running = {}
    for build, layer, precision, capability in cases:
        given = functools.partial(build, layer, DTYPES[precision], capability)
        task = pool.submit(function, given, precision, capability)
        running[build, layer, precision, capability] = task
    return {case: task.result() for case, task in running.items()}


@pytest.fixture(scope="module")
def kernels(pool) -> dict:
    return of_cases(pool, compiled_launches, CASES)


def named(case) -> str:
    return f"{case[0].__name__}-{'-'.join(map(str, case[1:]))}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_kernels(kernels, case):
    """Nothing spilled, memory that a block has, tensor cores, loads of 16 bytes."""
    build, layer, precision, capability = case
    for kernel in kernels[case]:
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= arch_of(capability).block_shared, kernel
        if build is covariance:
            continue
        products = kernel.kernel.startswith("conv") and kernel.loads  # none: pixels without a tap
        assert kernel.instruction == (PRODUCTS[capability] if products else "fma"), kernel
        assert build is not candidates or set(kernel.loads) == {"tma"}, kernel
        widths = {int(load.split()[-1]) for load in kernel.loads if load != "tma"}
        if kernel.kernel == "scale_shift_kernel" or (
            layer == "stem" and build not in (passes, by_bits)
        ):
            continue  # one channel a thread; pixels of three channels
        if build is weight and precision == "tf32" and kernel.kernel.startswith("conv"):
            # Products in TF32 take K, here the pixels, running fastest only: one of them is turned.
            assert widths == {4, 16}, kernel
        elif build in (normalised, before, activation):  # scale and shift beside the tiles
            assert 16 in widths <= {4, 16}, kernel
        elif build is by_bits:
            assert 16 in widths <= {2, 16}, kernel  # two bytes of bits a thread, beside the maps
        else:
            assert widths <= {16}, kernel


@pytest.mark.parametrize("case", [c for c in CASES if c[0] is covariance], ids=named)
def test_small_products_too_are_tensor_cores(kernels, case):
    """Those of the maps in 16 bits; those with a covariance in three of TF32, by mma everywhere."""
    *_, capability = case
    for kernel in kernels[case]:
        product = "mma.sync"
        if kernel.kernel == "covariance_kernel":
            product = PRODUCTS[capability]
            assert set(kernel.loads) <= {"async 16", "load 16"}, kernel
            # One block for both sides of mma, which takes registers, is not fetched ahead.
            assert "async 16" in kernel.loads or capability == 80, kernel
        few = kernel.kernel in ("merge_covariance_kernel", "pointwise_shift_kernel")
        assert kernel.instruction == ("fma" if few else product), kernel


#: What Triton 3.7.1 makes of a loop that multiplies a and b, and also sums b.
SUMMED = """
  %a = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable>
  %b = ttg.local_alloc : () -> !ttg.memdesc<2x64x128xbf16, #shared, #smem, mutable>
  %a_0 = ttg.memdesc_index %a[%c0_i32] : !ttg.memdesc<3x64x128xbf16>
  %0 = ttg.async_copy_global_to_local %x, %a_0 mask %m : <64x128xbf16>
  %b_0 = ttg.memdesc_index %b[%c0_i32] : !ttg.memdesc<2x64x128xbf16>
  %1 = ttg.async_copy_global_to_local %y, %b_0 mask %m : <64x128xbf16>
  %a_1 = ttg.memdesc_index %a[%c1_i32] : !ttg.memdesc<3x64x128xbf16>
  %2 = ttg.async_copy_global_to_local %x, %a_1 mask %m : <64x128xbf16>
  %b_1 = ttg.memdesc_index %b[%c1_i32] : !ttg.memdesc<2x64x128xbf16>
  %3 = ttg.async_copy_global_to_local %y, %b_1 mask %m : <64x128xbf16>
  %4:2 = scf.for %step = %c0_i32 to %steps step %c1_i32 iter_args(%arg5 = %cst) -> (f32) {
    %5 = ttg.memdesc_index %a[%i] : !ttg.memdesc<3x64x128xbf16>
    %6 = ttg.memdesc_trans %5 {order = array<i32: 1, 0>} : !ttg.memdesc<64x128xbf16>
    %7 = ttg.memdesc_index %b[%j] : !ttg.memdesc<2x64x128xbf16>
    %8 = ttng.warp_group_dot %6, %7, %arg5 {isAsync = true} : !ttg.memdesc<128x64xbf16>
    %9:3 = ttng.warp_group_dot_wait %8, %6, %7 {pendings = 1 : i32} : tensor<128x128xf32>
    scf.yield %9#0
  }
"""


def test_a_copy_that_overtakes_a_product_is_seen():
    a, b = pending_operands(SUMMED)
    assert (a, b) == (Operand("%a", 3, 2), Operand("%b", 2, 2))
    assert b.overtaken
    assert not a.overtaken
    assert pending_operands(SUMMED.replace("pendings = 1", "pendings = 0")) == []


def test_no_copy_overtakes_a_product(pool):
    cases = [case for case in CASES if case[3] == 90]
    running = [r for made in of_cases(pool, left_running, cases).values() for r in made]
    assert len({name for name, operands in running if operands}) > 3
    for name, operands in running:
        assert not any(operand.overtaken for operand in operands), (name, operands)
        # Which adds blocks to each other itself, and so waits for each product.
        assert name != "covariance_kernel" or not operands


def test_the_model_of_shared_memory_is_no_lower_than_triton_s(kernels):
    from resnet_fused.backends.triton import tiles
    from resnet_fused.backends.triton.cost import shared_bytes

    for (build, layer, precision, capability), made in kernels.items():
        if build in (statistics, normalised):
            p = dataclasses.replace(LAYERS[layer], gathered=True)
            config = tiles.heuristic(p, precision, capability)
            (convolution,) = (k for k in made if k.kernel.startswith("conv_"))
            estimate = shared_bytes(p, precision, config, capability)
            assert convolution.shared <= estimate, layer


def test_a_strided_pointwise_gradient_multiplies_no_zeros(kernels):
    made = kernels[data, "shortcut", "bf16", 90]
    assert [k.instruction for k in made] == ["wgmma", "fma", "fma", "fma"]
