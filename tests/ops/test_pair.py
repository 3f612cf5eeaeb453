"""What is special to two convolutions as one op: the map between, who runs it, what is kept."""

import pytest
import torch
from formulas import call, eager, reduced, samples, tensor_arguments

import resnet_fused as rf
from resnet_fused.ops import OPS
from resnet_fused.testing import to_float64, two_x_rule

PAIR = "conv_bn_act_conv_bn_act"


def test_the_map_between_is_rounded():
    """1 + 2^-9 is 1 in bfloat16: summed with -1 behind the rounding it is 0, before it is not."""
    x = torch.tensor([1.0, 2.0**-9], dtype=torch.bfloat16).view(1, 2, 1, 1)
    weight = torch.ones(1, 2, 1, 1, dtype=torch.bfloat16)
    shift2 = torch.tensor([-1.0])
    weight2 = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    out = rf.functional.conv_bn_act_conv_bn_act(x, weight, None, None, weight2, None, shift2)
    assert out.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_a_backend_that_has_it_whole_the_parts_run(dtype, monkeypatch):
    """Each on the backend of its choice, so that asking for the op is no slower than for two."""
    from resnet_fused.ops import _register

    asked = []
    choose = _register.choose

    def spy(op, *args):
        asked.append(op)
        return choose(op, *args)

    monkeypatch.setattr(_register, "choose", spy)
    for args in samples(PAIR, dtype):
        asked.clear()
        out = call(PAIR, args)
        assert asked == [PAIR, "conv_bn_act", "conv_bn_act"]
        oracle, plain = eager(PAIR, to_float64(args)), eager(PAIR, args)
        assert two_x_rule(out, plain, oracle, reduced(PAIR, args)).ok
    assert rf.explain(PAIR, *args).chosen == "reference"


def test_the_map_between_is_not_kept():
    x, weight = torch.randn(1, 4, 8, 8), torch.randn(6, 4, 3, 3, requires_grad=True)
    weight2, kept = torch.randn(5, 6, 1, 1), []

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rf.functional.conv_bn_act_conv_bn_act(x, weight, None, None, weight2, padding=1, act="relu")
    assert kept == [x.shape, weight.shape, weight2.shape]


@pytest.mark.parametrize(
    ("wanted", "masks"),
    [
        ("x", [[True, False, False]] * 2),
        ("weight", [[True, False, False], [False, True, False]]),
        ("shift", [[True, False, False]]),
        ("weight2", [[False, True, False]]),
        ("shift2", []),
        ("residual", []),
    ],
)
def test_only_the_gradients_wanted_are_computed(wanted, masks, monkeypatch):
    from resnet_fused.ops import conv_bn_act
    from resnet_fused.tuning.calls import argument_names

    args = list(samples(PAIR, torch.float32)[0])
    i = argument_names(PAIR).index(wanted)
    args[i] = args[i].detach().requires_grad_()
    out, computed = call(PAIR, tuple(args)), []
    gradient = conv_bn_act._convolution_gradient

    def spy(*args, which):
        computed.append([which == 0, which == 1, False])
        return gradient(*args, which=which)

    monkeypatch.setattr(conv_bn_act, "_convolution_gradient", spy)
    out.backward(torch.ones_like(out))
    assert computed == masks


def test_backward_within_autocast_keeps_the_forward_s_dtype():
    args = samples(PAIR, torch.float32)[0]
    found = []
    for inside in (False, True):
        leaves = [args[i].clone().requires_grad_() for i in tensor_arguments(args)]
        filled = list(args)
        for i, leaf in zip(tensor_arguments(args), leaves, strict=True):
            filled[i] = leaf
        out = call(PAIR, tuple(filled))
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            out.backward(torch.ones_like(out))
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bytes_are_those_of_the_two_without_the_map_between():
    meta = {"device": "meta", "dtype": torch.bfloat16}
    x, weight = torch.empty(2, 64, 56, 56, **meta), torch.empty(64, 64, 3, 3, **meta)
    weight2, residual = torch.empty(256, 64, 1, 1, **meta), torch.empty(2, 256, 56, 56, **meta)
    narrow, wide = torch.empty(64, device="meta"), torch.empty(256, device="meta")
    geometry = ((1, 1), (1, 1), (1, 1))
    first = (x, weight, narrow, narrow, None, *geometry, 1, "relu")
    second = (x, weight2, wide, wide, residual, (1, 1), (0, 0), (1, 1), 1, "relu")
    apart = sum(OPS["conv_bn_act"].nbytes(*args) for args in (first, second))
    pair = (*first[:4], weight2, wide, wide, residual, *geometry, "relu", "relu")
    assert apart - OPS[PAIR].nbytes(*pair) == 2 * x.nbytes
