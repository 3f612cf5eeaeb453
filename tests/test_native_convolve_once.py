"""A convolution of a training step as one call: BatchNorm before it, moments behind it."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from native_maps import DTYPES

from resnet_fused.backends import _cpu_once, _training_kernels, native
from resnet_fused.testing import gradient_rule

_C = pytest.importorskip("resnet_fused._C")
if _C.cpu_isa() == "none":
    pytest.skip("no kernels for this processor", allow_module_level=True)

LAST = torch.channels_last
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def threads():
    """Leave the threads as they were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Shape(NamedTuple):
    """Of a convolution with square maps, and padding that keeps them where the stride is one."""

    n: int
    c: int
    o: int
    side: int
    kernel: int = 1
    stride: int = 1

    @property
    def geometry(self):
        return (self.stride,) * 2, (self.kernel // 2,) * 2, (1, 1), 1


#: Whole and partial panels and tiles; several blocks of pixels and of images; a stride.
SHAPES = [
    Shape(8, 64, 64, 14),
    Shape(3, 32, 48, 17, 3, 2),
    Shape(2, 96, 40, 9, 3),
    Shape(1, 32, 16, 7),
    Shape(2, 640, 33, 28),
    Shape(9, 64, 64, 30, 3),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def draw(shape, dtype, *, mean=0.5):
    """Return x and a float32 weight, channels_last; the outputs' means are far from zero."""
    g = torch.Generator().manual_seed(shape.c + shape.o)
    x = (torch.randn(shape.n, shape.c, shape.side, shape.side, generator=g) + mean).to(dtype)
    weight = torch.randn(shape.o, shape.c, shape.kernel, shape.kernel, generator=g)
    weight = (weight + 0.3) / (shape.c * shape.kernel**2) ** 0.5
    return x.contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST)


def convolve(x, weight, shape, **more):
    made = _cpu_once.convolve_once(x, weight, *shape.geometry, **more)
    if made is None:
        pytest.skip("torch's own convolution is taken")
    return made


@each_dtype
@each_shape
def test_moments_are_those_of_the_output(dtype, shape):
    y, mean, var = convolve(*draw(shape, dtype), shape, with_stats=True)
    assert_moments(y, mean, var)


def assert_moments(y, mean, var):
    """Each is rounded once, and its sums a few times where they are as large as the deviations.

    Where all values of a channel are one, its variance is what float64 rounds of its mean, squared.
    """
    exact = y.double()
    center, square = exact.mean((0, 2, 3)), exact.var((0, 2, 3), unbiased=False)
    assert ((mean - center).abs() <= 4e-7 * (center.abs() + square.sqrt())).all()
    assert ((var - square).abs() <= 1e-5 * square + (1e-14 * center).square()).all()


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Shape,
        st.integers(1, 5),
        st.sampled_from([16, 32, 64, 96]),
        st.integers(16, 80),
        st.integers(3, 24),
        st.sampled_from([1, 3]),
        st.sampled_from([1, 2]),
    ),
    st.sampled_from(DTYPES),
    st.floats(-300, 300),
)
def test_moments_of_drawn_shapes(shape, dtype, mean):
    made = _cpu_once.convolve_once(*draw(shape, dtype, mean=mean), *shape.geometry, with_stats=True)
    if made is not None:
        assert_moments(*made)


@each_dtype
def test_the_threads_change_no_bit(dtype):
    shape = SHAPES[-1]
    x, weight = draw(shape, dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(convolve(x, weight, shape, with_stats=True))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@each_dtype
@each_shape
@pytest.mark.parametrize("act", [None, "relu"])
def test_what_is_normalised_first_is_bn_act(dtype, shape, act):
    x, weight = draw(shape, dtype)
    vectors = [v.float() for v in torch.rand(4, shape.c, dtype=torch.float64) + 0.2]
    norm = _cpu_once.Norm(*vectors, 1e-5, act)
    made = convolve(x, weight, shape, norm=norm, with_stats=True)
    a = _training_kernels.bn_act(x, *vectors, 1e-5, relu=act == "relu")
    apart = convolve(a, weight, shape, with_stats=True)
    assert all(torch.equal(a, b) for a, b in zip(made, apart, strict=True))


@each_dtype
def test_turned_with_a_residual(dtype):
    shape = Shape(2, 64, 32, 12, 3)
    x, weight = draw(shape, dtype)
    grad = torch.randn(2, 32, 12, 12).to(dtype).contiguous(memory_format=LAST)
    residual = torch.randn_like(x)
    (made,) = convolve(grad, weight, shape, residual=residual, turned=True)
    exact = F.conv_transpose2d(grad.double(), weight.to(dtype).double(), padding=1)
    eager = F.conv_transpose2d(grad, weight.to(dtype), padding=1) + residual
    assert gradient_rule(made, eager, exact + residual.double(), 32 * 9).ok


@each_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channels(dtype, value):
    shape = Shape(2, 64, 64, 14)
    x, weight = draw(shape, dtype)
    weight[5, 0] = value
    y, mean, var = convolve(x, weight, shape, with_stats=True)
    others = [i for i in range(64) if i != 5]
    assert not mean[5].isfinite()
    assert not var[5].isfinite()
    assert mean[others].isfinite().all()
    assert var[others].isfinite().all()
    assert y[:, others].isfinite().all()


#: What an error names, where it is of the kernel that takes the argument.
SAID = {"norm_bias": "bias"}


def test_arguments_are_checked():
    shape = Shape(2, 32, 32, 8)
    x, weight = draw(shape, torch.float32)
    sizes = ("float32", "direct", 2, 8, 8, 32, 32, 1, 1, 1, 1, 0, 0, 1, 1, 1)
    y, vectors = torch.empty_like(x), torch.ones(6, 32)
    size = _C.convolve_once_scratch_bytes(*sizes, 1, True, True)
    work = torch.empty(size + 64, dtype=torch.uint8)
    names = ("dtype", "algorithm", "n", "h", "w", "c", "o", "kh", "kw")
    names += ("sh", "sw", "ph", "pw", "dh", "dw", "groups")
    good = dict(zip(names, sizes, strict=True)) | {
        "x": x.data_ptr(),
        "weight": weight.data_ptr(),
        "residual": 0,
        "y": y.data_ptr(),
        "scratch": work.data_ptr(),
        "scratch_bytes": size,
        "along_o": 32,
        "along_c": 1,
        "along_tap": 1,
        "turned": False,
        "wide": False,
        "threads": 1,
        "eps": 1e-5,
        "relu": True,
    }
    rows = ("norm_mean", "norm_var", "norm_weight", "norm_bias", "mean", "var")
    good |= {name: row.data_ptr() for name, row in zip(rows, vectors, strict=True)}
    _C.convolve_once(**good)
    for name, value in [
        ("x", 0),
        ("y", good["y"] + 2),
        ("weight", 0),
        ("threads", 0),
        ("algorithm", "none"),
        ("scratch", work.data_ptr() + 1),
        ("scratch", good["x"] - good["x"] % 64),
        ("scratch_bytes", size - 1),
        ("norm_var", 0),
        ("norm_bias", good["norm_bias"] + 1),
        ("var", 0),
        ("mean", good["mean"] + 1),
    ]:
        with pytest.raises(ValueError, match=rf"^({name}|{SAID.get(name, name)}): "):
            _C.convolve_once(**good | {name: value})


def test_vectors_are_read_as_they_are():
    """Float32 and contiguous; another is converted."""
    vector = torch.rand(8)
    assert native.as_vector(vector) is vector
    assert torch.equal(native.as_vector(vector.double()), vector)
    strided = torch.rand(16)[::2]
    assert native.as_vector(strided).is_contiguous()
