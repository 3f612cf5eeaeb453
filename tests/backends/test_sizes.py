"""The one formula of output sizes, beside torch's own layers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_fused.backends._sizes import output_shape, output_size, pool_shape

pair = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None)
@given(kernel=pair, stride=pair, padding=pair, dilation=pair)
def test_convolutions(kernel, stride, padding, dilation):
    x, weight = torch.empty(2, 4, 9, 11, device="meta"), torch.empty(6, 4, *kernel, device="meta")
    y = F.conv2d(x, weight, None, stride, padding, dilation)
    assert output_shape(x.shape, weight.shape, stride, padding, dilation) == tuple(y.shape)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_pools(size, stride):
    x, padding = torch.zeros(2, 5, 9, 8), size // 2
    y = F.max_pool2d(x, size, stride, padding)
    pairs = (size, size), (stride, stride), (padding, padding)
    assert pool_shape(x.shape, *pairs) == tuple(y.shape)


def test_a_map_smaller_than_the_window_has_no_outputs():
    assert output_size((2, 5), (3, 3), (1, 1), (0, 0)) == (0, 3)
