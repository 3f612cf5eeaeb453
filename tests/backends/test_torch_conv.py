"""torch's own convolutions of training: in dtypes that the processor does not compute in."""

import pytest
import torch
import torch.nn.functional as F

from resnet_fused.backends import _torch_conv, onednn

LAST = torch.channels_last
#: Kernel, stride, padding, dilation, groups.
GEOMETRIES = [
    (3, (2, 2), (1, 1), (1, 1), 1),
    (1, (2, 1), (0, 0), (1, 1), 1),
    (3, (1, 1), (2, 2), (2, 2), 4),
]
each_call = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _imitated(monkeypatch):
    """As on a processor whose oneDNN computes in float32 alone."""
    monkeypatch.setattr(onednn, "computes_in", lambda dtype: dtype == torch.float32)


def draw(geometry, dtype):
    """Return x and a weight whose gradients will do, and the output's gradient."""
    kernel, *rest = geometry
    g = torch.Generator().manual_seed(kernel)
    x = torch.randn(2, 8, 9, 7, generator=g).to(dtype).to(memory_format=LAST)
    weight = (torch.randn(12, 8 // rest[-1], kernel, kernel, generator=g) / 8).to(dtype)
    y = F.conv2d(x.float(), weight.float(), None, *rest)
    grad = torch.randn(y.shape, generator=g).to(dtype).to(memory_format=LAST)
    return x, weight, grad


@each_dtype
@each_call
def test_they_run_in_float32_and_round_once(geometry, dtype):
    x, weight, grad = draw(geometry, dtype)
    _kernel, *rest = geometry
    wide = [t.float().requires_grad_() for t in (x, weight)]
    want = F.conv2d(*wide, None, *rest)
    want.backward(grad.float())
    residual = torch.ones_like(x)
    made = (
        _torch_conv.forward(x, weight, *rest),
        _torch_conv.backward_data(grad, weight, x.shape, *rest, residual),
        _torch_conv.backward_weight(grad, x, weight.shape, *rest, False, dtype),
    )
    wanted = (want, wide[0].grad + 1, wide[1].grad)
    for got, expected in zip(made, wanted, strict=True):
        assert got.dtype == dtype
        # Sums in another order may fall to the other side of a tie.
        torch.testing.assert_close(
            got.float(), expected.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=1e-6
        )
    unrounded = _torch_conv.backward_weight(grad, x, weight.shape, *rest, False, torch.float32)
    torch.testing.assert_close(unrounded, wide[1].grad, rtol=1e-4, atol=1e-5)
