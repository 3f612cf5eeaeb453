"""What passed a block's ReLU as bits: written by BatchNorm's forward, read by its backward.

On every instruction set, beside ReLU's own result, which gives the same bits of everything.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_maps import ISAS, backward_maps, maps, vectors

from resnet_fused.backends import _training_kernels as kernels
from resnet_fused.ops import _bn

_C = pytest.importorskip("resnet_fused._C")

BF16 = torch.bfloat16
each_isa = pytest.mark.parametrize("isa", ISAS)
drawn = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 17).map(lambda n: 8 * n), st.integers(1, 9), st.integers(1, 9)
)


@pytest.fixture(autouse=True)
def _as_it_was():
    isa = _C.cpu_isa()
    yield
    _C.set_cpu_isa(isa)


def bits_of(x, *args, **kwargs):
    """bn_apply's result and bits, which lie between bytes that stay as they are."""
    n, c, h, w = x.shape
    size = n * c // 8 * h * w
    memory = torch.full((size + 128,), 0xA5, dtype=torch.uint8)
    bits = memory[64 : 64 + size].view(n, h, w, c // 8).permute(0, 3, 1, 2)
    y = kernels.bn_apply(x, *args, **kwargs, bits=bits)
    assert (memory[:64] == 0xA5).all()
    assert (memory[64 + size :] == 0xA5).all()
    return y, bits


@each_isa
@drawn
@given(shape=shapes, seed=st.integers(0, 99))
def test_forward(isa, shape, seed):
    """With a residual, and with one that has a BatchNorm of its own."""
    _C.set_cpu_isa(isa)
    x, residual = maps(shape, BF16, 2, seed)
    scale, shift, *theirs = vectors(shape[1], 4, seed)
    for given_ in ((residual,), (residual, *theirs)):
        y, bits = bits_of(x, scale, shift, *given_)
        assert torch.equal(y, kernels.bn_apply(x, scale, shift, *given_))
        assert torch.equal(bits, _bn.bits_of(y))


@each_isa
def test_zero_nan_and_what_rounds_to_zero(isa):
    """As torch's threshold_backward: a bit at NaN, none at 0 and below."""
    _C.set_cpu_isa(isa)
    z = [0.0, -0.0, 1e-30, -1e-30, math.nan, math.inf, -math.inf, 1e-45]
    x = torch.tensor(z * 5).to(BF16).view(1, 40, 1, 1).contiguous(memory_format=torch.channels_last)
    _, bits = bits_of(x, torch.ones(40), torch.zeros(40), torch.zeros_like(x))
    passed = torch.ops.aten.threshold_backward(torch.ones_like(x), x, 0) > 0
    assert torch.equal(_bn.passed_by(bits), passed)


@each_isa
@pytest.mark.parametrize("size", [1e-38, 1e-39, 3e-41])
def test_what_is_stored_as_zero_has_not_passed(isa, size):
    """Subnormal sums, which AVX-512 BF16 flushes as it rounds and the others keep."""
    _C.set_cpu_isa(isa)
    (x,) = maps((2, 64, 8, 8), BF16)
    y, bits = bits_of(x, torch.full((64,), size), torch.zeros(64), torch.zeros_like(x))
    assert torch.equal(_bn.passed_by(bits), ~(y <= 0))


@each_isa
@drawn
@given(shape=shapes, seed=st.integers(0, 99))
def test_backward(isa, shape, seed):
    """By the bits and by the values they are of: sums, masked gradients and both inputs'."""
    _C.set_cpu_isa(isa)
    grad, x, x2, y = backward_maps(shape, BF16, seed)
    mean, mean2, *v = vectors(shape[1], 8, seed)
    found = []
    for by in (y, _bn.bits_of(y)):
        made = []
        for more in ({}, {"x2": x2, "mean2": mean2}):
            masked = torch.empty_like(grad)
            made += kernels.bn_act_backward_reduce(grad, x, mean, y=by, **more)
            made += kernels.bn_act_backward_reduce(grad, x, mean, y=by, masked=masked, **more)
            made.append(masked)
        made.append(kernels.bn_act_backward_apply(grad, x, *v[:3], y=by))
        made += kernels.bn_act_backward_apply_both(grad, x, x2, v[:3], v[3:], y=by)
        found.append(made)
    assert all(map(torch.equal, *found))


def test_bits_of_another_map_are_refused():
    x, residual = maps((2, 16, 3, 3), BF16, 2)
    scale, shift = vectors(16, 2)
    for bad in (torch.empty(2, 4, 3, 3, dtype=torch.uint8), torch.empty(2, 2, 3, 3)):
        with pytest.raises(ValueError, match=r"^bits: must be \(2, 2, 3, 3\) of torch.uint8"):
            kernels.bn_apply(x, scale, shift, residual, bits=bad)
    with pytest.raises(ValueError, match=r"^bits: must be channels_last"):
        kernels.bn_apply(x, scale, shift, residual, bits=torch.empty(2, 2, 3, 3).byte())
    x, residual = x.float(), residual.float()
    with pytest.raises(ValueError, match=r"^bits: there are only for 16-bit maps"):
        kernels.bn_apply(x, scale, shift, residual, bits=torch.empty(2, 2, 3, 3).byte())
