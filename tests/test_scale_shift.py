"""What a BatchNorm of fixed statistics does to a convolution: its vectors, and what they cost."""

import contextlib
import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused as rf
from resnet_fused.backends import cuda
from resnet_fused.nn import bn as bn_module
from resnet_fused.nn.bn import scale_shift

sys.path += [str(Path(__file__).parent / name) for name in ("native", "ops", "backends")]
import on_host
from test_cuda_on_host import kernels_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


class Kernels(TorchDispatchMode):
    """Counts the ops that would be a kernel each on a GPU."""

    VIEWS = ("aten.unbind.int", "aten.detach.default", "aten.empty.memory_format")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) not in self.VIEWS:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def layer(dtype: torch.dtype, bias: bool = False, affine: bool = True):
    conv = nn.Conv2d(3, 10, 1, bias=bias)
    bn = nn.BatchNorm2d(10, affine=affine)
    for tensor in (*bn.parameters(), bn.running_mean, bn.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    return conv.to(dtype), bn.to(dtype).eval()


def exact(conv, bn):
    conv, bn = ({k: v.double() for k, v in m.state_dict().items()} for m in (conv, bn))
    scale = bn.get("weight", 1) / (bn["running_var"] + 1e-5).sqrt()
    return scale, bn.get("bias", 0) + (conv.get("bias", 0) - bn["running_mean"]) * scale


def assert_right(found, conv, bn) -> None:
    for value, expected in zip(found, exact(conv, bn), strict=True):
        eps = torch.finfo(value.dtype).eps
        assert (value.double() - expected).abs().max() <= 8 * eps * expected.abs().max()


@each_dtype
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(dtype, bias, affine):
    conv, bn = layer(dtype, bias, affine)
    with torch.no_grad():
        found = scale_shift(conv, bn)
    assert {v.dtype for v in found} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert_right(found, conv, bn)
    learned = [p for p in (*bn.parameters(), conv.bias) if p is not None]
    if not learned:
        return
    wide = copy.deepcopy(conv).double(), copy.deepcopy(bn).double()
    expected_of = [p for p in (*wide[1].parameters(), wide[0].bias) if p is not None]
    gradients, expected = (
        torch.autograd.grad((2 * scale + shift).sum(), of)
        for (scale, shift), of in (
            (scale_shift(conv, bn), learned), (scale_shift(*wide), expected_of),
        )
    )  # fmt: skip
    eps = torch.finfo(dtype).eps
    for value, exactly in zip(gradients, expected, strict=True):
        assert (value.double() - exactly).abs().max() <= 8 * eps * exactly.abs().max()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 4), (torch.bfloat16, 6)])
def test_it_is_few_kernels(dtype, most):
    conv, bn = layer(dtype)
    with torch.no_grad(), Kernels() as ran:
        scale_shift(conv, bn)
    assert len(ran.names) <= most, ran.names


@pytest.fixture
def gpu(monkeypatch):
    """A GPU made up, its kernels the host's; tells how often that of scale and shift has run."""
    runs: list[int] = []
    kernel = bn_module._training_kernels.scale_shift

    def counted(*args):
        runs.append(1)
        return kernel(*args)

    monkeypatch.setattr(bn_module._training_kernels, "scale_shift", counted)
    monkeypatch.setattr(bn_module, "on_gpu", lambda tensor: True)
    with kernels_of(on_host.load()):
        yield runs


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@each_dtype
def test_on_a_gpu_it_is_one_of_ours(dtype, bias, affine, gpu):
    """In a graph it is run for each layer at each replay."""
    conv, bn = layer(dtype, bias, affine)
    with torch.no_grad():
        assert_right(scale_shift(conv, bn), conv, bn)
    assert len(gpu) == (dtype != torch.float64)


def test_a_trace_and_fake_tensors_see_torch(gpu):
    """A kernel would write where the trace does not look, and fake tensors have no address."""
    conv, bn = layer(torch.float32)
    x = torch.randn(2, 3, 4, 4)
    fused = rf.fuse(nn.Sequential(conv, bn).eval())
    with torch.no_grad(), rf.use_backend("auto"):
        traced = make_fx(fused)(x)
        torch.testing.assert_close(traced(x), bn(conv(x)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert fused(mode.from_tensor(x)).shape == (2, 10, 4, 4)
    assert not gpu


@pytest.mark.parametrize("spoil", ["reference", "float64", "length", "not built"])
def test_where_the_kernel_does_not_run_it_is_torch(spoil, gpu):
    conv, bn = layer(torch.float64 if spoil == "float64" else torch.float32)
    backend = "reference" if spoil == "reference" else "auto"
    raised = contextlib.nullcontext()
    if spoil == "length":
        bn.bias = nn.Parameter(torch.ones(11))
        raised = pytest.raises(RuntimeError, match="size of tensor")
    with pytest.MonkeyPatch.context() as patch:  # undone before those of `gpu`
        if spoil == "not built":
            patch.setattr(cuda, "available", lambda: "not built")
        with torch.no_grad(), rf.use_backend(backend), raised:
            assert_right(scale_shift(conv, bn), conv, bn)
    assert not gpu
