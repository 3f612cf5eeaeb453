"""The cuDNN backend without a GPU: torch's fused calls replaced by their formulas on the CPU.

What the fakes cannot show is what cuDNN itself does; it is held to the same rule by the tuner.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import resnet_fused as rf
from resnet_fused.backends import ORDER, _turned, candidates, cudnn
from resnet_fused.ops import OPS
from resnet_fused.testing import to_float64, two_x_rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RUNS = (cudnn.conv_bn_act, cudnn.fused_conv_bn_act)


def check_arguments(x, weight, bias):
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert bias is None or bias.is_contiguous()
    assert bias is None or bias.dtype == x.dtype == weight.dtype


def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
    check_arguments(x, weight, bias)
    assert z.is_contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x.float(), weight.float(), None, stride, padding, dilation, groups)
    y = y + alpha * z.float() + (0.0 if bias is None else bias.float().view(-1, 1, 1))
    return torch.relu(y).to(x.dtype)


def relu(x, weight, bias, stride, padding, dilation, groups):
    check_arguments(x, weight, bias)
    y = F.conv2d(x.float(), weight.float(), None, stride, padding, dilation, groups)
    y = y + (0.0 if bias is None else bias.float().view(-1, 1, 1))
    return torch.relu(y).to(x.dtype)


def eager(x, weight, scale, shift, residual, stride, padding, dilation, groups, act):
    """The op as torch runs it step by step, each rounded to x's dtype."""
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    for vector, step in ((scale, torch.mul), (shift, torch.add)):
        y = y if vector is None else step(y, vector.view(-1, 1, 1)).to(x.dtype)
    y = y if residual is None else y + residual
    return torch.relu(y) if act == "relu" else y


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)


def samples(dtype, run):
    for args in OPS["conv_bn_act"].samples("cpu", dtype):
        if args[0].numel() and (args[-1] == "relu" or run is cudnn.conv_bn_act):
            yield args


@pytest.mark.parametrize("run", RUNS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result(run, dtype):
    seen = 0
    for args in samples(dtype, run):
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        out = run(*args)
        check = two_x_rule(out, eager(*args), eager(*to_float64(args)), args[1][0].numel())
        assert check.ok, f"{check} for {[getattr(a, 'shape', a) for a in args]}"
        _, c, h, w = out.shape
        assert (out.dtype, out.stride()) == (dtype, (c * h * w, 1, w * c, c))
        for a, kept in zip(args, before, strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, kept)
        seen += 1
    assert seen >= 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_data_gradient_as_a_convolution(dtype):
    """At a stride of 1, whatever the padding, dilation and groups; of others it says so."""
    op, seen = OPS["conv_backward_data"], 0
    for args in op.samples("cpu", dtype):
        grad, weight, _, stride, padding, dilation, groups, _ = args
        reason = _turned.declines(weight.shape, stride, padding, dilation)
        assert (reason is None) == (max(stride) == 1), reason
        if reason or not grad.numel():
            continue
        out = cudnn.conv_backward_data(*args)
        terms = weight[0].numel() * len(weight) // (weight.shape[1] * groups)
        check = two_x_rule(out, op.reference(*args), op.reference(*to_float64(args)), terms)
        assert check.ok, check
        assert out.is_contiguous(memory_format=torch.channels_last)
        seen += 1
    assert seen > 3


def test_padding_beyond_the_kernel_s_reach_is_declined():
    assert "pad" in _turned.declines((4, 4, 1, 1), (1, 1), (1, 0), (1, 1))
    assert _turned.declines((4, 4, 3, 3), (1, 1), (2, 2), (1, 1)) is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "groups"), [((6, 2, 3, 2), 3), ((8, 4, 1, 1), 1)])
def test_a_turned_weight(layout, size, groups):
    """Rows are columns within a group, taps run backwards, and memory is read as it lies."""
    weight = torch.randn(size).contiguous(memory_format=layout)
    turned = _turned.turned(weight, groups)
    assert turned.is_contiguous(memory_format=torch.channels_last)
    for parts in zip(turned.chunk(groups), weight.chunk(groups), strict=True):
        assert torch.equal(parts[0], parts[1].transpose(0, 1).flip(2, 3))


def test_the_arguments_of_the_fused_calls(monkeypatch):
    """In torch's order: z before alpha before bias, stride before padding before dilation."""
    seen = []
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", lambda *a: seen.append(a) or a[2])
    x, weight, z = torch.randn(1, 4, 9, 9), torch.randn(6, 2, 3, 3), torch.randn(1, 6, 4, 4)
    shift = torch.randn(6)
    cudnn.fused_conv_bn_act(x, weight, None, shift, z, (2, 2), (1, 1), (2, 2), 2, "relu")
    (call,) = seen
    assert torch.equal(call[2], z)
    assert torch.equal(call[4], shift)
    assert (call[3], *call[5:]) == (1.0, [2, 2], [1, 1], [2, 2], 2)


def test_nan_is_kept_though_the_fused_relu_drops_it(monkeypatch):
    """The default rectifies by itself; only the fused candidate leans on cuDNN's ReLU."""

    def dropping(*args):
        return relu(*args).nan_to_num(0.0)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", dropping)
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 1, 1)
    x[0, 0, 0, 0] = torch.nan
    args = (x, weight, None, None, None, (1, 1), (0, 0), (1, 1), 1, "relu")
    assert cudnn.conv_bn_act(*args)[0, :, 0, 0].isnan().all()
    assert not cudnn.fused_conv_bn_act(*args).isnan().any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [1, 3])
def test_weights_are_folded_in_float32_and_rounded_once(dtype, layout, side):
    weight = torch.randn(16, 8, side, side).to(dtype).contiguous(memory_format=layout)
    scale = 1e3 * torch.randn(16)
    folded = cudnn._folded(weight, scale)
    assert torch.equal(folded, (weight.float() * scale.view(-1, 1, 1, 1)).to(dtype))
    assert folded.is_contiguous(memory_format=torch.channels_last)


def test_the_scale_is_folded_in_float32_and_follows_the_parameters():
    """A scale past float16's range folds right, once, and again when a parameter changes."""
    x, weight = torch.ones(1, 1, 2, 2).half(), torch.full((1, 1, 1, 1), 2.0**-10).half()
    scale, shift = torch.tensor([2.0**17]), torch.tensor([1.0])
    args = (x, weight, scale, shift, None, (1, 1), (0, 0), (1, 1), 1, None)
    assert float(cudnn.conv_bn_act(*args)[0, 0, 0, 0]) == 129.0
    folded, bias = cudnn._fold(weight, scale, shift)
    again, same = cudnn._fold(weight, scale, shift)
    assert again is folded
    assert same is bias
    scale.mul_(2)
    shift.add_(1)
    assert float(cudnn.conv_bn_act(*args)[0, 0, 0, 0]) == 258.0


@pytest.mark.parametrize("act", [None, "relu"])
def test_candidates(act):
    """The fused calls always rectify, so they are no candidate without ReLU."""
    args = (
        torch.randn(1, 4, 5, 5),
        torch.randn(4, 4, 1, 1),
        *[None] * 3,
        [1] * 2,
        [0] * 2,
        [1] * 2,
    )
    found = cudnn.candidates("conv_bn_act", *args, 1, act)
    assert found["default"] is cudnn.conv_bn_act
    assert ("fused" in found) == (act == "relu")


# --- where it runs -------------------------------------------------------------------------------


def fake(*shape, dtype=torch.float32, device="cuda:0"):
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device=device)


@pytest.fixture
def capability(monkeypatch):
    found = SimpleNamespace(value=(9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found.value)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_supports(dtype, capability):
    assert cudnn.supports("conv_bn_act", fake(1, 4, 5, 5, dtype=dtype)) is None


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.randn(1, 4, 5, 5), "x is on cpu"),
        (fake(1, 4, 5, 5, dtype=torch.float64), "x is torch.float64"),
        (fake(0, 4, 5, 5), "x is empty"),
    ],
)
def test_declines(x, reason, capability):
    assert reason in cudnn.supports("conv_bn_act", x)


def test_bfloat16_needs_ampere(capability):
    capability.value = (7, 5)
    x = fake(1, 4, 5, 5, dtype=torch.bfloat16)
    assert "compute capability 8.0" in cudnn.supports("conv_bn_act", x)
    assert cudnn.supports("conv_bn_act", x.half()) is None


@pytest.mark.parametrize(
    ("cuda", "gpu", "built", "enabled", "reason"),
    [
        ("13.0", True, True, True, None),
        (None, False, False, True, "built without CUDA"),
        ("13.0", False, True, True, "sees no CUDA device"),
        ("13.0", True, False, True, "built without cuDNN"),
        ("13.0", True, True, False, "flags(enabled=False) is in force"),
    ],
)
def test_available(cuda, gpu, built, enabled, reason, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: built)
    cudnn._missing.cache_clear()
    with torch.backends.cudnn.flags(enabled=enabled):
        found = cudnn.available()
    cudnn._missing.cache_clear()
    assert found == reason if reason is None else reason in found


def test_it_is_the_last_before_the_reference():
    assert list(ORDER)[-1] == "cudnn"
    assert [b.name for b in rf.backends()][-2:] == ["cudnn", "reference"]


def test_all_candidates_of_a_call_are_listed(monkeypatch):
    """Both cuDNN ways beside the CPU's, once the backend takes the call."""
    monkeypatch.setattr(cudnn, "available", lambda: None)
    monkeypatch.setattr(cudnn, "supports", lambda op, *args: None)
    x, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3)
    args = (x, weight, None, None, None, [1, 1], [1, 1], [1, 1], 1, "relu")
    found = candidates("conv_bn_act", *args)
    assert found["cudnn", "default"] is cudnn.conv_bn_act
    assert found["cudnn", "fused"] is cudnn.fused_conv_bn_act
    assert ("onednn", "default") in found
