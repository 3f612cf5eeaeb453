"""What is special to the stem and the head: ties, what is kept for backward, who declines."""

import pytest
import torch
import torch.nn.functional as F
from formulas import PAIRS, call, eager, samples, tensor_arguments

import resnet_fused as rf

STEM, HEAD = "conv_bn_act_max_pool", "avg_pool_linear"
each_stem = pytest.mark.parametrize("backend", [b for op, b in PAIRS if op == STEM])


def stem_arguments(x, weight, act=None, pool_size=3, pool_stride=2, pool_padding=1) -> tuple:
    convolution = (x, weight, None, None, 1, 0, 1, 1, act)
    return rf.functional.op_arguments(STEM, *convolution, pool_size, pool_stride, pool_padding)


@each_stem
@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("step", [1, 2])
def test_of_equal_maxima_the_first_has_the_gradient(backend, act, step):
    """Whole numbers, which every algorithm adds without rounding: most windows have ties."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, (2, 2, 9, 8), generator=generator).float()
    weight = torch.ones(3, 2, 1, 1)
    args = stem_arguments(x, weight, act=act, pool_stride=step)
    found = []
    for function in (call, eager):
        leaf = x.clone().requires_grad_()
        with rf.use_backend(backend):
            out = function(STEM, (leaf, *args[1:]))
            out.backward(torch.arange(1.0, out.numel() + 1).view(out.shape))
        found.append((out.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_the_map_before_the_pool_is_not_kept():
    x, weight = torch.randn(1, 3, 32, 32), torch.randn(8, 3, 7, 7, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rf.functional.conv_bn_act_max_pool(x, weight, stride=2, padding=3, act="relu")
    assert kept == [x.shape, weight.shape]


@pytest.mark.parametrize("op", [STEM, HEAD])
def test_backward_within_autocast_keeps_the_forward_s_dtype(op):
    args = samples(op, torch.float32)[1]
    found = []
    for inside in (False, True):
        leaves = [args[i].clone().requires_grad_() for i in tensor_arguments(args)]
        filled = list(args)
        for i, leaf in zip(tensor_arguments(args), leaves, strict=True):
            filled[i] = leaf
        out = call(op, tuple(filled))
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            out.backward(torch.ones_like(out))
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("op", [STEM, HEAD])
def test_second_derivatives(op):
    args = samples(op, torch.float64)[1]
    chosen = tensor_arguments(args)

    def function(*tensors):
        filled = list(args)
        for i, tensor in zip(chosen, tensors, strict=True):
            filled[i] = tensor
        return call(op, tuple(filled))

    leaves = [args[i].requires_grad_() for i in chosen]
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_the_pool_s_defaults_are_those_of_the_paper():
    x, weight = torch.randn(1, 3, 20, 20), torch.randn(4, 3, 7, 7)
    with rf.use_backend("reference"):
        ours = rf.functional.conv_bn_act_max_pool(x, weight, stride=2, padding=3, act="relu")
    torch.testing.assert_close(
        ours, F.max_pool2d(torch.relu(F.conv2d(x, weight, stride=2, padding=3)), 3, 2, 1)
    )


@pytest.mark.skipif((STEM, "cpu") not in PAIRS, reason="the native kernels are not here")
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("pool_size", (3, 2), "one pool_size for both directions, got (3, 2)"),
        ("pool_stride", (2, 1), "one pool_stride for both directions, got (2, 1)"),
        ("pool_padding", (1, 0), "one pool_padding for both directions, got (1, 0)"),
        ("pool_stride", 5000, "pool_stride of at most 4096, got 5000"),
    ],
)
def test_the_native_pool_says_what_it_does_not_take(name, value, words):
    args = stem_arguments(torch.randn(1, 3, 9, 9), torch.randn(4, 3, 3, 3), **{name: value})
    (reason,) = [v.reason for v in rf.explain(STEM, *args) if v.name == "cpu"]
    assert reason == f"pools with {words}"
    assert call(STEM, args).shape[:2] == (1, 4)
