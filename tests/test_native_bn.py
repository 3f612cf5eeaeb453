"""BatchNorm's forward kernels: each against float64 on every instruction set."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_maps import (
    ISAS,
    each_run,
    each_shape,
    is_channels_last,
    maps,
    per_channel,
    rule,
    vectors,
)

from resnet_fused.backends import _training_kernels as kernels
from resnet_fused.testing import max_error

_C = pytest.importorskip("resnet_fused._C")


drawn_shape = st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9))
drawn = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def _as_it_was():
    """Leave the instruction set and the threads as they were."""
    isa, threads = _C.cpu_isa(), torch.get_num_threads()
    yield
    _C.set_cpu_isa(isa)
    torch.set_num_threads(threads)


# --- statistics ----------------------------------------------------------------------------------


def mean_formula(x):
    return x.to(torch.promote_types(x.dtype, torch.float32)).mean((0, 2, 3))


def var_formula(x):
    return x.to(torch.promote_types(x.dtype, torch.float32)).var((0, 2, 3), unbiased=False)


def check_stats(x):
    mean, var = kernels.bn_stats(x)
    assert mean.dtype == var.dtype == torch.float32
    terms = x[:, 0].numel()
    rule(mean, mean_formula, x, reduced=terms)
    rule(var, var_formula, x, reduced=terms)


@each_run
@each_shape
def test_bn_stats(shape, isa, dtype):
    _C.set_cpu_isa(isa)
    check_stats(maps(shape, dtype)[0])


@each_run
@drawn
@given(shape=drawn_shape, seed=st.integers(0, 99))
def test_bn_stats_drawn(isa, dtype, shape, seed):
    _C.set_cpu_isa(isa)
    check_stats(maps(shape, dtype, seed=seed)[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(4, 5, 40, 40), (2, 64, 9, 9), (3, 300, 7, 7)], ids=str)
@pytest.mark.parametrize("mean", [1e4, -1e6])
def test_bn_stats_where_the_mean_is_far_larger_than_the_deviation(shape, mean, isa):
    """Within 40 roundings of the variance of the very values; E[x²] - E[x]² has no digit left."""
    _C.set_cpu_isa(isa)
    x = maps(shape, torch.float32)[0] + mean
    got_mean, got_var = kernels.bn_stats(x)
    oracle_mean, oracle_var = mean_formula(x.double()), var_formula(x.double())
    eps = torch.finfo(torch.float32).eps
    assert ((got_mean - oracle_mean).abs() <= eps * abs(mean)).all()
    assert ((got_var - oracle_var).abs() <= 40 * eps * oracle_var).all()
    naive = (x * x).mean((0, 2, 3)) - x.mean((0, 2, 3)) ** 2
    assert ((naive - oracle_var).abs() > 40 * eps * oracle_var).any()


@each_run
@pytest.mark.parametrize("size", [1e16, 1e30])
def test_bn_stats_of_large_values(size, isa, dtype):
    """Squares of deviations from 1e17 on are more than float32 holds, before the mean is."""
    if dtype == torch.float16:
        pytest.skip("holds no such value")
    _C.set_cpu_isa(isa)
    x = maps((4, 21, 14, 14), dtype)[0] * size
    mean, var = kernels.bn_stats(x)
    assert max_error(mean, mean_formula(x.double())) < 1e-6 * size
    if size < 1e17:
        torch.testing.assert_close(var.double(), var_formula(x.double()), rtol=1e-5, atol=0)
    else:
        assert var.isposinf().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("place", [0, 3, 100, -1])
def test_bn_stats_with_an_outlier(place, isa):
    """A value far from the others spoils the shift of its block: 33 times a sum's error at most."""
    _C.set_cpu_isa(isa)
    x = maps((2, 20, 12, 12), torch.float32)[0]
    flat = x.permute(0, 2, 3, 1).reshape(-1, 20)
    flat[place] = 1e5
    x = flat.view(2, 12, 12, 20).permute(0, 3, 1, 2)
    oracle = var_formula(x.double())
    eps = torch.finfo(torch.float32).eps
    assert ((kernels.bn_stats(x)[1] - oracle).abs() <= 33 * math.sqrt(256) * eps * oracle).all()


@each_run
def test_bn_stats_of_constant_channels(isa, dtype):
    _C.set_cpu_isa(isa)
    x = torch.full((2, 19, 20, 20), 3.0, dtype=dtype).contiguous(memory_format=torch.channels_last)
    mean, var = kernels.bn_stats(x)
    assert (mean == 3).all()
    assert (var == 0).all()


@each_run
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 13, 13), (3, 5, 0)])
def test_bn_stats_not_finite(place, value, isa, dtype):
    """A channel with NaN or infinity has torch's mean and a NaN variance; others keep theirs."""
    _C.set_cpu_isa(isa)
    x = maps((4, 21, 14, 14), dtype)[0]
    clean = kernels.bn_stats(x)
    n, h, w = place
    x[n, 17, h, w] = value
    mean, var = kernels.bn_stats(x)
    assert max_error(mean[17], mean_formula(x)[17]) == 0
    assert var[17].isnan()
    others = torch.arange(21) != 17
    assert torch.equal(mean[others], clean[0][others])
    assert torch.equal(var[others], clean[1][others])


# --- apply ---------------------------------------------------------------------------------------


def act_formula(x, scale, shift, residual, residual_scale, residual_shift, relu):
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) * per_channel(scale) + per_channel(shift)
    if residual_scale is not None:
        y = y + (residual.to(wide) * per_channel(residual_scale) + per_channel(residual_shift))
    elif residual is not None:
        y = y + residual.to(wide)
    y = torch.relu(y) if relu else y
    return y.to(x.dtype)


def act_arguments(shape, dtype, kind, seed=0):
    """x, scale, shift, and the residual operands of each kind."""
    x, residual = maps(shape, dtype, 2, seed)
    scale, shift, scale2, shift2 = vectors(shape[1], 4, seed)
    affine = (scale2, shift2) if kind == "affine" else (None, None)
    return x, scale, shift, None if kind == "none" else residual, *affine


KINDS = ("none", "plain", "affine")


@each_run
@each_shape
def test_bn_act(shape, isa, dtype):
    _C.set_cpu_isa(isa)
    for kind, relu in itertools.product(KINDS, (False, True)):
        args = act_arguments(shape, dtype, kind)
        got = kernels.bn_apply(*args, relu=relu)
        assert is_channels_last(got)
        rule(got, act_formula, *args, relu)


@each_run
@drawn
@given(shape=drawn_shape, kind=st.sampled_from(KINDS), relu=st.booleans())
def test_bn_act_drawn(isa, dtype, shape, kind, relu):
    _C.set_cpu_isa(isa)
    args = act_arguments(shape, dtype, kind)
    rule(kernels.bn_apply(*args, relu=relu), act_formula, *args, relu)


@each_run
@each_shape
def test_in_place_gives_the_same_bits(shape, isa, dtype):
    _C.set_cpu_isa(isa)
    for kind, which in (("none", 0), ("plain", 0), ("plain", 3), ("affine", 3)):
        args = list(act_arguments(shape, dtype, kind))
        expected = kernels.bn_apply(*args)
        args[which] = args[which].clone()
        got = kernels.bn_apply(*args, out=args[which])
        assert got is args[which]
        assert torch.equal(got, expected)
    x, residual = maps(shape, dtype, 2)
    expected = kernels.add_relu(x, residual)
    assert torch.equal(kernels.add_relu(x.clone(), residual, out=residual), expected)


@each_run
@each_shape
def test_add_relu_is_torch_s(shape, isa, dtype):
    _C.set_cpu_isa(isa)
    x, residual = maps(shape, dtype, 2)
    assert torch.equal(kernels.add_relu(x, residual), torch.relu(x + residual))


@each_run
def test_relu_keeps_nan_and_infinity(isa, dtype):
    _C.set_cpu_isa(isa)
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1.0] * 5).view(1, 25, 1, 1).to(dtype)
    one, zero = torch.ones(25), torch.zeros(25)
    for got in (kernels.bn_apply(x, one, zero), kernels.add_relu(x, torch.zeros_like(x))):
        assert max_error(got, torch.relu(x)) == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_to_nearest_even(isa, dtype):
    """Every pattern between two neighbours, ties, the step to infinity, NaN with any payload."""
    _C.set_cpu_isa(isa)
    low = torch.arange(0, 2**16, 97, dtype=torch.int64)
    high = torch.tensor([0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7FC1, 0xBF80, 0xFF7F, 0x0080, 0x1234])
    # float16's last step to infinity, its largest subnormals, its smallest and half of that.
    high = torch.cat([high, torch.tensor([0x477F, 0x3880, 0xB87F, 0x3380, 0x3300, 0x3301])])
    low = torch.cat([low, torch.tensor([1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])])
    bits = ((high.view(-1, 1) << 16) | low).flatten()
    values = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    c = len(values)
    x = torch.zeros(1, c, 1, 1, dtype=dtype)
    got = kernels.bn_apply(x, torch.zeros(c), values, relu=False).flatten()
    assert max_error(got, values.to(dtype)) == 0


def test_other_layouts_are_converted():
    x, residual = (torch.randn(2, 6, 4, 5) for _ in range(2))
    scale, shift = vectors(12, 2)
    scale, shift = scale[::2], shift[::2]
    expected = kernels.bn_apply(*map(torch.clone, (x, scale, shift, residual)))
    assert is_channels_last(expected)
    torch.testing.assert_close(expected, act_formula(x, scale, shift, residual, None, None, True))
    assert torch.equal(kernels.bn_apply(x, scale, shift, residual), expected)
