"""Two convolutions in one kernel, in Triton's interpreter; run by test_triton_interpreter.py."""

import pytest
import torch
from formulas import call, declined, eager
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from paths import assert_right

import resnet_fused as rf
from resnet_fused.backends import triton
from resnet_fused.backends.triton import launch, run
from resnet_fused.backends.triton.shapes import Config
from resnet_fused.ops.conv_bn_act_conv_bn_act import output_shape

PAIR = "conv_bn_act_conv_bn_act"
#: name: (x, channels between, O, kernel, stride, padding, dilation), config.
PATHS = {
    "a bottleneck's": (((2, 16, 5, 7), 16, 64, 3, 1, 1, 1), "m16n32k16w4s2x1g8"),
    "channels of no whole tile": (((1, 20, 5, 7), 24, 9, 3, 1, 1, 1), "m32n16k16w4s2x1g8"),
    "two blocks of K": (((1, 40, 4, 3), 16, 20, 3, 1, 1, 1), "m16n16k32w4s2x1g8"),
    "stride": (((2, 16, 9, 7), 32, 40, 3, 2, 1, 1), "m16n16k16w4s2x1g8"),
    "dilation": (((1, 16, 6, 8), 8, 16, 3, 1, 2, 2), "m16n16k16w4s2x1g8"),
    "pointwise": (((1, 24, 5, 7), 16, 20, 1, 1, 0, 1), "m16n16k16w4s2x1g8"),
    "rectangular": (((1, 16, 7, 6), 16, 8, (3, 1), (1, 2), (1, 0), 1), "m16n16k16w4s2x1g8"),
    "as many between as can be": (((1, 16, 3, 3), 128, 32, 3, 1, 1, 1), "m16n32k16w4s2x1g8"),
}
each_path = pytest.mark.parametrize("path", PATHS)


@pytest.fixture(autouse=True)
def _asked_for():
    with rf.use_backend("triton"):
        yield


def two(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def arguments(
    x, between, o, kernel, stride, padding, dilation,
    *, dtype=torch.float16, residual=True, acts=("relu", "relu"),
) -> tuple:  # fmt: skip
    def draw(*shape):
        t = torch.randn(shape).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t

    geometry = tuple(map(two, (stride, padding, dilation)))
    weight, weight2 = draw(between, x[1], *two(kernel)), draw(o, between, 1, 1)
    out = output_shape(x, weight.shape, weight2.shape, *geometry)
    vectors = (*torch.randn(2, between), weight2, *torch.randn(2, o))
    return (draw(*x), weight, *vectors, draw(*out) if residual else None, *geometry, *acts)


def ran(args: tuple, name: str) -> torch.Tensor:
    return run.conv_bn_act_conv_bn_act(*args, config=Config.parse(name))


@each_path
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_path(path, dtype):
    shape, name = PATHS[path]
    args = arguments(*shape, dtype=dtype, residual=dtype == torch.float16)
    out = ran(args, name)
    assert_right(args, out, PAIR)
    assert torch.equal(ran(args, name), out), "not repeatable"


@pytest.mark.parametrize("acts", [(None, None), ("relu", None), (None, "relu")])
def test_activations(acts):
    shape, name = PATHS["channels of no whole tile"]
    args = arguments(*shape, acts=acts)
    assert_right(args, ran(args, name), PAIR)


@pytest.mark.parametrize("path", ["channels of no whole tile", "stride"])
def test_64_bit_offsets(path, monkeypatch):
    shape, name = PATHS[path]
    args = arguments(*shape)
    narrow = ran(args, name)
    monkeypatch.setattr(launch, "WIDE_FROM", 1)
    assert torch.equal(ran(args, name), narrow)


@pytest.mark.parametrize("path", ["channels of no whole tile", "two blocks of K", "dilation"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(path, value):
    """A channel between that is not there stays 0: 0 · inf would reach every output channel."""
    shape, name = PATHS[path]
    args = arguments(*shape, acts=(None, "relu"))
    args[0][0, 0, 1, 1] = value
    args[7][0, 1, 0, 0] = torch.nan
    args[7][0, 2, 0, 0] = -torch.inf
    out, expected = ran(args, name), eager(PAIR, args)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


def test_every_candidate_is_right():
    for shape in (((1, 32, 4, 4), 64, 256, 3, 1, 1, 1), ((2, 16, 5, 5), 16, 48, 3, 2, 1, 1)):
        args = arguments(*shape, dtype=torch.bfloat16)
        found = triton.candidates(PAIR, *args)
        assert len(found) > 1
        for name, function in found.items():
            assert str(Config.parse(name)) == name
            assert_right(args, function(*args), PAIR)


def test_an_empty_batch():
    args = arguments((0, 16, 5, 5), 16, 24, 3, 1, 1, 1)
    assert call(PAIR, args).shape == (0, 24, 5, 5)


def test_addresses_that_are_not_aligned():
    args = arguments((1, 16, 5, 5), 16, 24, 3, 1, 1, 1)
    odd = [torch.empty(a.numel() + 1, dtype=a.dtype)[1:].view(a.shape).copy_(a) for a in args[:8]]
    assert all(t.data_ptr() % launch.ALIGNMENT for t in odd)
    assert torch.equal(call(PAIR, (*odd, *args[8:])), call(PAIR, args))


def test_storage_that_overlaps():
    x, *args = arguments((2, 16, 5, 5), 16, 24, 3, 1, 1, 1)
    weight, scale, shift, weight2, *rest = args
    overlapping = (
        x[:1].expand_as(x), weight[:, :1].expand_as(weight), scale[:1].expand_as(scale), shift,
        weight2[:1].expand_as(weight2),
    )  # fmt: skip
    plain = [t.contiguous() for t in overlapping]
    out = call(PAIR, (*overlapping, *rest))
    assert torch.equal(out, call(PAIR, (*plain, *rest)))
    assert_right((*plain, *rest), out, PAIR)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        (((1, 16, 5, 5), 16, 24, 3, 1, 1, 1), torch.float32, "in bfloat16 and float16, x is torch"),
        (((1, 15, 5, 5), 16, 24, 3, 1, 1, 1), torch.float16, "from 16 channels on, x has 15"),
        (((1, 16, 5, 5), 129, 8, 3, 1, 1, 1), torch.float16, "at most 128 channels between two"),
    ],
)
def test_what_it_does_not_take(shape, dtype, reason):
    args = arguments(*shape, dtype=dtype)
    assert reason in declined(PAIR, "triton", args)
    with pytest.raises(RuntimeError, match=reason):
        call(PAIR, args)


@st.composite
def calls(draw) -> tuple:
    """Arguments that the kernel takes: any geometry, layout, and optional ones left out."""
    shape = (draw(st.integers(1, 2)), draw(st.integers(16, 40)))
    size, kernel = ([draw(st.integers(1, most)) for _ in range(2)] for most in (8, 3))
    stride, dilation = ([draw(st.integers(1, 2)) for _ in range(2)] for _ in range(2))
    padding = [draw(st.integers(0, 2)) for _ in range(2)]
    between, o = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    weights = ((between, shape[1], *kernel), (o, between, 1, 1))
    assume(min(output_shape((*shape, *size), *weights, stride, padding, dilation)[2:]) >= 1)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    args = arguments(
        (*shape, *size), between, o, kernel, stride, padding, dilation,
        dtype=draw(st.sampled_from((torch.float16, torch.bfloat16))), residual=draw(st.booleans()),
        acts=[draw(st.sampled_from((None, "relu"))) for _ in range(2)],
    )  # fmt: skip
    contiguous = draw(st.booleans())
    dropped = {i for i in (2, 3, 5, 6) if draw(st.booleans())}
    return tuple(
        None if i in dropped else a.contiguous() if contiguous and torch.is_tensor(a) else a
        for i, a in enumerate(args)
    )


@settings(derandomize=True, deadline=None, max_examples=12)
@given(args=calls())
def test_drawn(args):
    assert_right(args, call(PAIR, args), PAIR)
