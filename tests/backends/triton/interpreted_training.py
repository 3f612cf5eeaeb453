"""The kernels of training in Triton's interpreter; test_triton_interpreter.py runs this.

Every op on its own samples, which leave blocks unfilled on every side; then what they do not show:
several levels of merging, 64-bit offsets, values that are not finite, means far from zero.
"""

import copy

import pytest
import torch
from devices import precision_of
from formulas import call
from hypothesis import given, settings
from nets import SmallNet
from test_drawn import calls
from test_pointwise import small_gradients
from test_training_ops import fresh, peak, rounded_to, terms

import resnet_fused as rf
from resnet_fused.backends import triton
from resnet_fused.backends.triton import bn_launch, covariance_launch, gradients, launch, passes
from resnet_fused.backends.triton.shapes import Config
from resnet_fused.ops import TRAINING
from resnet_fused.testing import gradient_metrics, max_error, to_float64, two_x_rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = [name for name, op in TRAINING.items() if not op.mutates]
#: Those with several ways to run.
SEVERAL = ("conv_bn_stats", "bn_act_conv_bn_stats", "conv_backward_data")
each_op = pytest.mark.parametrize("op", OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _asked_for():
    with rf.use_backend("triton"):
        yield


def results(op: str, args: tuple) -> tuple:
    out = call(op, fresh(args))
    return out if isinstance(out, tuple) else (out,)


def references(op: str, args: tuple) -> tuple:
    out = TRAINING[op].reference(*args)
    return out if isinstance(out, tuple) else (out,)


def assert_right(op: str, args: tuple, outs: tuple) -> None:
    plains, oracles = references(op, args), references(op, to_float64(args))
    for out, plain, oracle in zip(outs, plains, oracles, strict=True):
        assert (out.shape, out.dtype) == (plain.shape, plain.dtype)
        assert out.stride() == plain.stride() or not out.numel()
        if not out.is_floating_point() or oracle.shape != plain.shape:  # a copy, in 16 bits
            assert torch.equal(out, plain)
            continue
        check = two_x_rule(out, plain, oracle, terms(args), rounded_to(op, args))
        slack = 0.0
        if out.dim() == 1 and out.numel():  # sums cancel: the size of their terms counts
            slack = torch.finfo(torch.float32).eps * peak(args) * terms(args) ** 0.5
        assert check.error <= check.allowed + slack, check


def same(a: tuple, b: tuple) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


@each_op
def test_result(op):
    """The dtypes take turns over the samples, so that each meets most branches."""
    every = 6 if "pool" in op else 3  # the pools' samples are many
    for first, dtype in enumerate(DTYPES):
        for args in list(TRAINING[op].samples("cpu", dtype))[first::every]:
            outs = results(op, args)
            assert_right(op, args, outs)


@each_op
def test_every_candidate(op):
    """One way, or for convolutions tiles; of every sample that has several, a few of them."""
    ways = 0
    for i, args in enumerate(TRAINING[op].samples("cpu", torch.float16)):
        found = triton.candidates(op, *args)
        if op not in SEVERAL:
            assert found == {"default": getattr(triton, op)}
            break
        for name in list(found)[i % 3 :: 3]:
            outs = found[name](*args)
            assert_right(op, args, outs if isinstance(outs, tuple) else (outs,))
            ways += 1
    assert (ways > 4) == (op in SEVERAL)


def maps(*shapes: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    drawn = (torch.randn(shape).to(dtype) for shape in shapes)
    return [t.contiguous(memory_format=torch.channels_last) for t in drawn]


@each_dtype
@pytest.mark.parametrize(
    ("shape", "o", "kernel", "stride"),
    [((2, 64, 8, 8), 96, 1, 1), ((4, 32, 8, 4), 64, 3, 1), ((2, 64, 16, 16), 40, 1, 2)],
)
def test_statistics_of_tiles_that_tma_fetches(shape, o, kernel, stride, dtype, monkeypatch):
    """No box reaches beyond these maps, means are far from zero, tiles merge in two levels."""
    monkeypatch.setattr(passes, "MERGED", 2)
    x, weight = maps(shape, (o, shape[1], kernel, kernel), dtype=dtype)
    args = (x + 3, weight / kernel, (stride,) * 2, (kernel // 2,) * 2, (1, 1), 1)
    with precision_of("tf32"):
        found = triton.candidates("conv_bn_stats", *args)
        fetched = [name for name in found if name.endswith("-tma")]
        assert fetched
        for name in fetched:
            outs = found[name](*args)
            assert_right("conv_bn_stats", args, outs)
            assert same(outs, found[name](*args))


@each_dtype
@pytest.mark.parametrize(
    ("weight", "padding", "dilation", "groups"),
    [
        ((24, 16, 3, 3), (1, 1), (1, 1), 1),
        ((16, 8, 3, 2), (2, 0), (1, 2), 2),
        ((40, 24, 1, 1), (0, 0), (1, 1), 1),
        ((6, 1, 3, 3), (1, 1), (1, 1), 3),
    ],
)
def test_a_data_gradient_as_a_convolution(weight, padding, dilation, groups, dtype):
    given, filters = maps((2, weight[1] * groups, 7, 6), weight, dtype=dtype)
    geometry = ((1, 1), padding, dilation, groups)
    out = torch.nn.functional.conv2d(given, filters, None, *geometry)
    (grad,) = maps(out.shape, dtype=dtype)
    for residual in (None, torch.randn_like(given)):
        args = (grad, filters, list(given.shape), *geometry, residual)
        found = triton.candidates("conv_backward_data", *args)
        assert len(found) > 1
        for run in found.values():
            assert_right("conv_backward_data", args, (run(*args),))


@each_op
def test_64_bit_offsets(op, monkeypatch):
    args = next(iter(TRAINING[op].samples("cpu", torch.float16)))
    narrow = results(op, args)
    monkeypatch.setattr(launch, "WIDE_FROM", 1)
    assert same(results(op, args), narrow)


#: Operands whose partner is padded: in torch, too, the algorithm decides if they meet its zeros.
MEETS_PADDING = {
    ("conv_backward_weight", 0), ("bn_act_conv_backward_weight", 0), ("conv_backward_data", 1),
    ("bn_act_conv_backward_data", 1), ("conv_bn_stats", 1), ("bn_act_conv_backward", 0),
    ("bn_act_conv_backward", 1), ("relu_conv_backward_data", 1),
}  # fmt: skip


@each_op
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's own arithmetic
def test_not_finite(op):
    """One value that is not finite spoils what it reaches and nothing else."""
    args = [a for a in TRAINING[op].samples("cpu", torch.float32) if a[0].numel() > 64][-1]
    for place, value in ((0, torch.nan), (0, torch.inf), (1, -torch.inf)):
        given = fresh(args)
        if place == len(given):
            break
        if (op, place) in MEETS_PADDING or not given[place].is_floating_point():
            continue
        given[place].view(-1)[given[place].numel() // 2] = value
        for out, plain in zip(results(op, given), references(op, given), strict=True):
            assert torch.equal(out.isfinite(), plain.isfinite())
            # What follows from sums that are infinite is either, by the order of the arithmetic.
            sums = ("bn_act_backward", "bn_act_conv_backward_data", "bn_act_conv_backward")
            if op not in (*sums, "channel_covariance") and "pointwise" not in op:
                assert torch.equal(out.isnan(), plain.isnan())


def reduction(shape: tuple, dtype: torch.dtype) -> tuple:
    """bn_act_backward_reduce's arguments."""
    grad, x = (torch.randn(shape).to(dtype) for _ in range(2))
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    gamma, beta = torch.randn(2, shape[1])
    return grad, x, mean, var, gamma, beta, None, 1e-5, "relu", True


def test_sums_merged_in_several_levels(monkeypatch):
    args = reduction((2, 70, 14, 9), torch.bfloat16)
    whole = results("bn_act_backward_reduce", args)
    monkeypatch.setattr(passes, "MERGED", 2)
    outs = results("bn_act_backward_reduce", args)
    assert_right("bn_act_backward_reduce", args, outs)
    assert torch.equal(outs[2], whole[2])


@pytest.mark.parametrize(("offset", "merged"), [(0.0, 128), (1e4, 2)])
def test_statistics_of_a_map(offset, merged, monkeypatch):
    """Means ten thousand deviations away, and parts merged in one level or in several."""
    monkeypatch.setattr(passes, "MERGED", merged)
    x = torch.randn(5, 66, 11, 13) * (torch.rand(66, 1, 1) + 0.5) + offset
    launches, mean, var = bn_launch.bn_stats(x)
    for step in launches:
        step.run()
    assert len(launches) == (2 if merged == 128 else 4)
    exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), exact[0], rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_channel_with_one_infinity():
    x = torch.randn(2, 3, 5, 5)
    x[0, 1, 2, 2] = torch.inf
    launches, mean, var = bn_launch.bn_stats(x)
    for step in launches:
        step.run()
    exact = torch.var_mean(x, (0, 2, 3), correction=0)
    assert torch.equal(mean.isnan(), exact[1].isnan())
    assert torch.equal(var.isnan(), exact[0].isnan())


@each_dtype
def test_the_mask_is_the_forward_s(dtype):
    """Where the output was above zero the gradient passes, though the mask is made again."""
    grad, x, *vectors, _, eps, act, masked = reduction((2, 40, 9, 9), dtype)
    out, _ = torch.ops.resnet_fused.bn_act(x, *vectors, None, eps, act)
    args = (torch.ones_like(grad), x, *vectors, None, eps, act, masked)
    assert torch.equal(results("bn_act_backward_reduce", args)[2] > 0, out > 0)


def test_rounding_is_to_the_nearest():
    """Also here, where the interpreter's own would be towards zero."""
    x = torch.randn(1, 16, 9, 9)
    zeros, ones = torch.zeros(16), torch.ones(16)
    residual = (x - x.bfloat16().float()).bfloat16()
    out, _ = torch.ops.resnet_fused.bn_act(
        x.bfloat16(), zeros, ones, None, None, residual, 0.0, None
    )
    exact = x.bfloat16().float() + residual.float()
    assert max_error(out, exact.bfloat16()) == 0


# --- convolutions --------------------------------------------------------------------------------


SAME = ((1, 1), (1, 1), (1, 1), 1)


def single(t):
    return t.float() if t.dtype == torch.float64 else t


@settings(derandomize=True, deadline=None, max_examples=6)
@given(args=calls())
def test_drawn_convolutions(args):
    """Any geometry and layout, groups and empty batches too."""
    x, weight, *_, stride, padding, dilation, groups, act = args
    x, weight, geometry = single(x), single(weight), (stride, padding, dilation, groups)
    var, mean = torch.ones(2, x.shape[1])
    normalised = (x, mean, var, None, None, weight, 1e-5, act, *geometry)
    y, *_ = results("bn_act_conv_bn_stats", normalised)
    if y.numel() > y.shape[1]:
        assert_right(
            "bn_act_conv_bn_stats", normalised, results("bn_act_conv_bn_stats", normalised)
        )
    grad = torch.randn(y.shape).to(x.dtype)
    last = (*geometry, not weight.is_contiguous(), weight.dtype)
    vectors = (mean, var, None, None)
    for op, drawn in {
        "conv_backward_data": (grad, weight, list(x.shape), *geometry, x),
        "conv_backward_weight": (grad, x, list(weight.shape), *last),
        "bn_act_conv_backward_data": (
            grad, weight, x, *vectors, 1e-5, act, *geometry, (True, False, False)
        ),
        "bn_act_conv_backward_weight": (grad, x, *vectors, list(weight.shape), 1e-5, act, *last),
    }.items():  # fmt: skip
        assert_right(op, drawn, results(op, drawn))


def test_a_fused_model_trains():
    """One step of a fused network, which asks for the backend by name, beside torch's own."""
    model = SmallNet().train()
    fused, oracle = rf.fuse(model), copy.deepcopy(model).double()
    x = torch.randn(2, 3, 20, 20)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused(x).square().sum().backward()
    called = {event.key for event in profile.key_averages()}
    # SyncBatchNorm alone calls the parts of a backward, to join their sums between; and where one
    # side of a convolution is frozen, the other is computed by itself.
    parts = {"bn_act_backward_reduce", "bn_act_backward_apply", "max_pool_backward"}
    parts |= {"bn_act_conv_backward_data", "bn_act_conv_backward_weight"}
    # A block's end as one op has to be measured first.
    parts |= {op for op in TRAINING if "pointwise" in op or "covariance" in op}
    parts.add("relu_conv_backward_data")
    assert not {f"resnet_fused::{op}" for op in TRAINING.keys() - parts} - called
    model(x).square().sum().backward()
    oracle(x.double()).square().sum().backward()
    off = [
        sum(1 - gradient_metrics(p.grad, q.grad).cosine for p, q in pairs)
        for pairs in (zip(m.parameters(), oracle.parameters(), strict=True) for m in (fused, model))
    ]
    assert off[0] <= 2 * off[1] + 1e-6
    for ours, plain, exact in zip(fused.buffers(), model.buffers(), oracle.buffers(), strict=True):
        if ours.is_floating_point():
            assert two_x_rule(ours, plain, exact, x.numel()).ok
        assert ours.is_floating_point() or torch.equal(ours, exact)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_padding_stays_zero_behind_the_activation():
    """relu(BN(0)) is 1 here; a tile that normalised the padding would add it at the border."""
    x, weight = -torch.ones(2, 16, 4, 4), torch.ones(16, 16, 3, 3)
    zeros, ones = torch.zeros(16), torch.ones(16)
    y, *_ = torch.ops.resnet_fused.bn_act_conv_bn_stats(
        x, zeros, ones, ones, ones, weight, 0.0, "relu", *SAME
    )
    assert torch.equal(y, torch.zeros(2, 16, 4, 4))
    (grad_weight,) = results(
        "bn_act_conv_backward_weight",
        (x, x, zeros, ones, ones, ones, [16, 16, 3, 3], 0.0, "relu", *SAME, True, x.dtype),
    )
    assert torch.equal(grad_weight, torch.zeros(16, 16, 3, 3))


@each_dtype
@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_of_an_activation_passes_the_forward_s_mask(dtype, stride):
    """By a 1x1 of ones, where the gradient is one, a channel's bias gets how many passed."""
    _, x, *vectors, _, eps, act, _ = reduction((2, 40, 9, 9), dtype)
    weight, geometry = torch.ones(1, 40, 1, 1).to(dtype), ((stride, stride), (0, 0), (1, 1), 1)
    passed = torch.ops.resnet_fused.bn_act(x, *vectors, None, eps, act)[0] > 0
    grad = torch.ones(2, 1, *passed[..., ::stride, ::stride].shape[2:]).to(dtype)
    args = (grad, weight, x, *vectors, eps, act, *geometry, (False, True, True))
    _, _, grad_bias = results("bn_act_conv_backward_data", args)
    assert torch.equal(grad_bias, passed[..., ::stride, ::stride].sum((0, 2, 3)).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_weight_s_gradient_in_parts(dtype, monkeypatch):
    grad, x = (torch.randn(2, 16, 6, 6).bfloat16() for _ in range(2))
    config = Config(16, 16, 16, 4, 2, split_k=4)
    monkeypatch.setattr(gradients, "weight_config", lambda *_: config)
    vectors = (torch.randn(16), torch.rand(16), torch.randn(16), torch.randn(16))
    for op, args in {
        "conv_backward_weight": (grad, x, [16, 16, 3, 3], *SAME, True, dtype),
        "bn_act_conv_backward_weight": (
            grad, x, *vectors, [16, 16, 3, 3], 1e-5, "relu", *SAME, True, dtype
        ),
    }.items():  # fmt: skip
        out = results(op, args)
        assert_right(op, args, out)
        assert torch.equal(out[0], results(op, args)[0])


@each_dtype
@pytest.mark.parametrize("shape", [(3, 200, 5, 9), (16, 24, 14, 18), (1, 136, 3, 3)], ids=str)
def test_covariance_of_several_tiles_and_parts(shape, dtype, monkeypatch):
    """Tiles left of the diagonal are mirror images; parts are merged a few at a time."""
    (x,) = maps(shape, dtype=dtype)
    (outs,) = [results("channel_covariance", (x,))]
    assert_right("channel_covariance", (x,), outs)
    assert torch.equal(outs[1], outs[1].t())
    monkeypatch.setattr(launch, "WIDE_FROM", 1)
    assert same(results("channel_covariance", (x,)), outs)
    pixels = shape[0] * shape[2] * shape[3]
    cut = covariance_launch.Cut.of(pixels, shape[1], x.element_size())
    assert (cut.parts - 1) * cut.steps * cut.block_k < pixels
    assert pixels <= cut.parts * cut.steps * cut.block_k


@each_dtype
def test_covariance_reads_only_the_sums_that_were_taken(dtype):
    """In few parts a merging program has rows of several tiles, also of those left of it."""
    (x,) = maps((1, 200, 3, 3), dtype=dtype)
    (products, merge), _, cov = covariance_launch.channel_covariance(x, 90)
    products.arguments["parts_ptr"].fill_(float("nan"))
    products.run()
    assert merge.arguments["BLOCK_M"] > 200
    cov.zero_()
    # Some programs alone: others would write over what is wrong.
    merge._replace(grid=(merge.grid[0], 1, 1)).run()
    assert cov.isfinite().all()
    merge.run()
    assert cov.isfinite().all()
    assert cov.ne(0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_covariance_keeps_what_is_not_finite(value):
    (x,) = maps((2, 24, 5, 5), dtype=torch.bfloat16)
    x[1, 3, 2, 2] = value
    mean, cov = results("channel_covariance", (x,))
    assert not cov[3].isfinite().any()
    assert not cov[:, 3].isfinite().any()
    assert (~cov.isfinite()).sum() == 2 * 24 - 1
    assert not mean[:3].isnan().any()


@pytest.mark.parametrize("size", [0.0, 1e3, 1e-8])
def test_what_turns_x_does_not_vanish_in_float16(size):
    args = small_gradients(size)
    assert_right("pointwise_bn_gradients", args, results("pointwise_bn_gradients", args))


@each_dtype
def test_weights_wider_than_a_block(dtype):
    """More input channels than a program takes at once, more outputs than one block of a walk."""
    (x,) = maps((2, 300, 4, 4), dtype=dtype)
    weight = (torch.randn(70, 300, 1, 1) / 17).to(dtype)
    moments = references("channel_covariance", (x,))
    stats = (weight, *moments, torch.randn(70), None, 1e-5)
    assert_right("pointwise_bn_stats", stats, results("pointwise_bn_stats", stats))
    mean, var, *_ = references("pointwise_bn_stats", stats)
    product, sum_g = torch.randn(70, 300, 1, 1), torch.randn(70)
    args = (weight, product, sum_g, mean, var, *moments, None, 1e-5, 32, dtype)
    assert_right("pointwise_bn_gradients", args, results("pointwise_bn_gradients", args))
