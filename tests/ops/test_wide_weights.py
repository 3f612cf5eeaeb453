"""float32 weights beside 16-bit maps: what autocast leaves to the CPU's kernels in training."""

import pytest
import torch
from devices import device_of, moved
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.backends import ORDER, _cpu_once, cpu, onednn
from resnet_fused.models import create_model
from resnet_fused.ops import TRAINING

#: Of `pointwise_bn_act` and its backward test_pointwise.py tells.
WIDE = [name for name, op in TRAINING.items() if op.wide and "pointwise" not in name]
BACKENDS = [b.name for b in rf.backends() if b.available]
PAIRS = [(op, b) for op in WIDE for b in BACKENDS if b == "reference" or hasattr(ORDER[b], op)]
#: N, C, H, W, O, kernel, stride: 1x1, 3x3 directly and by Winograd's transform, strides, odd
#: channels, the stem.
CONVOLUTIONS = [
    ((2, 64, 6, 5), 96, 1, 1),
    ((2, 64, 6, 5), 32, 1, 2),
    ((2, 32, 9, 8), 32, 3, 1),
    ((4, 64, 32, 32), 64, 3, 1),
    ((2, 32, 9, 8), 64, 3, 2),
    ((2, 20, 9, 8), 30, 3, 1),
    ((2, 3, 20, 20), 64, 7, 2),
]


def arguments(op: str, case: tuple, dtype: torch.dtype, layout: torch.memory_format) -> tuple:
    """Of a call with a float32 weight, in the order of the op's schema."""
    shape, o, k, s = case
    g = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=g)

    geometry = ([s, s], [k // 2, k // 2], [1, 1], 1)
    x = draw(*shape).to(dtype, memory_format=torch.channels_last)
    weight = draw(o, shape[1], k, k).to(memory_format=layout)
    z = torch.nn.functional.conv2d(x.float(), weight, None, *geometry)
    grad = z.to(dtype, memory_format=torch.channels_last)
    vectors = (draw(shape[1]), draw(shape[1]).abs() + 0.5, draw(shape[1]), draw(shape[1]))
    return {
        "conv_bn_stats": (x, weight, *geometry),
        "bn_act_conv_bn_stats": (x, *vectors, weight, 1e-5, "relu", *geometry),
        "conv_backward_data": (grad, weight, list(shape), *geometry, x),
        "relu_conv_backward_data": (grad, weight, x.relu(), *geometry, x),
        "bn_act_conv_backward_data": (
            grad, weight, x, *vectors, 1e-5, "relu", *geometry, [True, True, True],
        ),
        "bn_act_conv_backward": (
            grad, weight, x, *vectors, 1e-5, "relu", *geometry, False, dtype, [True, True, True],
        ),
    }[op]  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_a_wide_weight_gives_what_its_cast_gives(op, backend, case, dtype, layout):
    args = moved(arguments(op, case, dtype, layout), device_of(backend))
    cast = tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.dim() == 4 else a  # the weight alone is wide
        for a in args
    )
    run = getattr(torch.ops.resnet_fused, op)
    with rf.use_backend(backend):
        if backend in ORDER and (reason := ORDER[backend].supports(op, *args)):
            pytest.skip(reason)
        got, want = (out if isinstance(out, tuple) else (out,) for out in (run(*args), run(*cast)))
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


def test_a_wide_weight_has_a_wide_gradient():
    args = arguments("conv_bn_stats", CONVOLUTIONS[2], torch.bfloat16, torch.channels_last)
    weight = args[1].requires_grad_()
    torch.ops.resnet_fused.conv_bn_stats(*args)[0].sum().backward()
    assert weight.grad.dtype == torch.float32
    assert weight.grad.stride() == weight.stride()
    if cpu.declines(args[0]) is None:
        assert not torch.equal(weight.grad, weight.grad.bfloat16().float()), "rounded on its way"


def test_autocast_keeps_no_copy_of_a_weight():
    model = rf.fuse(create_model("resnet18").to(memory_format=torch.channels_last).train())
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    kept: list[Tensor] = []
    with (
        rf.use_backend("reference"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        loss = model(torch.randn(2, 3, 64, 64)).float().sum()
    addresses = {t.data_ptr() for t in kept}
    assert all(w.data_ptr() in addresses for w in convolutions)
    sizes = {w.shape for w in convolutions}
    assert not [t for t in kept if t.dtype == torch.bfloat16 and t.shape in sizes]
    loss.backward()
    assert all(w.grad.dtype == torch.float32 for w in convolutions)


LAST = torch.channels_last


@pytest.mark.parametrize(
    ("case", "dtype", "layout", "algorithm"),
    [
        (((8, 256, 14, 14), 1024, 1, 1), torch.float32, torch.contiguous_format, "direct"),
        (((8, 256, 14, 14), 256, 3, 1), torch.float32, LAST, "winograd4"),
        (((8, 256, 14, 14), 256, 3, 1), torch.bfloat16, LAST, "direct"),
        (((8, 128, 28, 28), 128, 3, 1), torch.bfloat16, LAST, "winograd4"),
        (((8, 128, 28, 28), 256, 3, 2), torch.bfloat16, LAST, "direct"),
        (((8, 3, 64, 64), 64, 7, 2), torch.bfloat16, torch.contiguous_format, "narrow"),
        (((8, 3, 64, 64), 64, 7, 2), torch.float32, torch.contiguous_format, "direct"),
        # torch's own is as fast: slow to pack, a panel half empty, float32 with a stride.
        (((8, 256, 14, 14), 256, 3, 1), torch.bfloat16, torch.contiguous_format, None),
        (((8, 48, 14, 14), 48, 3, 1), torch.bfloat16, LAST, None),
        (((8, 128, 28, 28), 256, 3, 2), torch.float32, LAST, None),
    ],
    ids=str,
)
def test_convolutions_are_the_kernels_own_where_packing_pays(
    case, dtype, layout, algorithm, monkeypatch
):
    monkeypatch.setattr(_cpu_once, "multiplies_tiles", lambda dtype: False)
    monkeypatch.setattr(_cpu_once, "multiplies_pairs", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(onednn, "computes_in", lambda dtype: True)
    assert worth_packing(case, dtype, layout) == algorithm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("case", "algorithm"),
    [
        (((8, 256, 14, 14), 1024, 1, 1), "direct"),
        (((8, 256, 14, 14), 256, 3, 1), "winograd4"),
        (((1, 512, 7, 7), 512, 3, 1), "direct"),
        (((8, 3, 64, 64), 64, 7, 2), "direct"),
        (((8, 48, 14, 14), 48, 3, 2), "direct"),
    ],
    ids=str,
)
def test_all_are_where_torch_imitates_the_dtype(case, algorithm, dtype, monkeypatch):
    monkeypatch.setattr(_cpu_once, "multiplies_tiles", lambda dtype: False)
    monkeypatch.setattr(_cpu_once, "multiplies_pairs", lambda dtype: False)
    monkeypatch.setattr(onednn, "computes_in", lambda dtype: False)
    assert worth_packing(case, dtype, torch.contiguous_format) == algorithm
    monkeypatch.setattr(onednn, "computes_in", lambda dtype: True)
    if dtype == torch.float16:
        assert worth_packing(case, dtype, torch.contiguous_format) is None


def worth_packing(case, dtype, layout, turned=False):
    (n, c, h, w), o, k, s, *d = case
    x = torch.empty(n, c, h, w, dtype=dtype)
    weight = torch.empty(o, c, k, k).to(memory_format=layout)
    geometry = ((s, s), (k // 2, k // 2), (*d, *d) or (1, 1), 1)
    return _cpu_once._worth_packing(x, weight, weight.shape, *geometry, turned)


@pytest.mark.parametrize(
    ("case", "layout", "turned", "pays"),
    [
        (((8, 256, 14, 14), 1024, 1, 1), torch.contiguous_format, False, True),
        (((8, 256, 14, 14), 256, 3, 1), LAST, False, True),
        (((8, 128, 28, 28), 256, 3, 2), LAST, False, True),
        (((8, 16, 32, 32), 16, 3, 1), LAST, False, True),
        (((8, 256, 14, 14), 256, 3, 1), torch.contiguous_format, False, False),
        (((8, 256, 14, 14), 256, 3, 1), torch.contiguous_format, True, True),
        (((8, 48, 14, 14), 48, 3, 1), LAST, False, False),
        (((8, 3, 64, 64), 64, 7, 2), LAST, False, False),
        (((8, 16, 32, 32), 16, 3, 1, 2), LAST, False, False),
        (((8, 32, 32, 32), 16, 3, 1, 2), LAST, False, True),
    ],
    ids=str,
)
def test_on_amx_where_that_pays(case, layout, turned, pays, monkeypatch):
    monkeypatch.setattr(_cpu_once, "multiplies_tiles", lambda dtype: True)
    found = worth_packing(case, torch.bfloat16, layout, turned)
    assert found == ("amx" if pays else None)


def test_a_weight_written_before_backward_is_refused_as_without_autocast():
    args = arguments("conv_bn_stats", CONVOLUTIONS[0], torch.bfloat16, torch.channels_last)
    weight = args[1].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        z, *_ = torch.ops.resnet_fused.conv_bn_stats(args[0].requires_grad_(), *args[1:])
    with torch.no_grad():
        weight.mul_(0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
