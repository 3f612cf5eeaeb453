"""The kernels in Triton's interpreter; test_triton_interpreter.py runs this, in a new process."""

import pytest
import torch
from devices import precision_of
from formulas import eager
from hypothesis import given, settings
from paths import PATHS, arguments, assert_right, each_dtype, each_path
from test_drawn import calls

import resnet_fused as rf
from resnet_fused.backends import triton
from resnet_fused.backends.triton import launch, run, tiles
from resnet_fused.backends.triton.shapes import Config, Problem


@pytest.fixture(autouse=True)
def _asked_for():
    # TMA takes float32 as TF32 alone; the interpreter multiplies it as it is.
    with rf.use_backend("triton"), precision_of("tf32"):
        yield


@each_path
@each_dtype
def test_path(path, dtype):
    shape, name = PATHS[path]
    # One dtype goes without the residual: it changes nothing before the epilogue.
    args = arguments(*shape, dtype=dtype, residual=dtype != torch.bfloat16)
    config = Config.parse(name)
    out = run.conv_bn_act(*args, config=config)
    assert_right(args, out)


@each_path
def test_repeatable(path):
    shape, name = PATHS[path]
    args = arguments(*shape, residual=True)
    once, again = (run.conv_bn_act(*args, config=Config.parse(name)) for _ in range(2))
    assert torch.equal(once, again)


@each_path
def test_64_bit_offsets(path, monkeypatch):
    shape, name = PATHS[path]
    args = arguments(*shape, residual=True)
    narrow = run.conv_bn_act(*args, config=Config.parse(name))
    monkeypatch.setattr(launch, "WIDE_FROM", 1)
    assert torch.equal(run.conv_bn_act(*args, config=Config.parse(name)), narrow)


@each_path
def test_not_finite(path):
    """One pixel spoils what it reaches and nothing else; ReLU keeps NaN."""
    shape, name = PATHS[path]
    args = arguments(*shape, residual=True)
    args[0][0, 0, 1, 1] = torch.inf
    args[4][0, 1, 0, 0] = torch.nan
    args[4][0, 2, 0, 0] = -torch.inf
    out, expected = run.conv_bn_act(*args, config=Config.parse(name)), eager("conv_bn_act", args)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


def test_every_candidate_is_right():
    shapes = (((1, 32, 4, 4), 64, 3, 1, 1), ((1, 256, 3, 3), 16), ((1, 8, 5, 5), 8, 3, 1, 1, 1, 8))
    for shape in shapes:
        args = arguments(*shape, dtype=torch.bfloat16)
        found = triton.candidates("conv_bn_act", *args)
        for name, function in found.items():
            assert str(Config.parse(name)) == name
            assert_right(args, function(*args))
    with pytest.raises(ValueError, match=r"m16n16k16w4s2x2g8-tma fetches tiles in a way that"):
        run.conv_bn_act(*args, config=Config.parse("m16n16k16w4s2x2g8-tma"))


def test_the_other_ops_have_one_candidate():
    x = torch.randn(1, 4, 3, 3)
    (one,) = triton.candidates("add_relu", x, x).values()
    assert torch.equal(one(x, x), torch.relu(2 * x))
    (one,) = triton.candidates("bn_apply", x, x[0, :, 0, 0], x[0, :, 0, 0], None, None).values()
    assert one(x, torch.ones(4), torch.zeros(4), None, None).equal(x)


@pytest.mark.parametrize("elements", [(2, 16, 9, 8), (1, 7, 13, 13)])
@each_dtype
def test_pointwise_ops_with_64_bit_offsets(elements, dtype, monkeypatch):
    x, residual = torch.randn(2, *elements).to(dtype)
    scale, shift = torch.randn(2, elements[1])
    narrow = run.bn_apply(x, scale, shift, residual, "relu")
    monkeypatch.setattr(launch, "WIDE_FROM", 1)
    assert torch.equal(run.bn_apply(x, scale, shift, residual, "relu"), narrow)


each_way = pytest.mark.parametrize("name", ["m16n16k16w4s2x1g8", "m16n16k16w4s2x1g8-tma"])


@each_way
def test_addresses_that_are_not_aligned(name):
    args, config = arguments((1, 16, 5, 5), 16, 3, 1, 1, residual=True), Config.parse(name)
    odd = [torch.empty(a.numel() + 1)[1:].view(a.shape).copy_(a) for a in args[:5]]
    assert all(t.data_ptr() % launch.ALIGNMENT for t in odd)
    out = run.conv_bn_act(*odd, *args[5:], config=config)
    assert torch.equal(out, run.conv_bn_act(*args, config=config))


@each_way
def test_storage_that_overlaps(name):
    """Images, channels and pixels that share memory are read as what they are."""
    x, weight, scale, shift, residual, *rest = arguments((3, 16, 5, 5), 16, 3, 1, 1, residual=True)
    overlapping = (
        x[:1].expand_as(x),
        weight[:, :1].expand_as(weight),
        scale[:1].expand_as(scale),
        torch.arange(40.0).as_strided(shift.shape, (2,)),
        residual[:, :, :1].expand_as(residual),
    )
    plain = [t.contiguous() for t in overlapping]
    config = Config.parse(name)
    out = run.conv_bn_act(*overlapping, *rest, config=config)
    assert torch.equal(out, run.conv_bn_act(*plain, *rest, config=config))
    assert_right((*plain, *rest), out)


def test_weights_are_packed_again_when_they_change():
    args = arguments((1, 16, 4, 4), 16, 3, 1, 1)
    before = run.conv_bn_act(*args)
    args[1].mul_(2)
    after = run.conv_bn_act(*args)
    assert not torch.equal(before, after)
    assert_right(args, after)


def test_a_weight_in_channels_last_is_not_copied():
    weight = torch.randn(8, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    assert launch.pack(weight, 1).data_ptr() == weight.data_ptr()
    assert launch.pack(torch.randn(8, 3, 7, 7), 1).shape == (8, 148)  # 147, to 16 bytes


def test_torch_s_flag_decides_on_tf32(monkeypatch):
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for flag, expected in (("tf32", "tf32"), ("ieee", "fp32")):
            conv.fp32_precision = flag
            assert launch.precision(torch.float32) == expected
            args = arguments((1, 16, 4, 4), 16, 3, 1, 1)
            assert_right(args, run.conv_bn_act(*args))
    finally:
        conv.fp32_precision = before
    assert launch.precision(torch.bfloat16) == "bf16"


@settings(derandomize=True, deadline=None, max_examples=25)
@given(args=calls())
def test_drawn_geometry(args):
    if args[0].dtype == torch.float64:
        args = tuple(a.float() if isinstance(a, torch.Tensor) else a for a in args)
    assert_right(args, run.conv_bn_act(*args))


@settings(derandomize=True, deadline=None, max_examples=15)
@given(args=calls())
def test_drawn_candidates(args):
    x, weight, _, _, residual, *geometry, _ = args
    if x.numel() == 0 or x.dtype == torch.float64:
        return
    stride, padding, dilation, groups = geometry
    problem = Problem.of(
        x.shape, weight.shape, stride, padding, dilation, groups, residual is not None
    )
    configs = tiles.candidates(problem, launch.precision(x.dtype), 90)
    assert_right(args, run.conv_bn_act(*args, config=configs[-1]))
