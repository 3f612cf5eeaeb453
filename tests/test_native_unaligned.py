"""Inputs whose elements lie at odd addresses, as those of a view of a file's bytes may."""

import pytest
import torch
from nets import assert_same_model, image, small_net

import resnet_fused as rf


def at_an_odd_address(t: torch.Tensor) -> torch.Tensor:
    """Return a copy of ``t`` whose memory is not aligned to its elements."""
    memory = bytearray(t.nbytes + t.element_size() + 1)
    offset = 1 + torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 2
    copied = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
    order = t.permute(0, 2, 3, 1) if t.dim() == 4 else t
    copied = copied.view(order.shape).copy_(order)
    made = copied.permute(0, 3, 1, 2) if t.dim() == 4 else copied
    assert made.data_ptr() % t.element_size()
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops(dtype):
    x, residual = torch.randn(2, 4, 6, 6).to(dtype), torch.randn(2, 8, 6, 6).to(dtype)
    weight, head = torch.randn(8, 4, 3, 3).to(dtype), torch.randn(5, 4).to(dtype)
    for f in (
        lambda x, r: rf.functional.conv_bn_act(x, weight, residual=r, padding=1, act="relu"),
        lambda x, r: rf.functional.conv_bn_act_max_pool(x, weight, padding=1, pool_size=2),
        lambda x, r: rf.functional.avg_pool_linear(x, head),
    ):
        y = f(*map(at_an_odd_address, (x, residual)))
        assert torch.equal(y, f(x, residual))


def test_a_fused_model():
    model, x = small_net(), image(2, 3, 32, 32)
    assert_same_model(rf.fuse(model), model, at_an_odd_address(x), reduced=144)
