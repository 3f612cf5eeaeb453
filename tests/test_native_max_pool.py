"""The max pool of training: values, places and gradients are torch's."""

import math

import pytest
import torch
import torch.nn.functional as F
from native_maps import at_places, each_run, is_channels_last, maps, rule

from resnet_fused.backends import _training_kernels as kernels
from resnet_fused.testing import max_error

_C = pytest.importorskip("resnet_fused._C")


@pytest.fixture(autouse=True)
def _as_it_was():
    """Leave the instruction set and the threads as they were."""
    isa, threads = _C.cpu_isa(), torch.get_num_threads()
    yield
    _C.set_cpu_isa(isa)
    torch.set_num_threads(threads)


POOLS = [(3, 2, 1), (3, 1, 1), (2, 2, 0), (3, 3, 0), (2, 3, 1), (5, 2, 2), (1, 1, 0)]


def torch_places(x, k, s, p):
    """torch's pool and its indices as places in the window."""
    y, index = F.max_pool2d(x, k, s, p, return_indices=True)
    oy, ox = (torch.arange(n) * s - p for n in y.shape[2:])
    iy, ix = index // x.shape[3], index % x.shape[3]
    return y, (iy - oy.view(-1, 1)) * k + ix - ox


def unchanged(channels):
    """The scale and shift that leave a map as it is."""
    return torch.ones(channels), torch.zeros(channels)


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
    y, index, taken = kernels.max_pool_index(x, *unchanged(shape[1]), *pool, relu=False)
    expected, places = torch_places(x, *pool)
    assert is_channels_last(y)
    assert max_error(y, expected) == 0
    if dtype == torch.float32:  # in which it would be too much to keep
        assert not taken.numel()
    else:
        assert is_channels_last(taken)
        assert max_error(taken, expected) == 0
    assert torch.equal(index.long(), places)


@each_run
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 9, 11), (1, 37, 8, 8), (3, 1, 6, 5)], ids=str)
def test_what_is_taken_behind_relu(shape, pool, isa, dtype):
    """Where ReLU and rounding make many values equal, the first; of x the element there."""
    _C.set_cpu_isa(isa)
    x = maps(shape, dtype)[0]
    scale, shift = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(0))
    y, index, taken = kernels.max_pool_index(x, scale, shift * 9, *pool)
    a = kernels.bn_apply(x, scale, shift * 9)
    expected, places = torch_places(a, *pool)
    assert torch.equal(y, expected)
    assert torch.equal(index.long(), places)
    if dtype == torch.float32:
        return
    assert torch.equal(kernels.bn_apply(taken, scale, shift * 9), y)
    assert torch.equal(taken, at_places(x, index, *pool))


@each_run
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 9, 11), (1, 37, 8, 8), (2, 3, 3, 4)], ids=str)
def test_max_pool_backward(shape, pool, isa, dtype):
    _C.set_cpu_isa(isa)
    x = maps(shape, dtype)[0]
    y, index, _ = kernels.max_pool_index(x, *unchanged(shape[1]), *pool, relu=False)
    grad = maps(y.shape, dtype, seed=1)[0]
    got = kernels.max_pool_backward(grad, index, x.shape, *pool)

    def backward(x, grad):
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(F.max_pool2d(x, *pool), x, grad)[0]

    assert is_channels_last(got)
    rule(got, backward, x, grad, reduced=pool[0] ** 2)


def test_max_pool_of_no_images():
    y, index, taken = kernels.max_pool_index(
        torch.zeros(0, 8, 6, 6).bfloat16(), *unchanged(8), 3, 2, 1
    )
    assert y.shape == index.shape == taken.shape == (0, 8, 3, 3)
    assert kernels.max_pool_backward(y, index, (0, 8, 6, 6), 3, 2, 1).shape == (0, 8, 6, 6)
