"""The CUDA kernels, compiled as C++ and run on the host: the contract of their ops, bit for bit the
CPU kernels' arithmetic, and no race between barriers."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import resnet_fused as rf
from resnet_fused.backends import _hopper_gemm, _outputs, cuda, native
from resnet_fused.backends import _training_kernels as kernels
from resnet_fused.ops import INFERENCE, TRAINING
from resnet_fused.testing import two_x_rule

sys.path += [str(Path(__file__).parents[1] / name) for name in ("ops", "native")]
import on_host
import test_contract
import test_training_ops

DTYPES = tuple(native.DTYPE_NAMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@contextlib.contextmanager
def kernels_of(module):
    """Give CPU tensors to the kernels of ``module``, as if they were on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "kernels_on", lambda device: (module.cuda, (0,)))
        patch.setattr(native, "cuda_kernels", lambda: module.cuda)
        patch.setattr(_hopper_gemm, "_declines_capability", lambda device: None)
        patch.setattr(cuda, "available", lambda: None)
        patch.setattr(cuda, "_declines_device", lambda device: None)
        supports = cuda.supports
        patch.setattr(cuda, "supports", lambda op, x, *args: supports(op, _OnGpu(x), *args))
        yield


class _OnGpu:
    """A CPU tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, x):
        self._x = x

    def __getattr__(self, name):
        return getattr(self._x, name)


@pytest.fixture
def module():
    module = on_host.load()
    with kernels_of(module):
        yield module
    module.reverse_turns(False)


def ops(which):
    return [op for op in which if hasattr(cuda, op)]


@pytest.mark.parametrize("op", ops(TRAINING))
@each_dtype
def test_contract_in_training(module, op, dtype):
    assert test_training_ops.samples(op, dtype, "cuda")
    test_training_ops.test_result(op, "cuda", dtype)


@pytest.mark.parametrize("op", ops(INFERENCE))
@each_dtype
def test_contract_in_inference(module, op, dtype):
    with rf.use_backend("cuda"):
        for args in test_contract.samples(op, dtype, "cuda"):
            test_contract.assert_contract(op, args)
        for value in (torch.nan, torch.inf, -torch.inf):
            test_contract.test_not_finite(op, "cuda", dtype, value)


# --- bit for bit what the CPU kernels compute ----------------------------------------------------


def maps(shape, dtype, count):
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=g).to(dtype) for _ in range(count)]
    return [t.contiguous(memory_format=torch.channels_last) for t in made]


def elementwise(shape, dtype):
    """Results of the elementwise kernels, over all that their arguments choose between."""
    grad, x, x2, y = maps(shape, dtype, 4)
    y = torch.relu(y)
    v = [torch.randn(shape[1], generator=torch.Generator().manual_seed(i)) for i in range(6)]
    for relu in (False, True):
        yield kernels.bn_apply(x, *v[:2], relu=relu)
        yield kernels.bn_apply(x, *v[:2], x2, relu=relu)
        yield kernels.bn_apply(x, *v[:2], x2, *v[2:4], relu=relu)
        yield kernels.bn_act(x, v[0], v[1].abs(), *v[2:4], 1e-5, x2, relu=relu)
        yield kernels.bn_act_backward_apply(grad, x, *v[:3], y=y, relu=relu)
        yield kernels.bn_act_backward_apply(grad, x, *v[:5], relu=relu)
        yield from kernels.bn_act_backward_apply_both(grad, x, x2, v[:3], v[3:], y, relu=relu)
    yield kernels.add_relu(x, x2)
    for given_y in (y, None):
        masked = torch.empty_like(x)
        kernels.bn_act_backward_reduce(grad, x, *v[:3], y=given_y, masked=masked)
        yield masked
    if min(shape[2:]) >= 2:
        for relu in (False, True):
            pooled, index, taken = kernels.max_pool_index(x, *v[:2], 3, 2, 1, relu)
            yield from (pooled, index, taken)
        yield kernels.max_pool_backward(pooled, index, shape, 3, 2, 1)


SHAPES = [(1, 1, 1, 1), (2, 3, 5, 5), (2, 17, 3, 2), (2, 64, 9, 7), (1, 304, 3, 5), (0, 8, 3, 3)]


@pytest.mark.parametrize("window", [(3, 2, 1), (3, 2, 0), (2, 2, 1), (3, 1, 1), (5, 3, 2)], ids=str)
@pytest.mark.parametrize("size", [(5, 5), (6, 9), (3, 14)], ids=str)
@pytest.mark.parametrize("channels", [7, 72])
def test_the_pool_at_every_edge(window, size, channels):
    """The stem's window goes by squares of pixels, which may stick out on any side."""
    x = torch.randn(2, channels, *size, dtype=torch.float16)
    wide = x.double().requires_grad_()
    y = torch.nn.functional.max_pool2d(wide, *window)
    grad = torch.randn(y.shape, dtype=torch.float16)
    y.backward(grad.double())
    with kernels_of(on_host.load()):
        unchanged = torch.ones(channels), torch.zeros(channels)
        pooled, index, taken = kernels.max_pool_index(x, *unchanged, *window, relu=False)
        grad_x = kernels.max_pool_backward(grad, index, x.shape, *window)
    assert torch.equal(pooled.double(), y)
    assert torch.equal(taken, pooled)
    torch.testing.assert_close(grad_x.double(), wide.grad, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(3, 3), (5, 8), (22, 7), (9, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_stems_pool_takes_what_the_one_for_all_takes(dtype, size, padding):
    """Two channels at once, down a strip: with ties, zeros, NaN and infinity in the windows."""
    x = torch.randn(2, 72, *size, generator=torch.Generator().manual_seed(0)).mul_(2).round_()
    flat = x.permute(0, 2, 3, 1).reshape(-1)
    flat[::31], flat[7::53], flat[11::71] = torch.nan, torch.inf, -torch.inf
    x = flat.view(2, *size, 72).permute(0, 3, 1, 2).to(dtype)
    # Not aligned to 16 bytes, for which there is the kernel for all windows alone.
    odd = torch.empty(x.numel() + 1, dtype=dtype)[1:].as_strided(x.shape, x.stride()).copy_(x)
    scale = torch.linspace(-2, 2, 72)
    with kernels_of(on_host.load()):
        found, expected = (
            kernels.max_pool_index(given, scale, scale.roll(5), 3, 2, padding) for given in (x, odd)
        )
    assert expected[0].isnan().any()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))


@pytest.mark.skipif(native.extension() is None, reason="the extension is not built")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(native.DTYPE_NAMES), ids=str)
def test_the_arithmetic_is_the_cpu_s(shape, dtype):
    expected = list(elementwise(shape, dtype))
    with kernels_of(on_host.load()):
        got = list(elementwise(shape, dtype))
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), f"result {i}"


# --- reductions ----------------------------------------------------------------------------------


def reductions(shape, dtype, offset=0.0):
    grad, x, x2, y = maps(shape, dtype, 4)
    x, y, mean = x + offset, torch.relu(y), torch.full(shape[1:2], offset)
    return [
        *kernels.bn_stats(x),
        *kernels.bn_act_backward_reduce(grad, x, mean, y=y, x2=x2, mean2=mean),
        *kernels.bn_act_backward_reduce(grad, x, mean, mean + 1, -mean),
        *kernels.bn_act_backward_reduce(grad, x, mean, relu=False),
    ]


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (4, 64, 16, 16), (1, 264, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_in_reverse_give_the_same_bits(module, shape, dtype):
    """What a thread reads of another lies behind a barrier."""
    forwards = reductions(shape, dtype)
    module.reverse_turns(True)
    for a, b in zip(forwards, reductions(shape, dtype), strict=True):
        assert torch.equal(a, b)


@each_dtype
@pytest.mark.parametrize("shape", [(4, 31, 16, 32), (4, 64, 16, 32)], ids=str)
def test_a_gradient_that_is_the_same_everywhere(module, shape, dtype):
    """Every addition rounds the same way, so the sum is held without the √terms of random ones."""
    grad, x, x2, y = maps(shape, dtype, 4)
    grad = grad[:, :, :1, :1].expand(shape).contiguous(memory_format=torch.channels_last)
    mean = torch.zeros(shape[1])
    for relu in (False, True):
        g = torch.where(y <= 0, 0.0, grad).float() if relu else grad.float()
        for second in ({}, {"x2": x2, "mean2": mean}):
            got = kernels.bn_act_backward_reduce(grad, x, mean, y=y, relu=relu, **second)[0]
            check = two_x_rule(got, g.sum((0, 2, 3)), g.double().sum((0, 2, 3)), 0)
            assert check.ok, check


@each_dtype
@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 40, 12, 12))),
    offset=st.sampled_from([0.0, 3.0, 1e4]),
)
def test_statistics_of_drawn_shapes(dtype, shape, offset):
    if dtype == torch.float16:
        offset = min(offset, 3.0)
    (x,) = maps(shape, dtype, 1)
    x = x + offset
    with kernels_of(on_host.load()):
        mean, var = kernels.bn_stats(x)
    exact, plain = (torch.var_mean(t, (0, 2, 3), correction=0) for t in (x.double(), x.float()))
    terms = x[:, 0].numel()
    for got, p, e in zip((var, mean), plain, exact, strict=True):
        check = two_x_rule(got, p, e, terms)
        assert check.ok, check


@pytest.mark.parametrize("rows", [1, 31, 4096, 20000])
def test_the_mean_may_be_far_from_zero(module, rows):
    """Also where it drifts over the rows; beside float64, to a few roundings of the variance."""
    drift = torch.linspace(0, 50, rows).view(1, 1, rows, 1)
    x = (torch.randn(1, 5, rows, 1) + 1e4 + drift).float()
    mean, var = kernels.bn_stats(x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


def test_views_that_are_not_aligned_take_the_narrow_path(module):
    flat = torch.randn(2 * 4 * 4 * 16 + 1)[1:]
    x = flat.view(2, 4, 4, 16).permute(0, 3, 1, 2)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.data_ptr() % 16
    vectors = torch.randn(2, 17)
    for scale, shift in (vectors[:, :16], vectors[:, 1:]):
        got = kernels.bn_apply(x, scale, shift)
        assert torch.equal(got, kernels.bn_apply(x.clone(), scale.clone(), shift.clone()))


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "int8", ""])
def test_a_dtype_without_kernels(module, dtype):
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16, got"):
        module.cuda.add_relu(x=16, residual=16, y=16, dtype=dtype, n=4, stream=0)


def test_addresses_and_sizes_are_checked(module):
    x, v = torch.zeros(64), torch.zeros(8)
    address = {"x": x.data_ptr(), "mean": v.data_ptr(), "var": v.data_ptr()}
    size = module.cuda.bn_stats_scratch_bytes(8, 8)
    scratch = _outputs.scratch(size, x.device)
    rest = {"scratch": scratch.data_ptr(), "scratch_bytes": size, "dtype": "float32", "stream": 0}
    module.cuda.bn_stats(**address, **rest, rows=8, c=8)
    for name, value in (("x", 0), ("mean", 0), ("var", 2), ("x", x.data_ptr() + 1)):
        with pytest.raises(ValueError, match=f"^{name}: "):
            module.cuda.bn_stats(**{**address, name: value}, **rest, rows=8, c=8)
    for name, value in (("rows", -1), ("c", 0), ("scratch_bytes", size - 1)):
        given_sizes = {**rest, "rows": 8, "c": 8, name: value}
        with pytest.raises(ValueError, match=f"^{name}: "):
            module.cuda.bn_stats(**address, **given_sizes)


def test_a_launch_that_fails_raises(module):
    """The host knows one stream only."""
    x = torch.zeros(64)
    with pytest.raises(RuntimeError, match="add_relu: launch failed: invalid resource handle"):
        module.cuda.add_relu(x.data_ptr(), x.data_ptr(), x.data_ptr(), "float32", 64, stream=64)
