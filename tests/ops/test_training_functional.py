"""The public functions of training: a block built of them is torch's own; bad input is named."""

import pytest
import torch
import torch.nn.functional as F
from nets import Residual, image
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.functional import (
    bn_act,
    bn_act_conv_bn_stats,
    bn_act_max_pool,
    bn_update_stats,
    conv_bn_stats,
    dual_bn_act,
)
from resnet_fused.ops import TRAINING

X = image(4, 6, 9, 7)


def own_block(block: Residual, x: Tensor) -> Tensor:
    """The block of the module's docstring, with a projection where the block has one."""
    first, second = (block.bn1.weight, block.bn1.bias), (block.bn2.weight, block.bn2.bias)
    z1, *m1 = conv_bn_stats(x, block.conv1.weight, stride=block.conv1.stride, padding=1)
    z2, *m2 = bn_act_conv_bn_stats(z1, *m1, *first, block.conv2.weight, act="relu", padding=1)
    seen = [(block.bn1, z1, m1), (block.bn2, z2, m2)]
    if block.downsample is None:
        y = bn_act(z2, *m2, *second, x, act="relu")
    else:
        conv, bn = block.downsample
        zs, *ms = conv_bn_stats(x, conv.weight, stride=conv.stride)
        y = dual_bn_act(z2, *m2, *second, zs, *ms, bn.weight, bn.bias, act="relu")
        seen.append((bn, zs, ms))
    for bn, z, (mean, var) in seen:
        bn_update_stats(*bn.buffers(), mean, var, z.numel() // z.shape[1], bn.momentum)
    return y


@pytest.mark.parametrize(("out", "stride"), [(6, 1), (8, 2)])
def test_a_block_of_one_s_own(out, stride):
    torch.manual_seed(0)
    ours, eager = Residual(6, out, stride).train(), Residual(6, out, stride).train()
    eager.load_state_dict(ours.state_dict())
    results = own_block(ours, X), eager(X)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    for y in results:
        (y * image(*y.shape)).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=name)
    for a, b in zip(ours.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_stem_of_one_s_own():
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5)
    z, mean, var = conv_bn_stats(X, conv.weight)
    y = bn_act_max_pool(z, mean, var, bn.weight, bn.bias, act="relu", pool_size=2, pool_padding=0)
    eager = F.max_pool2d(torch.relu(bn(conv(X))), 2)
    torch.testing.assert_close(y, eager, rtol=1e-4, atol=1e-5)


def test_defaults_are_those_of_batch_norm_alone():
    z, mean, var = conv_bn_stats(X, torch.eye(6).view(6, 6, 1, 1))
    expected = F.batch_norm(X, None, None, training=True)
    torch.testing.assert_close(bn_act(z, mean, var), expected, rtol=1e-4, atol=1e-5)


def public(op: str) -> bool:
    return TRAINING[op].backward is not None or bool(TRAINING[op].mutates)


@pytest.mark.parametrize("op", [op for op in TRAINING if public(op)])
def test_each_is_public_and_explained(op):
    """Beside those that are part of a backward; given the op's arguments, it fills in the rest."""
    assert callable(getattr(rf.functional, op))
    args = next(iter(TRAINING[op].samples("cpu", torch.float32)))
    filled = rf.functional.op_arguments(op, *args)
    assert len(filled) == len(args)
    assert rf.explain(op, *args).chosen


def test_arguments_left_out():
    args = rf.functional.op_arguments("conv_bn_stats", X, torch.ones(2, 6, 1, 1))
    assert args[2:] == ([1, 1], [0, 0], [1, 1], 1)
    with pytest.raises(TypeError, match="bn_act: var must be given"):
        rf.functional.op_arguments("bn_act", X, torch.ones(6))
    with pytest.raises(TypeError, match="add_relu takes 2 arguments"):
        rf.functional.op_arguments("add_relu", X, X, X)


BAD = {
    "stride": lambda: conv_bn_stats(X, torch.ones(2, 6, 1, 1), stride=(1, 2, 3)),
    "padding": lambda: conv_bn_stats(X, torch.ones(2, 6, 1, 1), padding="same"),
    "pool_size": lambda: bn_act_max_pool(X, *[torch.ones(6)] * 2, pool_size=1.5),
    "mean": lambda: bn_act(X, torch.ones(5), torch.ones(6)),
    "residual": lambda: dual_bn_act(X, *[torch.ones(6)] * 4, X[:1], *[torch.ones(6)] * 2),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    with pytest.raises(ValueError, match=f": {name} must"):
        BAD[name]()
