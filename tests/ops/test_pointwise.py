"""A 1x1 convolution whose BatchNorm comes from its input's covariance: `pointwise_bn_act`.

What the contract of every op does not hold: its gradients as a whole, and what a covariance is.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_fused as rf
from resnet_fused.ops import channel_covariance, pointwise_bn_stats
from resnet_fused.testing import gradient_rule, to_float64

OPS = torch.ops.resnet_fused
EPS = 1e-5


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def eager(x, weight, gamma, beta, residual, *, relu=torch.relu):
    z = F.conv2d(x, weight.to(x.dtype))
    return relu(F.batch_norm(z, None, None, gamma, beta, training=True, eps=EPS) + residual)


def inputs(dtype: torch.dtype, pixels: int = 9, c: int = 24, o: int = 40) -> list[Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        draw(1, 4, c, pixels, pixels).relu().to(dtype),
        (draw(2, o, c, 1, 1) / c**0.5).to(dtype),
        draw(3, o).to(wide) + 1,
        draw(4, o).to(wide),
        draw(5, 4, o, pixels, pixels).to(dtype),
    ]


def differentiate(function, given: list[Tensor], grad: Tensor) -> tuple[Tensor, tuple]:
    leaves = [t.detach().clone().requires_grad_() for t in given]
    y = function(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, grad.to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("slope", [0.0, 0.03])
def test_gradients_are_those_of_the_three_modules(dtype, slope):
    """Of random gradients, and of such as follow the result, of which BatchNorm lets little by."""
    given = inputs(dtype)
    y = eager(*[t.double() for t in given])
    grad = draw(6, *y.shape) * 0.1 + slope * y
    ours, found = differentiate(
        lambda *t: rf.functional.pointwise_bn_act(*t, eps=EPS, act="relu"), given, grad
    )
    passed = (ours > 0).double()

    def masked(t: Tensor) -> Tensor:
        return t * passed.to(t.dtype)

    def plain(*t: Tensor) -> Tensor:
        return eager(*t, relu=masked)

    _, theirs = differentiate(plain, given, grad)
    _, exact = differentiate(plain, [t.double() for t in given], grad)
    for i, (g, e, o) in enumerate(zip(found, theirs, exact, strict=True)):
        assert (g.shape, g.dtype) == (given[i].shape, given[i].dtype)
        check = gradient_rule(g, e, o, ours.numel(), dtype)
        assert check.ok, f"argument {i}: {check}"


def test_gradcheck():
    given = [t.requires_grad_() for t in inputs(torch.float64, pixels=3, c=4, o=5)]

    def function(*leaves: Tensor) -> Tensor:
        return rf.functional.pointwise_bn_act(*leaves, eps=EPS, act="relu")

    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    torch.testing.assert_close(function(*given), eager(*given))


@pytest.mark.parametrize("needed", range(5))
def test_each_gradient_alone(needed):
    given = inputs(torch.float32)
    given[needed].requires_grad_()
    rf.functional.pointwise_bn_act(*given, act="relu").square().sum().backward()
    alone = given[needed].grad
    assert all(t.grad is None for i, t in enumerate(given) if i != needed)
    every = [t.detach().requires_grad_() for t in given]
    rf.functional.pointwise_bn_act(*every, act="relu").square().sum().backward()
    torch.testing.assert_close(alone, every[needed].grad)


def test_compiled():
    """With a gradient for what is added, which the op leaves sums on where it is not traced."""
    given = [t.requires_grad_() for t in inputs(torch.float32)]

    def function(*leaves: Tensor) -> Tensor:
        return rf.functional.pointwise_bn_act(*leaves, eps=EPS, act="relu")

    grad = draw(6, *given[4].shape).float()
    ours = torch.autograd.grad(torch.compile(function)(*given), given, grad)
    for a, b in zip(ours, torch.autograd.grad(function(*given), given, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_without_residual_and_activation():
    x, weight, *_ = given = inputs(torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight)]
    y = rf.functional.pointwise_bn_act(*leaves)
    z = F.batch_norm(F.conv2d(x, weight), None, None, training=True, eps=EPS)
    torch.testing.assert_close(y, z)
    grad = draw(7, *y.shape)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(z, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert given[2].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wide_weight_is_rounded_as_it_is_read(dtype):
    """And has a gradient of its own width, not rounded on its way."""
    given = inputs(dtype)
    weight = given[1].float() + 1e-5
    results = []
    for w in (weight, weight.to(dtype)):
        w = w.clone().requires_grad_()
        y = rf.functional.pointwise_bn_act(given[0], w, *given[2:], act="relu")
        y.backward(torch.ones_like(y))
        assert (w.grad.dtype, w.grad.shape) == (w.dtype, w.shape)
        results.append((y, w.grad))
    (y, wide), (same, narrow) = results
    assert torch.equal(y, same)
    assert torch.equal(wide.to(dtype), narrow)
    assert not torch.equal(wide, narrow.float())


def test_the_convolution_s_output_is_not_saved():
    """Of the largest maps of a bottleneck's end, its result alone."""
    given = [t.requires_grad_() for t in inputs(torch.bfloat16, pixels=32, c=32, o=128)]
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = rf.functional.pointwise_bn_act(*given, act="relu")
    x, residual = given[0], given[4]
    assert sum(saved.values()) < y.nbytes + x.nbytes + 2**17
    assert residual.data_ptr() not in saved


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_covariance_of_16_bit_maps_is_right_to_more_digits_than_they_have(offset):
    x = (draw(1, 8, 16, 24, 24) + offset).bfloat16().contiguous(memory_format=torch.channels_last)
    mean, cov = OPS.channel_covariance(x)
    rows = x.double().permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(cov.double(), torch.cov(rows.t(), correction=0), rtol=0, atol=1e-4)
    torch.testing.assert_close(mean.double(), rows.mean(0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_what_it_spoils_in_torch(value):
    given = inputs(torch.float32)
    given[0][1, 3, 2, 2] = value
    ours = rf.functional.pointwise_bn_act(*given, act="relu")
    assert torch.equal(ours.isnan(), eager(*given).isnan())


def small_gradients(size: float) -> tuple:
    """pointwise_bn_gradients' arguments in float16, with g of about this size at 10,000 pixels."""
    x, weight, gamma, *_ = inputs(torch.float16)
    mean, cov = channel_covariance.reference(x)
    moments = pointwise_bn_stats.reference(weight, mean, cov, None, None, EPS)[:2]
    product, sum_g = size * draw(8, *weight.shape), size * draw(9, len(weight))
    given = (product.to(mean), sum_g.to(mean), *moments, mean, cov, gamma)
    return weight, *given, EPS, 10000, mean.dtype


@pytest.mark.parametrize("size", [1e3, 1.0, 1e-3, 1e-8])
def test_what_turns_x_does_not_vanish_in_float16(size):
    args = small_gradients(size)
    *_, of_x, scale, _ = OPS.pointwise_bn_gradients(*args)
    *_, exact, theirs, _ = OPS.pointwise_bn_gradients(*to_float64(args))
    exact = exact * theirs.view(-1, 1, 1, 1)
    ours = of_x.double() * scale.double().view(-1, 1, 1, 1)
    assert (ours - exact).abs().max() < torch.finfo(torch.float16).eps * exact.abs().max()
    assert torch.frexp(scale)[0].eq(0.5).all()


def test_no_gradient_at_all():
    *_, of_x, scale, shift = OPS.pointwise_bn_gradients(*small_gradients(0.0))
    assert scale.eq(1).all()
    assert not of_x.any()
    assert not shift.any()


X, WEIGHT, VECTOR = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1), torch.ones(5)
MOMENTS = (torch.ones(3), torch.eye(3))
BAD = {
    "3x3": ("pointwise_bn_act", (X, torch.randn(5, 3, 3, 3), None, None, None, 0.1, None),
            "weight must be (O, C, 1, 1)"),
    "dtype": ("pointwise_bn_act", (X, WEIGHT.half(), None, None, None, 0.1, None),
              "weight must be torch.float32"),
    "residual": ("pointwise_bn_act", (X, WEIGHT, VECTOR, VECTOR, X, 0.1, None), "residual must"),
    "bn_weight": ("pointwise_bn_act", (X, WEIGHT, VECTOR[:3], None, None, 0.1, None),
                  "bn_weight must have shape (5,)"),
    "eps": ("pointwise_bn_act", (X, WEIGHT, None, None, None, -1.0, None), "eps must"),
    "act": ("pointwise_bn_act", (X, WEIGHT, None, None, None, 0.1, "gelu"), "act must"),
    "rank": ("channel_covariance", (X[0],), "x must have 4 dimensions"),
    "x_cov's shape": ("pointwise_bn_stats", (WEIGHT, VECTOR[:3], X[0, 0], None, None, 0.1),
                      "x_cov must have shape (3, 3)"),
    "x_mean's dtype": ("pointwise_bn_stats",
                       (WEIGHT, MOMENTS[0].double(), MOMENTS[1], None, None, 0.1),
                       "x_mean must be torch.float32"),
    "product": ("pointwise_bn_gradients",
                (WEIGHT, WEIGHT[:2], *[VECTOR] * 3, *MOMENTS, None, 0.1, 32, torch.float32),
                "product must be like weight"),
    "count": ("pointwise_bn_gradients", (WEIGHT, WEIGHT, *[VECTOR] * 3, *MOMENTS, None, 0.1, 0,
              torch.float32),
              "count must be at least 1"),
    "y without act": ("pointwise_bn_act_backward",
                      (torch.randn(2, 5, 4, 4), X, WEIGHT, VECTOR, VECTOR, *MOMENTS, None,
                       torch.randn(2, 5, 4, 4), None, 0.1, None, [True, False]),
                      "y must be given for"),
    "y and its sums": ("pointwise_bn_act_backward",
                       (torch.randn(2, 5, 4, 4), X, WEIGHT, VECTOR, VECTOR, *MOMENTS, None,
                        torch.randn(2, 5, 4, 4), VECTOR, 0.1, "relu", [True, False]),
                       "sum_g must be None"),
    "grad": ("pointwise_bn_act_backward",
             (X, X, WEIGHT, VECTOR, VECTOR, *MOMENTS, None, None, None, 0.1, None,
              [True, False]),
             "grad must have shape (2, 5, 4, 4)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    op, args, message = BAD[case]
    with pytest.raises((ValueError, TypeError)) as raised:
        getattr(OPS, op)(*args)
    assert str(raised.value).startswith(op)
    assert message in str(raised.value)
