"""The oneDNN backend: what it declines, in processes that it would end, and what it keeps."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import resnet_fused as rf
from resnet_fused.backends import _derived, choose, cpu, onednn

#: x, weight, stride, padding, dilation, groups, in both dtypes: rows or columns in padding alone.
ENDS = (
    ((2, 28, 14, 1), (28, 7, 1, 1), (2, 4), (3, 3), (2, 2), 4),
    ((3, 272, 16, 1), (112, 17, 1, 1), (2, 2), (1, 5), (2, 4), 16),
    ((2, 68, 15, 3), (32, 17, 4, 1), (3, 4), (6, 1), (6, 6), 4),
    ((1, 7, 22, 3), (1, 7, 1, 1), (2, 4), (6, 5), (2, 6), 1),
)
#: In bfloat16: a stride that leaves one column, and a kernel of several.
WRONG = (
    ((2, 112, 28, 7), (128, 7, 5, 4), (2, 2), (3, 3), (6, 4), 16),
    ((2, 136, 18, 3), (32, 17, 4, 2), (1, 4), (1, 1), (1, 1), 8),
    ((1, 32, 4, 2), (32, 4, 3, 3), (2, 2), (1, 1), (1, 1), 8),
)

RUN = """
import sys, torch, resnet_fused as rf
torch.set_num_threads(2)
x_shape, weight_shape, *geometry, groups = eval(sys.argv[1])
dtype = getattr(torch, sys.argv[2])
torch.manual_seed(0)
x, weight = torch.randn(x_shape).to(dtype), torch.randn(weight_shape).to(dtype)
names = dict(zip(("stride", "padding", "dilation"), geometry), groups=groups)
bn = [torch.rand(len(weight)), torch.randn(len(weight))]
y = rf.functional.conv_bn_act(x, weight, *bn, **names).double()
z, *_ = rf.functional.conv_bn_stats(x, weight, **names)
want = torch.nn.functional.conv2d(x.double(), weight.double(), None, *geometry, groups)
eps = 4 * torch.finfo(dtype).eps
for value, right in ((y, want * bn[0].view(-1, 1, 1) + bn[1].view(-1, 1, 1)), (z.double(), want)):
    worst, most = float((value - right).abs().max()), float(right.abs().max())
    assert worst <= eps * (most + 1e-6), (worst, most)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("call", [*ENDS, *WRONG])
def test_auto_has_an_answer_where_onednn_has_none(call, dtype):
    command = [sys.executable, "-c", RUN, repr(call), dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("call", [*ENDS, *WRONG])
def test_it_declines_them(call, pool, dtype):
    x_shape, weight_shape, *geometry, groups = call
    x, weight = torch.randn(x_shape).to(dtype), torch.randn(weight_shape).to(dtype)
    op, args = "conv_bn_act", (None, None, None, *geometry, groups, None)
    if pool:
        op, args = "conv_bn_act_max_pool", (None, None, *geometry, groups, None, *[(1, 1)] * 3)
    reason = onednn.supports(op, x, weight, *args)
    plain = (None, None, None, (1, 1), (0, 0), (1, 1), 1, None)
    if onednn.supports("conv_bn_act", x.new_ones(1, 7, 9, 9), x.new_ones(2, 7, 1, 1), *plain):
        pytest.skip("oneDNN does not take this dtype here")
    expected = call in ENDS or dtype == torch.bfloat16
    assert ("padding" in reason or "one column" in reason) if expected else reason is None
    if expected and cpu.available() is None and cpu.declines(x) is None:
        assert choose(op, x, weight, *args) is getattr(cpu, op)


def test_common_convolutions_stay():
    """Among them a 3x3 on one pixel: taps in padding, but not all of an output's."""
    for dtype in (torch.float32, torch.bfloat16):
        for side, kernel, stride, padding in ((1, 3, 1, 1), (7, 3, 2, 1), (56, 1, 1, 0)):
            x = torch.empty(2, 32, side, side, dtype=dtype)
            weight = torch.empty(32, 4, kernel, kernel, dtype=dtype)
            pairs = [(v, v) for v in (stride, padding, 1)]
            assert onednn.breaks_at(x, weight, *pairs) is None


def test_a_few_packed_weights_are_kept():
    weight, scale = torch.randn(8, 8, 3, 3), torch.rand(8)

    def packer(weight):
        (kept,) = (v.value for v in _derived._cache[id(weight)].values())
        return kept

    with rf.use_backend("onednn"):
        for side in range(4, 12):
            x = torch.randn(1, 8, side, side)
            y = rf.functional.conv_bn_act(x, weight, scale, padding=1)
            want = F.conv2d(x, weight, None, 1, 1) * scale.view(-1, 1, 1)
            torch.testing.assert_close(y, want)
        info = packer(weight).cache_info()
        assert info.currsize == info.maxsize == onednn.MAX_PACKED
        rf.functional.conv_bn_act(x, weight, scale, padding=1)
        assert packer(weight).cache_info().hits == info.hits + 1
        weight.mul_(2)
        y = rf.functional.conv_bn_act(x, weight, scale, padding=1)
        torch.testing.assert_close(y, 2 * want)
    key = id(weight)
    del weight
    assert key not in _derived._cache


def test_gradient_of_a_strided_pointwise_weight():
    """torch's own writes past its memory on channels_last maps, by which the process ends."""
    code = """
import sys, torch, resnet_fused as rf
torch.set_num_threads(2)
for _ in range(20):
    x = torch.randn(3, 8, 28, 12).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 8, 1, 1, requires_grad=True)
    with rf.use_backend(sys.argv[1]):
        y, *_ = rf.functional.conv_bn_stats(x, weight, stride=2)
        z = rf.functional.conv_bn_act(x, weight, stride=2)
        (y.sum() + z.sum()).backward()
    want = 2 * x[:, :, ::2, ::2].sum((0, 2, 3)).view(1, 8, 1, 1).expand(8, -1, -1, -1)
    torch.testing.assert_close(weight.grad, want, rtol=1e-4, atol=1e-4)
"""
    for backend in ("reference", "auto"):
        command = [sys.executable, "-c", code, backend]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (backend, done.returncode, done.stderr[-500:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_torch_that_does_not_say_whether_it_computes_in_a_dtype(dtype, monkeypatch):
    """The package asks as it is imported: it must not fail by a private op."""
    monkeypatch.setattr(torch, "ops", SimpleNamespace(mkldnn=SimpleNamespace()))
    assert not onednn.computes_in.__wrapped__(dtype)
    assert onednn.computes_in.__wrapped__(torch.float32)
