"""The training kernels of the extension: each function against float64 on every instruction set."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_C = pytest.importorskip("resnet_fused._C")

from resnet_fused.backends import _cpu_training as kernels  # noqa: E402
from resnet_fused.testing import max_error, two_x_rule  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)
ISAS = ["avx2", "avx512", "avx512_bf16"]
ISAS = ISAS[: ISAS.index(_C.cpu_isa()) + 1] if _C.cpu_isa() in ISAS else []
each_run = pytest.mark.parametrize(
    ("isa", "dtype"), list(itertools.product(ISAS, DTYPES)), ids=lambda v: str(v).removeprefix("torch.")
)
#: (N, C, H, W): one vector and less, tails, many parts, rows at once and one by one.
SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 7, 5),
    (2, 3, 5, 5),
    (1, 16, 1, 1),
    (2, 17, 3, 2),
    (1, 40, 9, 7),
    (4, 64, 24, 24),
    (2, 300, 7, 7),
    (0, 8, 3, 3),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
drawn_shape = st.tuples(
    st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)
)
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


def maps(shape, dtype, count=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=g).to(dtype) for _ in range(count)]
    return [t.contiguous(memory_format=torch.channels_last) for t in made]


def vectors(c, count, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(c, generator=g) for _ in range(count)]


def per_channel(v):
    return v.view(-1, 1, 1)


def rule(got, formula, *args, reduced=1, dtype=None):
    """Hold ``got`` to the 2x rule beside ``formula`` in the arguments' own dtypes."""
    up = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    check = two_x_rule(got, formula(*args).to(got.dtype), formula(*up), reduced, dtype)
    assert check.ok, f"{check} for {tuple(got.shape)}"


def is_channels_last(t):
    _, c, h, w = t.shape
    return t.stride() == (c * h * w, 1, w * c, c)


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
    """A channel with NaN or infinity has torch's mean and a NaN variance; the others keep theirs."""
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
        got = kernels.bn_act(*args, relu=relu)
        assert is_channels_last(got)
        rule(got, act_formula, *args, relu)


@each_run
@drawn
@given(shape=drawn_shape, kind=st.sampled_from(KINDS), relu=st.booleans())
def test_bn_act_drawn(isa, dtype, shape, kind, relu):
    _C.set_cpu_isa(isa)
    args = act_arguments(shape, dtype, kind)
    rule(kernels.bn_act(*args, relu=relu), act_formula, *args, relu)


@each_run
@each_shape
def test_in_place_gives_the_same_bits(shape, isa, dtype):
    _C.set_cpu_isa(isa)
    for kind, which in (("none", 0), ("plain", 0), ("plain", 3), ("affine", 3)):
        args = list(act_arguments(shape, dtype, kind))
        expected = kernels.bn_act(*args)
        args[which] = args[which].clone()
        got = kernels.bn_act(*args, out=args[which])
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
    for got in (kernels.bn_act(x, one, zero), kernels.add_relu(x, torch.zeros_like(x))):
        assert max_error(got, torch.relu(x)) == 0


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_is_rounded_to_nearest_even(isa):
    """Every pattern between two neighbours, ties, the step to infinity, NaN with any payload."""
    _C.set_cpu_isa(isa)
    low = torch.arange(0, 2**16, 97, dtype=torch.int64)
    high = torch.tensor([0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7FC1, 0xBF80, 0xFF7F, 0x0080, 0x1234])
    low = torch.cat([low, torch.tensor([1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])])
    bits = ((high.view(-1, 1) << 16) | low).flatten()
    values = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    c = len(values)
    x = torch.zeros(1, c, 1, 1, dtype=torch.bfloat16)
    got = kernels.bn_act(x, torch.zeros(c), values, relu=False).flatten()
    assert max_error(got, values.to(torch.bfloat16)) == 0


# --- backward ------------------------------------------------------------------------------------


def masked_formula(grad, gate, relu):
    return torch.where(gate <= 0, 0.0, grad) if relu else grad


def sums_formula(g, x, mean):
    wide = torch.promote_types(g.dtype, torch.float32)
    return (g.to(wide) * (x.to(wide) - per_channel(mean))).sum((0, 2, 3))


def apply_formula(g, x, a, b, d):
    wide = torch.promote_types(g.dtype, torch.float32)
    a, b, d = map(per_channel, (a, b, d))
    return (g.to(wide) * a + x.to(wide) * b + d).to(g.dtype)


def backward_maps(shape, dtype, seed=0):
    """grad, x, x2 and an output of which about half is positive."""
    grad, x, x2, y = maps(shape, dtype, 4, seed)
    return grad, x, x2, torch.relu(y)


def check_reduce(shape, dtype, mask, dual, store, seed=0):
    grad, x, x2, y = backward_maps(shape, dtype, seed)
    mean, mean2, scale, shift = vectors(shape[1], 4, seed)
    given_ = {"y": y} if mask == "y" else {"scale": scale, "shift": shift}
    given_ |= {"x2": x2, "mean2": mean2} if dual else {}
    gate = y if mask == "y" else kernels.bn_act(x.float(), scale, shift, relu=False)
    g = masked_formula(grad, gate, mask != "none")
    masked = torch.full_like(grad, 7.0) if store else None
    sums = kernels.bn_act_backward_reduce(
        grad, x, mean, relu=mask != "none", masked=masked, **given_
    )
    assert len(sums) == 2 + dual
    if store:
        assert torch.equal(masked, g)
    terms = max(1, x[:, 0].numel())
    rule(sums[0], lambda g: g.sum((0, 2, 3), dtype=torch.promote_types(g.dtype, torch.float32)), g,
         reduced=terms)  # fmt: skip
    rule(sums[1], sums_formula, g, x, mean, reduced=terms)
    if dual:
        rule(sums[2], sums_formula, g, x2, mean2, reduced=terms)


REDUCTIONS = [
    ("none", False, False), ("none", True, False), ("y", False, False), ("y", False, True),
    ("y", True, False), ("y", True, True), ("affine", False, False), ("affine", False, True),
]  # fmt: skip


@each_run
@each_shape
def test_backward_reduce(shape, isa, dtype):
    _C.set_cpu_isa(isa)
    for case in REDUCTIONS:
        check_reduce(shape, dtype, *case)


@each_run
@drawn
@given(shape=drawn_shape, case=st.sampled_from(REDUCTIONS), seed=st.integers(0, 99))
def test_backward_reduce_drawn(isa, dtype, shape, case, seed):
    _C.set_cpu_isa(isa)
    check_reduce(shape, dtype, *case, seed)


@each_run
@each_shape
def test_backward_apply(shape, isa, dtype):
    _C.set_cpu_isa(isa)
    grad, x, x2, y = backward_maps(shape, dtype)
    scale, shift, *v = vectors(shape[1], 8)
    gate = kernels.bn_act(x.float(), scale, shift, relu=False)
    for relu, given_, z in ((False, {}, y), (True, {"y": y}, y),
                            (True, {"scale": scale, "shift": shift}, gate)):  # fmt: skip
        g = masked_formula(grad, z, relu)
        got = kernels.bn_act_backward_apply(grad, x, *v[:3], relu=relu, **given_)
        assert is_channels_last(got)
        rule(got, apply_formula, g, x, *v[:3])
        own = grad.clone()
        kernels.bn_act_backward_apply(own, x, *v[:3], relu=relu, **given_, out=own)
        assert torch.equal(own, got)
        if "scale" not in given_:
            own = grad.clone()
            both = kernels.bn_act_backward_apply_both(
                own, x, x2, v[:3], v[3:], relu=relu, **given_, out=own
            )
            assert both[0] is own
            assert torch.equal(own, got)
            rule(both[1], apply_formula, g, x2, *v[3:])


@each_run
def test_masks_at_zero_and_nan(isa, dtype):
    """As torch's threshold_backward: no gradient at 0 and below, all of it at NaN."""
    _C.set_cpu_isa(isa)
    z = torch.tensor([0.0, -0.0, 1e-30, -1e-30, math.nan, math.inf, -math.inf] * 5).to(dtype)
    z = z.view(1, 35, 1, 1).contiguous(memory_format=torch.channels_last)
    grad, one, zero = torch.ones_like(z), torch.ones(35), torch.zeros(35)
    expected = torch.ops.aten.threshold_backward(grad, z, 0)
    for given_ in ({"y": z}, {"scale": one, "shift": zero}):
        masked = torch.empty_like(z)
        sums = kernels.bn_act_backward_reduce(grad, z, zero, masked=masked, **given_)
        assert torch.equal(masked, expected)
        assert torch.equal(sums[0], expected.float().flatten())
        # x takes no part, so that NaN and infinity in it do not hide the mask.
        x = torch.zeros_like(z) if "y" in given_ else z
        got = kernels.bn_act_backward_apply(grad, x, one, zero, zero, **given_)
        assert torch.equal(got.isfinite(), x.isfinite())
        assert torch.equal(got[x.isfinite()], expected[x.isfinite()])


@each_run
def test_the_recomputed_mask_is_the_forward_s(isa, dtype):
    """Where x · scale + shift rounds to zero or not is decided by the same fused multiply-add."""
    _C.set_cpu_isa(isa)
    x = maps((2, 48, 16, 16), dtype)[0]
    (scale,) = vectors(48, 1)
    shift = -(x[0, :, 0, 0].float() * scale)
    shift = torch.where(torch.arange(48) % 2 == 0, shift, torch.nextafter(shift, scale))
    passed = kernels.bn_act(x.float(), scale, shift) > 0
    masked = torch.empty_like(x)
    ones = torch.ones_like(x)
    kernels.bn_act_backward_reduce(ones, x, torch.zeros(48), scale, shift, masked=masked)
    assert torch.equal(masked > 0, passed)


@each_run
@each_shape
def test_masked_may_be_grad(shape, isa, dtype):
    _C.set_cpu_isa(isa)
    grad, x, _, y = backward_maps(shape, dtype)
    (mean,) = vectors(shape[1], 1)
    apart = torch.empty_like(grad)
    expected = kernels.bn_act_backward_reduce(grad, x, mean, y=y, masked=apart)
    got = kernels.bn_act_backward_reduce(grad, x, mean, y=y, masked=grad)
    assert torch.equal(grad, apart)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("isa", ISAS)
def test_the_whole_backward_is_torch_s(isa):
    """reduce, the vectors of the batch norm gradient, apply: autograd of the eager chain."""
    _C.set_cpu_isa(isa)
    x, residual, grad = maps((4, 24, 9, 9), torch.float32, 3)
    weight, bias = vectors(24, 2)

    def eager(x, residual, weight, bias):
        return torch.relu(F.batch_norm(x, None, None, weight, bias, True) + residual)

    def gradients(*leaves):
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        return torch.autograd.grad(eager(*leaves), leaves, grad.to(leaves[0].dtype))

    mean, var = kernels.bn_stats(x)
    invstd = torch.rsqrt(var + 1e-5)
    scale = weight * invstd
    y = kernels.bn_act(x, scale, bias - mean * scale, residual)
    masked = torch.empty_like(grad)
    sum_g, sum_gx = kernels.bn_act_backward_reduce(grad, x, mean, y=y, masked=masked)
    n = x[:, 0].numel()
    b = -scale * invstd**2 * sum_gx / n
    d = -scale * sum_g / n - b * mean
    grad_x = kernels.bn_act_backward_apply(masked, x, scale, b, d, relu=False)
    got = (grad_x, masked, sum_gx * invstd, sum_g)
    plain = gradients(x, residual, weight, bias)
    oracle = gradients(*(t.double() for t in (x, residual, weight, bias)))
    for ours, theirs, exact in zip(got, plain, oracle, strict=True):
        check = two_x_rule(ours, theirs, exact, n)
        assert check.ok, check


# --- repeatable ----------------------------------------------------------------------------------


@each_run
@pytest.mark.parametrize("shape", [(4, 64, 24, 24), (3, 300, 11, 11), (8, 5, 60, 60)], ids=str)
def test_the_same_bits_on_any_number_of_threads(shape, isa, dtype):
    _C.set_cpu_isa(isa)
    grad, x, x2, y = backward_maps(shape, dtype)
    mean, mean2, *v = vectors(shape[1], 8)

    def run():
        yield from kernels.bn_stats(x)
        masked = torch.empty_like(x)
        yield from kernels.bn_act_backward_reduce(
            grad, x, mean, y=y, masked=masked, x2=x2, mean2=mean2
        )
        yield masked
        yield kernels.bn_act(x, v[0], v[1], x2, v[2], v[3])
        yield from kernels.bn_act_backward_apply_both(grad, x, x2, v[:3], v[3:], y)
        pooled, index = kernels.max_pool_index(x, 3, 2, 1)
        yield from (pooled, index)
        yield kernels.max_pool_backward(pooled, index, x.shape, 3, 2, 1)

    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(list(run()))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# --- max pool ------------------------------------------------------------------------------------

POOLS = [(3, 2, 1), (3, 1, 1), (2, 2, 0), (3, 3, 0), (2, 3, 1), (5, 2, 2), (1, 1, 0)]


def torch_places(x, k, s, p):
    """torch's pool and its indices as places in the window."""
    y, index = F.max_pool2d(x, k, s, p, return_indices=True)
    oy, ox = (torch.arange(n) * s - p for n in y.shape[2:])
    iy, ix = index // x.shape[3], index % x.shape[3]
    return y, (iy - oy.view(-1, 1)) * k + ix - ox


@each_run
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 9, 11), (1, 37, 8, 8), (3, 1, 6, 5)], ids=str)
def test_max_pool_index(shape, pool, isa, dtype):
    """Values and places are torch's, with ties, NaN and infinities in the map."""
    _C.set_cpu_isa(isa)
    x = maps(shape, dtype)[0].mul_(2).round_()
    flat = x.permute(0, 2, 3, 1).reshape(-1, shape[1])
    flat[::11], flat[5::17], flat[7::23] = math.nan, -math.inf, math.inf
    x = flat.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
    x[0, :, :4, :4] = -math.inf
    y, index = kernels.max_pool_index(x, *pool)
    expected, places = torch_places(x, *pool)
    assert is_channels_last(y)
    assert max_error(y, expected) == 0
    assert torch.equal(index.long(), places)


@each_run
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 9, 11), (1, 37, 8, 8), (2, 3, 3, 4)], ids=str)
def test_max_pool_backward(shape, pool, isa, dtype):
    _C.set_cpu_isa(isa)
    x = maps(shape, dtype)[0]
    y, index = kernels.max_pool_index(x, *pool)
    grad = maps(y.shape, dtype, seed=1)[0]
    got = kernels.max_pool_backward(grad, index, x.shape, *pool)

    def backward(x, grad):
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(F.max_pool2d(x, *pool), x, grad)[0]

    assert is_channels_last(got)
    rule(got, backward, x, grad, reduced=pool[0] ** 2)


def test_max_pool_of_no_images():
    y, index = kernels.max_pool_index(torch.zeros(0, 8, 6, 6), 3, 2, 1)
    assert y.shape == index.shape == (0, 8, 3, 3)
    assert kernels.max_pool_backward(y, index, (0, 8, 6, 6), 3, 2, 1).shape == (0, 8, 6, 6)


# --- the edges -----------------------------------------------------------------------------------


def guarded(shape, dtype):
    """A channels_last map with 64 sevens on both sides, and those sevens."""
    size = math.prod(shape)
    flat = torch.full((size + 128,), 7.0, dtype=dtype)
    n, c, h, w = shape
    inner = flat[64 : 64 + size].view(n, h, w, c).permute(0, 3, 1, 2)
    return inner, (flat[:64], flat[64 + size :])


@each_run
@pytest.mark.parametrize("shape", [(1, 5, 3, 1), (2, 19, 3, 3), (1, 16, 2, 2)], ids=str)
def test_nothing_is_written_beside_an_output(shape, isa, dtype):
    _C.set_cpu_isa(isa)
    grad, x, _, y = backward_maps(shape, dtype)
    mean, *v = vectors(shape[1], 4)
    for run in (
        functools.partial(kernels.bn_act, x, *v[:2]),
        functools.partial(kernels.add_relu, x, grad),
        functools.partial(kernels.bn_act_backward_apply, grad, x, *v, y=y),
    ):
        out, guards = guarded(shape, dtype)
        assert torch.equal(run(out=out), run())
        assert all((g == 7).all() for g in guards)
    out, guards = guarded(shape, dtype)
    kernels.bn_act_backward_reduce(grad, x, mean, y=y, masked=out)
    assert all((g == 7).all() for g in guards)


def test_other_layouts_are_converted():
    x, residual = (torch.randn(2, 6, 4, 5) for _ in range(2))
    scale, shift = vectors(12, 2)
    scale, shift = scale[::2], shift[::2]
    expected = kernels.bn_act(*map(torch.clone, (x, scale, shift, residual)))
    assert is_channels_last(expected)
    torch.testing.assert_close(expected, act_formula(x, scale, shift, residual, None, None, True))
    assert torch.equal(kernels.bn_act(x, scale, shift, residual), expected)


X = torch.zeros(1, 4, 2, 2).contiguous(memory_format=torch.channels_last)
V = torch.zeros(4)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("residual", lambda: kernels.bn_act(X, V, V, X[:, :, :1])),
        ("residual", lambda: kernels.bn_act(X, V, V, X.bfloat16())),
        ("residual", lambda: kernels.add_relu(X, X.to("meta"))),
        ("scale", lambda: kernels.bn_act(X, V[:3], V)),
        ("shift", lambda: kernels.bn_act(X, V, V.view(2, 2))),
        ("residual_scale", lambda: kernels.bn_act(X, V, V, X, V)),
        ("residual_scale", lambda: kernels.bn_act(X, V, V, None, V, V)),
        ("out", lambda: kernels.bn_act(X, V, V, out=torch.zeros(1, 4, 2, 2))),
        ("out", lambda: kernels.bn_act(X, V, V, out=X[:, :2])),
        ("grad", lambda: kernels.bn_act_backward_reduce(X[:, :2], X, V, y=X)),
        ("scale", lambda: kernels.bn_act_backward_reduce(X, X, V)),
        ("mean2", lambda: kernels.bn_act_backward_reduce(X, X, V, y=X, x2=X)),
        ("y", lambda: kernels.bn_act_backward_reduce(X, X, V, x2=X, mean2=V)),
        ("masked", lambda: kernels.bn_act_backward_reduce(X, X, V, relu=False, masked=X)),
        ("a", lambda: kernels.bn_act_backward_apply(X, X, V[:2], V, V, y=X)),
        ("y", lambda: kernels.bn_act_backward_apply_both(X, X, X, [V] * 3, [V] * 3)),
        ("index", lambda: kernels.max_pool_backward(X, X, (1, 4, 4, 4), 2, 2, 0)),
        ("grad", lambda: kernels.max_pool_backward(X, X, (1, 4, 9, 9), 2, 2, 0)),
        ("k", lambda: kernels.max_pool_index(torch.zeros(1, 4, 40, 40), 17, 1, 0)),
    ],
)
def test_arguments_that_do_not_fit(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call()


def address(offset=0):
    return MEMORY.data_ptr() - MEMORY.data_ptr() % -64 + 64 * offset


MEMORY = torch.zeros(1 << 14)
SIZES = {"dtype": "float32", "rows": 4, "c": 8}  # a map is 128 bytes, a vector 32
STATS = {
    "x": address(), "mean": address(2), "var": address(3), "scratch": address(4),
    "scratch_bytes": _C.bn_stats_scratch_bytes(4, 8), **SIZES,
}  # fmt: skip
ACT = {
    "x": address(), "scale": address(2), "shift": address(3), "residual": address(4),
    "residual_scale": address(6), "residual_shift": address(7), "y": address(8), **SIZES,
    "relu": True,
}  # fmt: skip
REDUCE = {
    "grad": address(), "x": address(2), "x2": address(4), "scale": 0, "shift": 0, "y": address(6),
    "mean": address(8), "mean2": address(9), "sum_g": address(10), "sum_gx": address(11),
    "sum_gx2": address(12), "masked": address(14), "scratch": address(16),
    "scratch_bytes": _C.bn_act_backward_reduce_scratch_bytes(4, 8), **SIZES, "relu": True,
}  # fmt: skip
APPLY = {
    "grad": address(), "x": address(2), "x2": address(4), "scale": 0, "shift": 0, "y": address(6),
    **{name: address(8 + i) for i, name in enumerate(("a", "b", "d", "a2", "b2", "d2"))},
    "grad_x": address(14), "grad_x2": address(16), **SIZES, "relu": True,
}  # fmt: skip
ADD = {"x": address(), "residual": address(2), "y": address(4), "dtype": "float32", "n": 32}
POOL = {
    "x": address(), "y": address(8), "index": address(16), "dtype": "float32",
    "n": 1, "h": 4, "w": 4, "c": 8, "k": 2, "s": 2, "p": 0,
}  # fmt: skip
POOL_BACK = {"grad": POOL["y"], "grad_x": POOL["x"], **POOL}
del POOL_BACK["x"], POOL_BACK["y"]
POINTERS = {
    "bn_stats": (STATS, ("x", "mean", "var", "scratch")),
    "bn_act": (ACT, ("x", "scale", "shift", "y")),
    "bn_act_backward_reduce": (
        REDUCE, ("grad", "x", "mean", "mean2", "sum_g", "sum_gx", "sum_gx2", "scratch"),
    ),
    "bn_act_backward_apply": (
        APPLY, ("grad", "x", "a", "b", "d", "a2", "b2", "d2", "grad_x", "grad_x2"),
    ),
    "add_relu": (ADD, ("x", "residual", "y")),
    "max_pool_index": (POOL, ("x", "y", "index")),
    "max_pool_backward": (POOL_BACK, ("grad", "index", "grad_x")),
}  # fmt: skip


@pytest.mark.parametrize("function", POINTERS)
def test_null_and_misaligned_pointers(function):
    good, names = POINTERS[function]
    run = getattr(_C, function)
    run(**good)
    for name in names:
        for bad in (0, good[name] + 1)[: 1 if name == "index" else 2]:
            with pytest.raises(ValueError, match=rf"^{name}: "):
                run(**good | {name: bad})


@pytest.mark.parametrize(
    ("function", "good", "changes"),
    [
        ("bn_stats", STATS, {"dtype": "float16", "rows": -1, "c": 0, "scratch_bytes": 8}),
        ("bn_act", ACT, {"rows": -1, "c": 1 << 25, "y": ACT["x"] + 4, "residual_shift": 0}),
        (
            "bn_act_backward_reduce",
            REDUCE,
            {"scratch_bytes": 8, "masked": REDUCE["x"] - 4, "y": 0, "dtype": "int8"},
        ),
        (
            "bn_act_backward_apply",
            APPLY,
            {"grad_x": APPLY["grad"] + 32, "grad_x2": APPLY["grad_x"], "y": 0},
        ),
        ("add_relu", ADD, {"n": -1, "y": ADD["x"] + 4, "dtype": ""}),
        ("max_pool_index", POOL, {"y": POOL["x"], "index": POOL["x"], "k": 9, "s": 0, "p": 2}),
        ("max_pool_backward", POOL_BACK, {"grad_x": POOL["y"], "h": 0, "n": -1}),
    ],
)
def test_sizes_and_overlaps(function, good, changes):
    named = {"residual_shift": "residual_scale"}
    for name, value in changes.items():
        with pytest.raises(ValueError, match=rf"^{named.get(name, name)}: "):
            getattr(_C, function)(**good | {name: value})


def test_no_instruction_set():
    _C.set_cpu_isa("none")
    with pytest.raises(ValueError, match=r"^dtype: no kernels for it on none"):
        kernels.bn_stats(X)
