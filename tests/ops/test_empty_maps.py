"""Empty maps in training: a part of a batch that SyncBatchNorm joins may have no images."""

import pytest
import torch
from devices import device_of, moved
from test_training_ops import (
    TRAINING_BACKENDS,
    chain_inputs,
    declined,
    differentiate,
    each_dtype,
    each_pair,
)

import resnet_fused as rf
from resnet_fused.ops import TRAINING


@each_pair
def test_empty_maps_are_not_declined(op, backend):
    """A part of a batch may be empty, and a refusal in backward would come too late."""
    for args in TRAINING[op].samples(device_of(backend), torch.float32):
        reason = None if args[0].numel() else declined(op, backend, args)
        assert not reason or "pool" in reason


@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
@each_dtype
def test_gradients_of_an_empty_part_are_empty_or_zero(backend, dtype):
    """With statistics of other parts, and channels enough for convolutions of a backend's own."""
    x, w1, g1, b1, w2, g2, b2, *_ = moved(
        tuple(chain_inputs(dtype, channels=40)), device_of(backend)
    )
    if reason := declined("bn_act", backend, (x,)):
        pytest.skip(reason)
    ops, statistics = torch.ops.resnet_fused, (torch.zeros_like(g1), torch.ones_like(g1))

    def network(x, w1, g1, b1, w2, g2, b2, ws):
        z1 = ops.conv_bn_stats(x, w1, [1, 1], [1, 1], [1, 1], 1)[0]
        y = ops.bn_act_max_pool(z1, *statistics, g1, b1, 1e-5, "relu", [3, 3], [2, 2], [1, 1])[0]
        z2 = ops.conv_bn_stats(y, w2, [1, 1], [1, 1], [1, 1], 1)[0]
        bn = (*statistics, g2, b2)
        z3 = ops.bn_act_conv_bn_stats(z2, *bn, ws, 1e-5, "relu", [1, 1], [0, 0], [1, 1], 1)[0]
        y, _ = ops.dual_bn_act(z3, *bn, y, *statistics, g1, b1, 1e-5, 1e-5, "relu")
        return ops.bn_act(z2, *bn, y, 1e-5, "relu")[0]

    ws = torch.ones(40, 40, 1, 1, dtype=dtype, device=x.device)
    inputs = [x[:0], w1, g1, b1, w2, g2, b2, ws]
    with rf.use_backend(backend):
        grads = differentiate(network, inputs, torch.ones(0, 40, 6, 5, device=x.device))
    for grad, given in zip(grads, inputs, strict=True):
        assert (grad.shape, grad.dtype) == (given.shape, given.dtype)
        assert not grad.any()
