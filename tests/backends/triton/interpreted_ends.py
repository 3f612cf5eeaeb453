"""The stem and the head in Triton's interpreter; test_triton_interpreter.py runs this."""

import pytest
import torch
from ends import STEMS, each_head, each_stem, head_arguments, stem_arguments
from formulas import eager
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nets import ConvBnRelu, assert_same_model, image
from paths import DTYPES, assert_right, each_dtype
from torch import nn

import resnet_fused as rf
from resnet_fused.backends import triton
from resnet_fused.backends.triton import launch, launch_ends, run
from resnet_fused.backends.triton.stem import Stem, StemConfig
from resnet_fused.engine.capture import capture
from resnet_fused.engine.merge import merge

STEM, HEAD = "conv_bn_act_max_pool", "avg_pool_linear"


@pytest.fixture(autouse=True)
def _asked_for():
    torch.manual_seed(0)
    with rf.use_backend("triton"):
        yield


def stem(path: str, **options) -> tuple[tuple, StemConfig]:
    shape, name = STEMS[path]
    return stem_arguments(*shape, **options), StemConfig.parse(name)


@each_stem
def test_stem(path):
    dtype = DTYPES[list(STEMS).index(path) % len(DTYPES)]  # all three would take long here
    args, config = stem(path, dtype=dtype)
    assert_right(args, run.conv_bn_act_max_pool(*args, config=config), STEM)


@each_dtype
def test_stem_in_each_dtype(dtype):
    args, config = stem("16-byte rows", dtype=dtype)
    assert_right(args, run.conv_bn_act_max_pool(*args, config=config), STEM)


@pytest.mark.parametrize("path", ["16-byte rows", "windows apart", "several tiles"])
def test_stem_alone_with_64_bit_offsets(path, monkeypatch):
    """Without scale, shift and ReLU, so that negative maxima come out."""
    args, config = stem(path, act=None, vectors=False)
    narrow = run.conv_bn_act_max_pool(*args, config=config)
    assert_right(args, narrow, STEM)
    monkeypatch.setattr(launch, "WIDE_FROM", 1)
    assert torch.equal(run.conv_bn_act_max_pool(*args, config=config), narrow)


@each_stem
def test_stem_not_finite(path):
    """A value reaches the windows whose taps it meets and no other, though rows are read wider."""
    args, config = stem(path)
    args[0][0, 0, 0, 0], args[0][0, 0, -1, -1] = torch.nan, torch.inf
    out, expected = run.conv_bn_act_max_pool(*args, config=config), eager(STEM, args)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert out.isnan().any()


def test_rows_of_the_stem_are_read_aligned():
    """Else the tests above would say nothing about the elements beside the taps."""
    shape, name = STEMS["the stem"]
    args, config = stem_arguments(*shape, dtype=torch.bfloat16), StemConfig.parse(name)
    problem = Stem.of(args[0].shape, args[1].shape, *args[4:7], *args[9:])
    assert problem.run("bf16", config.block_k) == (8, 32)
    wide = launch_ends.pack_stem(args[1], 1, problem.run("bf16", 32))
    rows = args[1].permute(0, 2, 3, 1).flatten(2)
    for lead in (0, 5, 7):
        assert torch.equal(wide[lead, :, :, lead : lead + 21], rows)
        assert wide[lead].count_nonzero() == rows.count_nonzero()


def test_every_candidate_of_a_stem():
    args = stem_arguments((1, 3, 5, 5), 8, 3, 2, 1, 1, 3, 2, 1, dtype=torch.bfloat16)
    found = triton.candidates(STEM, *args)
    assert len(found) > 1
    for name, function in found.items():
        assert str(StemConfig.parse(name)) == name
        assert_right(args, function(*args), STEM)


def test_addresses_and_layouts_of_a_stem():
    args = stem("one pixel, the rest padding")[0]
    expected = run.conv_bn_act_max_pool(*args)
    odd = [torch.empty(a.numel() + 1)[1:].view(a.shape).copy_(a) for a in args[:4]]
    assert all(t.data_ptr() % launch.ALIGNMENT for t in odd)
    assert torch.equal(run.conv_bn_act_max_pool(*odd, *args[4:]), expected)
    turned = [a.transpose(0, -1).contiguous().transpose(0, -1) for a in args[:4]]
    assert torch.equal(run.conv_bn_act_max_pool(*turned, *args[4:]), expected)


def test_storage_of_a_stem_that_overlaps():
    """Images, channels and pixels that share memory are read as what they are."""
    x, weight, scale, _, *rest = stem("16-byte rows")[0]
    overlapping = (
        x[:, :, :1].expand_as(x),
        weight[:1].expand_as(weight),
        scale[:1].expand_as(scale),
        torch.arange(12.0).as_strided(scale.shape, (2,)),
    )
    plain = [t.contiguous() for t in overlapping]
    out = run.conv_bn_act_max_pool(*overlapping, *rest)
    assert torch.equal(out, run.conv_bn_act_max_pool(*plain, *rest))
    assert_right((*plain, *rest), out, STEM)


def test_addresses_and_storage_of_a_head():
    x, weight, bias = head_arguments((2, 16, 3, 2), 10)
    expected = run.avg_pool_linear(x, weight, bias)
    odd = [torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in (x, weight, bias)]
    assert all(t.data_ptr() % launch.ALIGNMENT for t in odd)
    assert torch.equal(run.avg_pool_linear(*odd), expected)
    overlapping = (x[:1].expand_as(x), weight[:, :1].expand_as(weight), bias[:1].expand_as(bias))
    out = run.avg_pool_linear(*overlapping)
    assert_right(tuple(t.contiguous() for t in overlapping), out, HEAD)


def test_a_stem_s_weight_is_packed_again_when_it_changes():
    args = stem("one pixel, the rest padding")[0]
    run.conv_bn_act_max_pool(*args)
    args[1].mul_(2)
    assert_right(args, run.conv_bn_act_max_pool(*args), STEM)


def test_what_the_stem_does_not_take():
    args = list(stem_arguments((1, 4, 6, 6), 4, 3, 1, 1, 1, 2, 2, 0))
    args[1], args[7] = args[1][:, :2], 2
    (reason,) = [v.reason for v in rf.explain(STEM, *args) if v.name == "triton"]
    assert reason == "takes this op with groups of 1, got 2"


@st.composite
def stems(draw) -> tuple:
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, size, stride, dilation = draw(pairs), draw(pairs), draw(pairs), draw(pairs)
    pads = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    pool_pads = tuple(draw(st.integers(0, s // 2)) for s in size)
    x = (draw(st.integers(1, 2)), draw(st.integers(1, 4)), *draw(pairs), *draw(pairs))
    x = (x[0], x[1], x[2] + x[4] + 2, x[3] + x[5] + 2)
    shape = (x, draw(st.integers(1, 5)), kernel, stride, pads, dilation, size, draw(pairs))
    problem = Stem.of(x, (1, x[1], *kernel), stride, pads, dilation, size, shape[-1], pool_pads)
    assume(min(problem.conv.out_size) >= 1 and min(problem.out_size) >= 1)
    return stem_arguments(*shape, pool_pads, act=draw(st.sampled_from((None, "relu"))))


@settings(derandomize=True, deadline=None, max_examples=8)
@given(args=stems())
def test_drawn_stems(args):
    assert_right(args, run.conv_bn_act_max_pool(*args), STEM)


@each_head
@each_dtype
def test_head(shape, dtype, monkeypatch):
    args = head_arguments(*shape, bias=dtype != torch.float16, dtype=dtype)
    out = run.avg_pool_linear(*args)
    assert_right(args, out, HEAD)
    monkeypatch.setattr(launch, "WIDE_FROM", 1)
    assert torch.equal(run.avg_pool_linear(*args), out)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_head_not_finite(value):
    args = head_arguments((3, 5, 4, 5), 4)
    args[0][1, 2, 0, 0] = value
    args[1][:, 2].abs_()
    out, expected = run.avg_pool_linear(*args), eager(HEAD, args)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert out[[0, 2]].isfinite().all()
    assert not out[1].isfinite().any()


def test_torch_s_flag_for_matrix_products_decides_on_tf32_in_the_head():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for flag, expected in (("tf32", "tf32"), ("ieee", "ieee")):
            matmul.fp32_precision = flag
            x, weight, _ = head_arguments((1, 16, 2, 2), 3)
            _, linear = launch_ends.head(x, weight, None, torch.empty(1, 3), 90)
            assert linear.arguments["PRECISION"] == expected
    finally:
        matmul.fp32_precision = before


class Net(nn.Module):
    """A stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = ConvBnRelu(3, 8), nn.MaxPool2d(3, 2, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        y = nn.functional.adaptive_avg_pool2d(self.pool(self.stem(x)), 1)
        return self.fc(torch.flatten(y, 1))


def test_a_frozen_network_runs_its_ends_as_one_call_each():
    model, x = Net().eval(), image(1, 3, 2, 2)
    with torch.no_grad():
        calls = merge(capture(rf.fuse(model), x)).calls
    assert [call.target.name().split("::")[1] for call in calls] == [STEM, HEAD]
    assert_same_model(rf.freeze(model, x), model, x, reduced=8 * 9)
