"""BatchNorm's backward kernels, and that no sum depends on the number of threads."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_maps import (
    ISAS,
    backward_maps,
    each_run,
    each_shape,
    is_channels_last,
    maps,
    per_channel,
    rule,
    vectors,
)
from torch import nn

import resnet_fused as rf
from resnet_fused.backends import _training_kernels as kernels
from resnet_fused.testing import two_x_rule

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


# --- backward ------------------------------------------------------------------------------------


def masked_formula(grad, gate, relu):
    return torch.where(gate <= 0, 0.0, grad) if relu else grad


def sum_formula(g):
    return g.sum((0, 2, 3), dtype=torch.promote_types(g.dtype, torch.float32))


def products(g, x, mean):
    wide = torch.promote_types(g.dtype, torch.float32)
    return g.to(wide) * (x.to(wide) - per_channel(mean))


def sums_formula(g, x, mean):
    return products(g, x, mean).sum((0, 2, 3))


def size(terms):
    """Of a sum of terms of random signs; one channel's may cancel."""
    return float(terms.double().square().sum((0, 2, 3)).sqrt().max()) if terms.numel() else 0.0


def apply_formula(g, x, a, b, d):
    wide = torch.promote_types(g.dtype, torch.float32)
    a, b, d = map(per_channel, (a, b, d))
    return (g.to(wide) * a + x.to(wide) * b + d).to(g.dtype)


def check_reduce(shape, dtype, mask, dual, store, seed=0):
    grad, x, x2, y = backward_maps(shape, dtype, seed)
    mean, mean2, scale, shift = vectors(shape[1], 4, seed)
    given_ = {"y": y} if mask == "y" else {"scale": scale, "shift": shift}
    given_ |= {"x2": x2, "mean2": mean2} if dual else {}
    gate = y if mask == "y" else kernels.bn_apply(x.float(), scale, shift, relu=False)
    g = masked_formula(grad, gate, mask != "none")
    masked = torch.full_like(grad, 7.0) if store else None
    sums = kernels.bn_act_backward_reduce(
        grad, x, mean, relu=mask != "none", masked=masked, **given_
    )
    assert len(sums) == 2 + dual
    if store:
        assert torch.equal(masked, g)
    terms = max(1, x[:, 0].numel())
    rule(sums[0], sum_formula, g, reduced=terms, size=size(g))
    for got, *args in zip(sums[1:], (x, x2), (mean, mean2), strict=False):
        rule(got, sums_formula, g, *args, reduced=terms, size=size(products(g, *args)))


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
    gate = kernels.bn_apply(x.float(), scale, shift, relu=False)
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
    passed = kernels.bn_apply(x.float(), scale, shift) > 0
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
    y = kernels.bn_apply(x, scale, bias - mean * scale, residual)
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


# --- behind an average pool ----------------------------------------------------------------------


def same_everywhere(grad):
    """Return what the backward of a global average pool gives: one value a map of a channel."""
    same = grad[:, :, :1, :1].expand_as(grad)
    return same.contiguous(memory_format=torch.channels_last)


@each_run
@pytest.mark.parametrize("shape", [(4, 33, 14, 14), (8, 72, 56, 56)], ids=str)
def test_a_gradient_that_is_the_same_everywhere(shape, isa, dtype):
    """Every addition rounds the same way, so the sum is held without the √terms of random ones."""
    _C.set_cpu_isa(isa)
    grad, x, x2, y = backward_maps(shape, dtype)
    grad = same_everywhere(grad)
    mean, mean2 = vectors(shape[1], 2)
    for relu, second in itertools.product((False, True), ({}, {"x2": x2, "mean2": mean2})):
        g = masked_formula(grad, y, relu)
        sum_g = kernels.bn_act_backward_reduce(grad, x, mean, y=y, relu=relu, **second)[0]
        rule(sum_g, sum_formula, g, reduced=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(3))
def test_what_such_a_gradient_gives_the_layers_before(seed, isa):
    """BatchNorm's backward takes the mean off it, and the next one's sums are of what is left."""
    _C.set_cpu_isa(isa)
    torch.manual_seed(seed)
    plain = nn.Sequential(*conv_bn_relu(33, 36), *conv_bn_relu(36, 33))
    fused, exact = rf.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    x = torch.randn(4, 33, 14, 14).relu()
    grad = torch.randn(4, 33, 1, 1).expand(4, 33, 14, 14)
    with rf.use_backend("cpu"):
        fused(x).backward(grad)
    plain(x).backward(grad)
    exact(x.double()).backward(grad.double())
    for (name, ours), theirs, oracle in zip(
        fused.named_parameters(), plain.parameters(), exact.parameters(), strict=True
    ):
        check = two_x_rule(ours.grad, theirs.grad, oracle.grad, x[:, 0].numel())
        assert check.ok, f"{name}: {check}"


def conv_bn_relu(c, o):
    return nn.Conv2d(c, o, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()


# --- in one call ---------------------------------------------------------------------------------


WANTED = [w for w in itertools.product((True, False), repeat=5) if any(w)]


@each_run
@pytest.mark.parametrize("mask", ["y", "recomputed", None])
def test_the_whole_backward_in_one_call_has_the_bits_of_its_parts(mask, isa, dtype):
    _C.set_cpu_isa(isa)
    grad, x, _, y = backward_maps((3, 21, 9, 7), dtype)
    weight, bias = vectors(21, 2)
    bn = (*kernels.bn_stats(x), weight, bias)
    relu, y = mask is not None, y if mask == "y" else None
    scale, shift = kernels.scale_shift(*bn, 1e-3)
    masked = torch.empty_like(grad)
    sums = kernels.bn_act_backward_reduce(
        grad, x, bn[0], scale, shift, y, relu, masked if relu else None
    )
    vector = kernels.gradient_vectors(*bn[:3], *sums, 1e-3, x[:, 0].numel())
    g = masked if relu else grad
    grad_x = kernels.bn_act_backward_apply(g, x, *vector, relu=False)
    grad_weight = (sums[1].double() * torch.rsqrt(bn[1].double() + 1e-3)).float()
    activation = kernels.bn_apply(x, scale, shift, relu=relu)
    expected = (grad_x, grad_weight, sums[0], masked, activation)
    for wanted in WANTED:
        if (wanted[3] and not relu) or (wanted[4] and not (wanted[0] and mask == "recomputed")):
            continue
        found = kernels.bn_act_backward(grad, x, *bn, 1e-3, y, relu, wanted)
        assert [made is not None for made in found] == list(wanted)
        for i, (got, right) in enumerate(zip(found, expected, strict=True)):
            if i == 1 and got is not None:
                torch.testing.assert_close(got, right)
            else:
                assert got is None or torch.equal(got, right)


@each_run
@pytest.mark.parametrize("affine", [True, False])
def test_bn_act_in_one_call_has_the_bits_of_its_parts(affine, isa, dtype):
    _C.set_cpu_isa(isa)
    x, residual = maps((2, 19, 5, 6), dtype, 2)
    bn = (*kernels.bn_stats(x), *(vectors(19, 2) if affine else (None, None)))
    vector = kernels.scale_shift(*bn, 1e-5)
    for r, relu in itertools.product((None, residual), (True, False)):
        expected = kernels.bn_apply(x, *vector, r, relu=relu)
        assert torch.equal(kernels.bn_act(x, *bn, 1e-5, r, relu), expected)


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
        yield kernels.bn_apply(x, v[0], v[1], x2, v[2], v[3])
        yield from kernels.bn_act_backward_apply_both(grad, x, x2, v[:3], v[3:], y)
        pooled, index, taken = kernels.max_pool_index(x, *v[:2], 3, 2, 1)
        yield from (pooled, index, taken)
        yield kernels.max_pool_backward(pooled, index, x.shape, 3, 2, 1)

    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(list(run()))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_long_rows_from_memory_go_one_by_one():
    """Maps beyond 8 MiB with long rows take another path; it, too, knows no number of threads."""
    shape = (4, 260, 48, 48)
    grad, x, x2, y = backward_maps(shape, torch.float32)
    mean, mean2 = vectors(260, 2)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        sums = kernels.bn_act_backward_reduce(grad, x, mean, y=y, x2=x2, mean2=mean2)
        results.append([*kernels.bn_stats(x), *sums])
    assert all(map(torch.equal, *results))
    got_mean, got_var, sum_g, sum_gx, sum_gx2 = results[0]
    g, rows = masked_formula(grad, y, True), x[:, 0].numel()
    rule(got_mean, lambda x: x.mean((0, 2, 3)), x, reduced=rows)
    rule(got_var, lambda x: x.var((0, 2, 3), unbiased=False), x, reduced=rows)
    rule(sum_g, lambda g: g.sum((0, 2, 3)), g, reduced=rows)
    rule(sum_gx, sums_formula, g, x, mean, reduced=rows)
    rule(sum_gx2, sums_formula, g, x2, mean2, reduced=rows)
