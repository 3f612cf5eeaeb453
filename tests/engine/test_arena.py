"""Placing buffers: nothing alive at the same time shares a byte, and memory is used again."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_fused.engine.arena import Buffer, place, view

lifetimes = st.tuples(st.integers(0, 300), st.integers(0, 20), st.integers(0, 20))


def buffers_from(drawn: list[tuple[int, int, int]]) -> list[Buffer]:
    return [Buffer(nbytes, min(a, b), max(a, b)) for nbytes, a, b in drawn]


@given(st.lists(lifetimes, max_size=24))
def test_buffers_alive_together_are_apart(drawn):
    buffers = buffers_from(drawn)
    total = place(buffers)
    for buffer in buffers:
        assert buffer.offset % 64 == 0
        assert 0 <= buffer.offset <= buffer.offset + buffer.nbytes <= total
    for a, b in itertools.combinations(buffers, 2):
        apart = a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
        assert apart or not a.meets(b) or not a.nbytes or not b.nbytes


@given(st.lists(lifetimes, min_size=1, max_size=24))
def test_no_more_than_the_sum(drawn):
    buffers = buffers_from(drawn)
    assert place(buffers) <= sum(-(-b.nbytes // 64) * 64 for b in buffers)


def test_a_chain_needs_two_buffers():
    chain = [Buffer(1000, i, i + 1) for i in range(50)]
    assert place(chain) == 2 * 1024


def test_views_are_channels_last():
    block = torch.arange(4096, dtype=torch.int64).to(torch.uint8)
    buffer = Buffer(2 * 3 * 4 * 5 * 4, 0, 1, offset=64)
    x = view(block, buffer, (2, 3, 4, 5), torch.float32)
    assert x.stride() == (60, 1, 15, 3)
    assert x.data_ptr() == block.data_ptr() + 64
    assert view(block, Buffer(24, 0, 1, offset=128), (2, 3), torch.float32).stride() == (3, 1)
