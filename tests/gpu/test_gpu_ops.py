"""Every convolution of the paper's ResNets on each GPU backend, against float64."""

import functools
import re

import pytest
import torch
from devices import precision_of
from ends import head_arguments, stem_arguments
from paths import arguments, assert_right

import resnet_fused as rf
from resnet_fused.inspection import convolutions

#: ResNet-101's are ResNet-50's, -34's are -18's.
MODELS = ("resnet18", "resnet50")
BATCHES = (1, 8)
#: float32 is convolved as TF32 or, where torch's flag forbids that, as it is.
KINDS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_backend = pytest.mark.parametrize("backend", ["triton", "cudnn"])


@each_backend
@each_kind
@pytest.mark.parametrize("model", MODELS)
def test_convolutions(backend, kind, model, device):
    with precision_of(kind), rf.use_backend(backend):
        for batch in BATCHES:
            for p in convolutions(model, batch, KINDS[kind]):
                args = arguments(
                    (p.n, p.c * p.groups, p.h, p.w), p.o * p.groups, p.kernel, p.stride, p.padding,
                    p.dilation, p.groups, dtype=KINDS[kind], residual=p.residual, device=device,
                )  # fmt: skip
                out = torch.ops.resnet_fused.conv_bn_act(*args)
                assert_right(args, out)
                again = torch.ops.resnet_fused.conv_bn_act(*args)
                assert backend != "triton" or torch.equal(again, out), f"not repeatable: {p}"


@each_backend
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_not_finite(backend, kind, device):
    """NaN and infinity spoil what they reach and nothing else; ReLU keeps NaN."""
    args = arguments((2, 64, 14, 14), 64, 3, 1, 1, dtype=KINDS[kind], residual=True, device=device)
    args[0][0, 0, 3, 3] = torch.inf
    args[4][1, 1, 0, 0] = torch.nan
    with rf.use_backend(backend):
        out = torch.ops.resnet_fused.conv_bn_act(*args)
    with rf.use_backend("reference"):
        expected = torch.ops.resnet_fused.conv_bn_act(*args)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


@each_backend
def test_a_gpu_that_is_not_the_current_one(backend, other_device):
    args = arguments((2, 64, 14, 14), 64, 3, 1, 1, dtype=torch.float16, device=other_device)
    before = torch.cuda.current_device()
    with rf.use_backend(backend):
        out = torch.ops.resnet_fused.conv_bn_act(*args)
    assert (out.device, torch.cuda.current_device()) == (other_device, before)
    assert_right(args, out)


@pytest.mark.parametrize("op", ["add_relu", "bn_apply"])
def test_pointwise_ops_on_a_gpu_that_is_not_the_current_one(op, other_device):
    x = torch.randn(2, 8, 5, 5, device=other_device)
    vectors = (x[0, :, 0, 0].clone(), x[1, :, 0, 0].clone())
    args = (x, x) if op == "add_relu" else (x, *vectors, x, "relu")
    run = getattr(torch.ops.resnet_fused, op)
    with rf.use_backend("triton"):
        out = run(*args)
    with rf.use_backend("reference"):
        torch.testing.assert_close(out, run(*args))


def end_arguments(op: str, device) -> tuple:
    if op == "conv_bn_act_max_pool":
        shape = (2, 3, 64, 64), 64, 7, 2, 3, 1, 3, 2, 1
        return stem_arguments(*shape, dtype=torch.float16, device=device)
    return head_arguments((8, 64, 7, 7), 10, dtype=torch.float16, device=device)


@pytest.mark.parametrize("op", ["conv_bn_act_max_pool", "avg_pool_linear"])
def test_the_ends_on_a_gpu_that_is_not_the_current_one(op, other_device):
    args = end_arguments(op, other_device)
    with rf.use_backend("triton"):
        out = getattr(torch.ops.resnet_fused, op)(*args)
    assert out.device == other_device
    assert_right(args, out, op)


@functools.cache
def _too_large() -> bool:
    return not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 20 << 30


@pytest.mark.skipif(_too_large(), reason="needs 20 GiB of free memory")
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1)])
def test_offsets_beyond_32_bits(kernel, padding, device):
    """The last of images of 2³¹ elements is what it is alone."""
    torch.manual_seed(0)
    x = torch.zeros(34, 64, 1024, 1024, dtype=torch.float16, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    x[-1].normal_()
    assert x.numel() > 2**31
    weight = torch.randn(16, 64, kernel, kernel, dtype=torch.float16, device=device)
    with rf.use_backend("triton"):
        whole, alone = (
            rf.functional.conv_bn_act(t, weight, padding=padding) for t in (x, x[-1:].clone())
        )
    assert not whole[0].any()
    torch.testing.assert_close(whole[-1:], alone)


@each_backend
def test_the_current_stream(backend, device):
    """Work that is still under way on the caller's stream is waited for."""
    args = arguments((8, 64, 56, 56), 64, 3, 1, 1, dtype=torch.float16, device=device)
    x, stream = args[0], torch.cuda.Stream(device)
    wrong = torch.full_like(x, torch.nan)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream), rf.use_backend(backend):
        torch.cuda._sleep(50_000_000)
        wrong.copy_(x)
        out = torch.ops.resnet_fused.conv_bn_act(wrong, *args[1:])
    stream.synchronize()
    assert_right(args, out)


@each_backend
def test_no_memory_left(backend, device):
    """The output alone is larger than the GPU's memory."""
    _, total = torch.cuda.mem_get_info(device)
    channels = total // (2 * 1024 * 1024) + 64
    x = torch.zeros(1, 1, 1024, 1024, dtype=torch.float16, device=device)
    weight = torch.zeros(channels, 1, 1, 1, dtype=torch.float16, device=device)
    said = re.escape(f"conv_bn_act on x (1, 1, 1024, 1024), weight ({channels}, 1, 1, 1) in torch.")
    with rf.use_backend(backend), pytest.raises(torch.OutOfMemoryError, match=said):
        rf.functional.conv_bn_act(x, weight)


@each_backend
def test_tensors_that_are_not_on_a_gpu(backend):
    x, weight = torch.zeros(1, 4, 3, 3), torch.zeros(4, 4, 1, 1)
    with rf.use_backend(backend), pytest.raises(RuntimeError, match="GPUs, x is on cpu"):
        rf.functional.conv_bn_act(x, weight)


@each_backend
def test_float64_is_declined(backend, device):
    x, weight = (torch.zeros(4, 4, 1, 1, dtype=torch.float64, device=device) for _ in range(2))
    with rf.use_backend(backend), pytest.raises(RuntimeError, match=r"x is torch\.float64"):
        rf.functional.conv_bn_act(x, weight)
