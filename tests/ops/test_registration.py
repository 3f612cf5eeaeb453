"""What torch knows about each op: schema, gradients, autocast, compilation, FLOPs."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from formulas import DTYPES, call, eager, samples, tensor_arguments
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused as rf
from resnet_fused.ops import INFERENCE, OPS

each_op = pytest.mark.parametrize("op", INFERENCE)


def leaves(args: tuple) -> tuple:
    return tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args)


def some(op: str, dtype: torch.dtype) -> list[tuple]:
    """A fifth of the samples: every argument is there in one and left out in another."""
    return samples(op, dtype)[::5]


@each_op
def test_opcheck(op):
    """Schema, autograd registration, fake tensors and AOT dispatch, as torch checks them."""
    handle = getattr(torch.ops.resnet_fused, op).default
    for args in some(op, torch.float32):
        torch.library.opcheck(handle, leaves(args))


@each_op
def test_gradcheck(op):
    for args in samples(op, torch.float64)[1::2]:
        chosen = [i for i in tensor_arguments(args) if args[i].numel()]

        def function(*tensors, args=args, chosen=chosen):
            filled = list(args)
            for i, tensor in zip(chosen, tensors, strict=True):
                filled[i] = tensor
            return call(op, tuple(filled))

        inputs = [args[i].detach().requires_grad_() for i in chosen]
        assert not inputs or torch.autograd.gradcheck(function, inputs, fast_mode=True)


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_result_is_the_real_one_s_shape(op, dtype):
    for args in samples(op, dtype):
        real = call(op, args)
        fake = call(op, tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args))
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("wanted", "masks"),
    [
        ("x", [[True, False, False]]),
        ("weight", [[False, True, False]]),
        ("scale", [[False, True, False]]),
        ("shift", []),
        ("residual", []),
    ],
)
def test_only_the_gradients_wanted_are_computed(wanted, masks):
    names = list(inspect.signature(OPS["conv_bn_act"].check).parameters)
    full = [a for a in samples("conv_bn_act", torch.float32) if all(t is not None for t in a[:5])]
    args = list(full[0])
    i = names.index(wanted)
    args[i] = args[i].detach().requires_grad_()
    out = call("conv_bn_act", tuple(args))
    with _Log() as log:
        out.backward(torch.ones_like(out))
    convolutions = [a for f, a in log.calls if f is torch.ops.aten.convolution_backward.default]
    assert [a[-1] for a in convolutions] == masks


@each_op
def test_no_gradients_no_graph(op):
    for args in some(op, torch.float32):
        assert not call(op, args).requires_grad
        with torch.no_grad():
            assert not call(op, leaves(args)).requires_grad


# --- autocast ------------------------------------------------------------------------------------


@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_what_the_op_names(op, dtype):
    names = list(inspect.signature(OPS[op].check).parameters)
    for args in samples(op, torch.float32):
        with torch.autocast("cpu", dtype):
            out = call(op, args)
        cast = tuple(
            a.to(dtype) if name in OPS[op].autocast and isinstance(a, Tensor) else a
            for name, a in zip(names, args, strict=True)
        )
        assert out.dtype == dtype
        assert torch.equal(out, call(op, cast))


@each_op
def test_autocast_leaves_float64(op):
    for args in some(op, torch.float64):
        with torch.autocast("cpu", torch.bfloat16):
            out = call(op, args)
        assert out.dtype == torch.float64
        assert torch.equal(out, call(op, args))


@each_op
def test_gradients_through_autocast_have_the_parameters_dtype(op):
    args = leaves(samples(op, torch.float32)[1])
    with torch.autocast("cpu", torch.bfloat16):
        out = call(op, args)
    out.sum().backward()
    for i in tensor_arguments(args):
        assert args[i].grad.dtype == torch.float32


# --- torch.compile -------------------------------------------------------------------------------


@each_op
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(op, dynamic):
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    def compiled(*args):
        return call(op, args) * 2

    for args in (samples(op, torch.float32)[1], samples(op, torch.float32)[3]):
        ours, plain = leaves(args), leaves(args)
        value, expected = compiled(*ours), call(op, plain) * 2
        assert torch.equal(value, expected)
        assert value.stride() == expected.stride()
        value.sum().backward()
        expected.sum().backward()
        for i in tensor_arguments(args):
            torch.testing.assert_close(ours[i].grad, plain[i].grad)


# --- costs ---------------------------------------------------------------------------------------


@each_op
def test_flops_are_those_that_torch_counts_for_the_eager_chain(op):
    for args in samples(op, torch.float32):
        with FlopCounterMode(display=False) as plain:
            eager(op, args)
        with FlopCounterMode(display=False) as fused:
            call(op, args)
        assert fused.get_total_flops() == plain.get_total_flops()


@each_op
def test_nbytes_count_each_tensor_once(op):
    for args in samples(op, torch.bfloat16):
        tensors = [args[i] for i in tensor_arguments(args)]
        assert OPS[op].nbytes(*args) == sum(t.nbytes for t in [*tensors, call(op, args)])


# --- ownership -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [b.name for b in rf.backends() if b.available])
def test_results_are_the_caller_s_own(backend):
    """Large enough that a backend may want to use memory again."""
    x, weight = torch.randn(2, 32, 96, 96), torch.randn(32, 32, 1, 1)
    with rf.use_backend(backend):
        first = rf.functional.conv_bn_act(x, weight)
        kept, view, array = first.clone(), first[1:, ::2], first.numpy()
        results = [rf.functional.conv_bn_act(x + i, weight) for i in range(3)]
        assert torch.equal(first, kept)
        del first
        results += [rf.functional.conv_bn_act(x + i, weight) for i in range(3)]
    assert torch.equal(view, kept[1:, ::2])
    assert torch.equal(torch.from_numpy(array), kept)
    assert len({r.data_ptr() for r in results}) == len(results)


def test_a_result_saved_for_backward_stays():
    x, weight = torch.randn(2, 32, 96, 96), torch.randn(32, 32, 1, 1).requires_grad_()
    out = rf.functional.conv_bn_act(x, weight, act="relu").square().sum()
    with torch.no_grad():
        for i in range(3):
            rf.functional.conv_bn_act(x + i, weight, act="relu")
    out.backward()
    twin = weight.detach().requires_grad_()
    F.conv2d(x, twin).relu().square().sum().backward()
    torch.testing.assert_close(weight.grad, twin.grad, rtol=1e-4, atol=1e-2)


def test_op_arguments_fill_in_the_defaults():
    x, weight = torch.randn(1, 2, 3, 3), torch.randn(2, 2, 1, 1)
    args = rf.functional.op_arguments("conv_bn_act", x, weight)
    assert args[2:] == (None, None, None, [1, 1], [0, 0], [1, 1], 1, None)
    assert math.prod(call("conv_bn_act", args).shape) == 18
