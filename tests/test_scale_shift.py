"""What a BatchNorm of fixed statistics does to a convolution: its vectors, and what they cost."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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
    if learned:
        scale, shift = scale_shift(conv, bn)
        gradients = torch.autograd.grad((scale + shift).sum(), learned)
        assert all(g.abs().min() > 0 for g in gradients)
        assert_right((scale.detach(), shift.detach()), conv, bn)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 4), (torch.bfloat16, 6)])
def test_it_is_few_kernels(dtype, most):
    conv, bn = layer(dtype)
    with torch.no_grad(), Kernels() as ran:
        scale_shift(conv, bn)
    assert len(ran.names) <= most, ran.names


@pytest.mark.parametrize(("dtype", "besides"), [(torch.float32, 0), (torch.bfloat16, 2)])
def test_on_a_gpu_it_is_one_of_ours(dtype, besides, monkeypatch):
    """In a graph it is run for each layer at each replay."""
    conv, bn = layer(dtype)
    with kernels_of(on_host.load()):
        formula = bn_module._formula(_Elsewhere(bn.running_var))
        assert formula is bn_module._training_kernels.scale_shift
        monkeypatch.setattr(bn_module, "_formula", lambda variance: formula)
        with torch.no_grad(), Kernels() as ran:
            found = scale_shift(conv, bn)
    assert_right(found, conv, bn)
    assert len(ran.names) == besides, ran.names


def test_where_there_are_none_of_ours_it_is_torch(monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda: "not built")
    vector = _Elsewhere(torch.ones(4))
    assert bn_module._formula(vector) is bn_module._bn_math.scale_shift
    wide = _Elsewhere(torch.ones(4, dtype=torch.float64))
    assert bn_module._formula(wide) is bn_module._bn_math.scale_shift


class _Elsewhere:
    """A vector that says it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, vector: torch.Tensor) -> None:
        self.dtype = vector.dtype
