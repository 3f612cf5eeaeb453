"""The native CUDA kernels on a real GPU: what running them on the host cannot show."""

import functools

import pytest
import torch

import resnet_fused as rf
from resnet_fused.backends import _training_kernels as kernels
from resnet_fused.backends import cuda, native

if cuda.available():
    pytest.skip(cuda.available() or "", allow_module_level=True)

DTYPES = tuple(native.DTYPE_NAMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
#: Samples that are larger than one block, with and without whole accesses of 16 bytes.
SHAPES = [(2, 3, 5, 5), (8, 64, 56, 56), (16, 2048, 7, 7), (4, 301, 14, 14)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def maps(shape, dtype, count):
    g = torch.Generator("cuda").manual_seed(0)
    made = [torch.randn(shape, generator=g, device="cuda").to(dtype) for _ in range(count)]
    return [t.contiguous(memory_format=torch.channels_last) for t in made]


def everything(shape, dtype):
    """Results of every kernel."""
    grad, x, x2, y = maps(shape, dtype, 4)
    y, v = torch.relu(y), [torch.randn(shape[1], device="cuda") for _ in range(6)]
    masked = torch.empty_like(x)
    results = [
        *kernels.bn_stats(x),
        kernels.bn_apply(x, *v[:2], x2, *v[2:4]),
        kernels.bn_act(x, v[0], v[1].abs(), *v[2:4], 1e-5, x2),
        *kernels.bn_act_backward(
            grad, x, v[0], v[1].abs(), *v[2:4], 1e-5, y, True, [*[True] * 4, False]
        )[:4],
        *kernels.bn_act_backward(grad, x, v[0], v[1].abs(), *v[2:4], 1e-5, wanted=[True] * 5),
        kernels.add_relu(x, x2),
        *kernels.bn_act_backward_reduce(grad, x, v[0], y=y, x2=x2, mean2=v[1]),
        *kernels.bn_act_backward_reduce(grad, x, *v[:3], masked=masked),
        masked,
        *kernels.bn_act_backward_apply_both(grad, x, x2, v[:3], v[3:], y),
        kernels.bn_act_backward_apply(grad, x, *v[:5]),
        *kernels.scale_shift(v[0], v[1].abs(), v[2], v[3], 1e-5),
        *kernels.gradient_vectors(v[0], v[1].abs(), v[2], v[3], v[4], 1e-5, 7),
    ]
    for pool in ((3, 2, 1), (2, 2, 0)):
        pooled, *of_pool = kernels.max_pool_index(x, *v[:2], *pool)
        results += [pooled, *of_pool, kernels.max_pool_backward(pooled, of_pool[0], shape, *pool)]
        affine = (v[0], v[1].abs(), *v[2:4])
        if dtype != torch.float32:  # in which nobody says what the pool took
            results += kernels.bn_act_max_pool_backward(pooled, *of_pool, x, *affine, 1e-5, *pool)
    return results


@each_shape
@each_dtype
def test_runs_are_the_same_bits_and_wait_for_nothing(shape, dtype):
    torch.manual_seed(0)
    expected = everything(shape, dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.manual_seed(0)
        got = everything(shape, dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), f"result {i}"


@each_shape
@each_dtype
def test_statistics_beside_float64(shape, dtype):
    (x,) = maps(shape, dtype, 1)
    mean, var = kernels.bn_stats(x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


#: The stem's of a ResNet at batch 8, and one whose squares stick out.
POOLED = [(8, 64, 112, 112), (3, 24, 57, 31)]


@pytest.mark.parametrize("shape", POOLED, ids=str)
@pytest.mark.parametrize("pool", [(3, 2, 1), (3, 1, 1)], ids=str)
@each_dtype
def test_gradients_through_the_pool_beside_those_of_two_ops(shape, pool, dtype):
    """Of which the first rounds to the maps' dtype what the second reads."""
    (x,), vectors = maps(shape, dtype, 1), torch.randn(2, shape[1], device="cuda")
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    scale, shift = kernels.scale_shift(mean, var, *vectors, 1e-5)
    y, index, taken = kernels.max_pool_index(x, scale, shift, *pool)
    (grad,) = maps(y.shape, dtype, 1)
    window = tuple((side, side) for side in pool)
    saved = (index, taken, x, mean, var, *vectors, 1e-5, "relu", *window, (True, True, True))
    got = cuda.bn_act_max_pool_backward(grad, *saved)
    grad_a = kernels.max_pool_backward(grad.float(), index, shape, *pool)
    expected = kernels.bn_act_backward(grad_a, x.float(), mean, var, *vectors, 1e-5)
    for a, b in zip(got, expected, strict=False):
        atol = torch.finfo(a.dtype).eps * float(b.abs().max()) * (1 if a.dim() == 4 else 16)
        torch.testing.assert_close(a.float(), b, rtol=0, atol=atol)


def test_a_stream_that_is_not_the_default_one():
    x, r = maps((8, 64, 56, 56), torch.bfloat16, 2)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = x + 1
        out = kernels.add_relu(late, r)
    stream.synchronize()
    assert torch.equal(out, torch.relu(x + 1 + r))


def test_a_captured_graph():
    grad, x, r = maps((4, 64, 14, 14), torch.float32, 3)
    weight, bias = torch.randn(2, 64, device="cuda")

    def step():
        mean, var = kernels.bn_stats(x)
        vectors = kernels.scale_shift(mean, var, weight, bias, 1e-5)
        y = kernels.bn_apply(x, *vectors, r)
        return y, *kernels.bn_act_backward_reduce(grad, x, mean, y=y)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one():
    x, r = (t.to("cuda:1") for t in maps((2, 64, 14, 14), torch.float16, 2))
    with torch.cuda.device(0):
        out = kernels.add_relu(x, r)
    assert out.device == torch.device("cuda", 1)
    assert torch.equal(out, torch.relu(x + r))


@functools.cache
def _too_large() -> bool:
    return torch.cuda.mem_get_info()[0] < 20 << 30


@pytest.mark.skipif(_too_large(), reason="needs 20 GiB of free memory")
def test_offsets_beyond_32_bits():
    x = torch.ones(17, 128, 1024, 1024, dtype=torch.float16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    x[-1].fill_(3)
    kernels.add_relu(x, x, out=x)
    assert (x[0] == 2).all()
    assert (x[-1] == 6).all()
    mean, _ = kernels.bn_stats(x)
    torch.testing.assert_close(mean, torch.full((128,), (16 * 2 + 6) / 17.0, device="cuda"))


def test_a_training_step_on_the_kernels():
    """Gradients of a block asked for by name, beside torch's own."""
    block = torch.nn.Sequential(
        torch.nn.Conv2d(8, 16, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
    ).cuda()
    x = torch.randn(4, 8, 12, 12, device="cuda")
    expected = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    fused = rf.fuse(block)
    with rf.use_backend("cuda"):
        got = torch.autograd.grad(fused(x).square().sum(), list(fused.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
