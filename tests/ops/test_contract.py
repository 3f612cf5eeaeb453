"""The contract of every op on every backend: what comes out, and what does not change.

Ops and backends are read off their lists; a new one is tested without a line here. Samples that a
backend declines are not run for it, but each must run some (:func:`test_every_backend_runs_some`).
"""

import functools
import inspect
import math

import pytest
import torch
from devices import moved
from formulas import (
    DTYPES,
    PAIRS,
    call,
    eager,
    own_choices,
    reduced,
    samples,
    tensor_arguments,
)
from torch import Tensor

import resnet_fused as rf
from resnet_fused.ops import OPS
from resnet_fused.testing import gradient_rule, to_float64, two_x_rule

each_pair = pytest.mark.parametrize(("op", "backend"), PAIRS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _on(request):
    """Ask for the test's backend by name, so that nothing is handed over silently."""
    with rf.use_backend(request.getfixturevalue("backend")):
        yield


def is_laid_out(y: Tensor) -> bool:
    """Whether a map is channels_last, or what is no map is contiguous: to the letter."""
    if y.dim() != 4:
        return y.numel() == 0 or y.stride() == torch.empty(y.shape, device="meta").stride()
    _, c, h, w = y.shape
    return y.numel() == 0 or y.stride() == (h * w * c, 1, w * c, c)


def assert_contract(op: str, args: tuple) -> None:
    before = [args[i].clone() for i in tensor_arguments(args)]
    out = call(op, args)
    with torch.no_grad():
        oracle, plain = eager(op, to_float64(args)), eager(op, args)
    assert (out.shape, out.dtype) == (oracle.shape, args[0].dtype)
    assert is_laid_out(out)
    check = two_x_rule(out, plain, oracle, reduced(op, args))
    assert check.ok, f"{check} for {describe(args)}"
    for i, kept in zip(tensor_arguments(args), before, strict=True):
        assert torch.equal(args[i], kept), f"argument {i} was written"
        shares = args[i].untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
        assert not shares or not out.numel(), f"the result is argument {i}"
    assert torch.equal(call(op, args), out), f"not repeatable: {describe(args)}"


def describe(args: tuple) -> str:
    return str([tuple(a.shape) if isinstance(a, Tensor) else a for a in args])


@each_pair
def test_every_backend_runs_some(op, backend):
    assert any(samples(op, dtype, backend) for dtype in DTYPES)


@each_pair
@each_dtype
def test_result(op, backend, dtype):
    for args in samples(op, dtype, backend):
        assert_contract(op, args)


# --- layouts -------------------------------------------------------------------------------------


def sliced(t: Tensor) -> Tensor:
    """Every other element of a larger tensor, not from its start."""
    big = torch.full([2 * n + 1 for n in t.shape], torch.nan, dtype=t.dtype, device=t.device)
    part = big[tuple(slice(1, None, 2) for _ in t.shape)]
    return part.copy_(t)


def expanded(t: Tensor) -> Tensor:
    """Stride 0 over the batch (output channels of a weight, elements of a vector)."""
    return t[:1].expand_as(t)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


LAYOUTS = (channels_last, sliced, expanded, transposed, torch.Tensor.contiguous)


@each_pair
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts(op, backend, dtype, layout):
    for args in samples(op, dtype, backend)[::3]:
        assert_contract(op, tuple(layout(a) if isinstance(a, Tensor) else a for a in args))


@each_pair
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_of_one_argument(op, backend, layout):
    for args in samples(op, torch.float32, backend)[1:8:3]:
        for i in tensor_arguments(args):
            assert_contract(op, (*args[:i], layout(args[i]), *args[i + 1 :]))


# --- not finite ----------------------------------------------------------------------------------


@each_pair
@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(op, backend, dtype, value):
    """NaN and infinity are where torch has them; a backend may fold the scale, so that stays."""
    if backend == "cudnn" and dtype == torch.float16 and math.isinf(value):
        pytest.skip("some of cuDNN's kernels give large numbers for infinity in float16")
    names = list(inspect.signature(OPS[op].check).parameters)
    for args in samples(op, dtype, backend):
        padded = any(dict(zip(names, args, strict=True)).get("padding", ()))
        for i in tensor_arguments(args):
            if args[i].numel() == 0 or (names[i].startswith("scale") and not math.isnan(value)):
                continue
            if names[i] == "weight" and padded:
                continue  # in torch, too, the algorithm decides if it meets the padding's zeros
            spoiled = args[i].clone()
            spoiled.view(-1)[spoiled.numel() // 2] = value
            changed = (*args[:i], spoiled, *args[i + 1 :])
            # On the CPU, as eager torch on a GPU is cuDNN too.
            out, expected = call(op, changed).cpu(), OPS[op].reference(*moved(changed, "cpu"))
            where = f"{names[i]} of {describe(args)}"
            assert torch.equal(out.isnan(), expected.isnan()), where
            assert torch.equal(out == torch.inf, expected == torch.inf), where
            assert torch.equal(out == -torch.inf, expected == -torch.inf), where


# --- gradients -----------------------------------------------------------------------------------


def gradients(function, args: tuple, grad: Tensor) -> list[Tensor]:
    leaves = [args[i].detach().requires_grad_() for i in tensor_arguments(args)]
    filled = list(args)
    for i, leaf in zip(tensor_arguments(args), leaves, strict=True):
        filled[i] = leaf
    return list(torch.autograd.grad(function(tuple(filled)), leaves, grad.to(leaves[0].dtype)))


@each_pair
@each_dtype
def test_gradients(op, backend, dtype):
    for args in samples(op, dtype, backend):
        out = call(op, args)
        # The op's own: a flip at the kink or of a maximum is the forward's error, not this one's.
        choices = own_choices(op, args, out)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        ours = gradients(functools.partial(call, op), args, grad)
        plain, oracle = (
            gradients(functools.partial(eager, op, choices=choices), a, grad)
            for a in (args, to_float64(args))
        )
        terms = reduced(op, args) * max(1, out[:, 0].numel())
        for i, g, e, o in zip(tensor_arguments(args), ours, plain, oracle, strict=True):
            assert (g.shape, g.dtype) == (args[i].shape, args[i].dtype)
            check = gradient_rule(g, e, o, terms, dtype)
            assert check.ok, f"argument {i} of {describe(args)}: {check}"


@each_pair
def test_each_gradient_alone(op, backend):
    """One argument's gradient is the same whether or not the others are wanted."""
    for args in samples(op, torch.float32, backend)[1::4]:
        out = call(op, args)
        together = gradients(functools.partial(call, op), args, torch.ones_like(out))
        for i, expected in zip(tensor_arguments(args), together, strict=True):
            leaf = args[i].detach().requires_grad_()
            alone = (*args[:i], leaf, *args[i + 1 :])
            (grad,) = torch.autograd.grad(call(op, alone), leaf, torch.ones_like(out))
            torch.testing.assert_close(grad, expected)
