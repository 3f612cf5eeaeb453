"""The ops of training with live BatchNorm, forward and backward, on every backend.

Each result is held to float64 beside the op's own reference; the gradients of whole chains to those
of torch's own modules, in float64, with the choice of ReLU fixed.
"""

import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from devices import device_of, moved
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.backends import ORDER
from resnet_fused.ops import TRAINING, _bn
from resnet_fused.testing import gradient_rule, to_float64, two_x_rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = [b.name for b in rf.backends() if b.available]
PAIRS = [(op, b) for op in TRAINING for b in BACKENDS if b == "reference" or hasattr(ORDER[b], op)]
TRAINING_BACKENDS = [b for b in BACKENDS if b == "reference" or hasattr(ORDER[b], "bn_act")]
FORWARD = [name for name, op in TRAINING.items() if op.backward is not None]

each_op = pytest.mark.parametrize("op", TRAINING)
each_forward = pytest.mark.parametrize("op", FORWARD)
each_pair = pytest.mark.parametrize(("op", "backend"), PAIRS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def call(op: str, args: tuple) -> tuple:
    out = getattr(torch.ops.resnet_fused, op)(*args)
    return out if isinstance(out, tuple) else () if out is None else (out,)


def fresh(args: tuple) -> tuple:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in args)


def declined(op: str, backend: str, args: tuple) -> str | None:
    with rf.use_backend(backend):
        return ORDER[backend].supports(op, *args) if backend in ORDER else None


def samples(op: str, dtype: torch.dtype, backend: str = "reference") -> list[tuple]:
    drawn = TRAINING[op].samples(device_of(backend), dtype)
    return [args for args in drawn if not declined(op, backend, args)]


def rounded_to(op: str, args: tuple) -> torch.dtype | None:
    """What an op rounds to on its way to a result that is of another dtype."""
    sides = ("bn_act_conv_backward_data", "bn_act_conv_backward_weight", "bn_act_conv_backward")
    ops = (*sides, "conv_backward_weight", "pointwise_bn_act_backward")
    return args[0].dtype if op in ops else None


def terms(args: tuple) -> int:
    """No more than this many products meet in an element: the largest tensor's elements."""
    return max(a.numel() for a in args if isinstance(a, Tensor))


def peak(args: tuple) -> float:
    """The size of what is summed, where sums cancel."""
    tensors = [a for a in args if isinstance(a, Tensor) and a.numel()]
    return max(float(a.abs().nan_to_num().max()) for a in tensors)


def cancelled(op: str, args: tuple) -> float:
    """The size of what a gradient through BatchNorm adds up, which of two images is next to 0."""
    if not op.endswith(("bn_act_backward", "backward_apply")) or not args[0].numel():
        return 0.0
    given = dict(zip(inspect.signature(TRAINING[op].reference).parameters, args, strict=True))
    sizes = []
    for whose in ("", "residual_"):
        if whose + "var" in given:
            weight, var = given[whose + "weight"], given[whose + "var"]
            scale = (1 if weight is None else weight.abs()) / (var + given["eps"]).sqrt()
            sizes.append(float(scale.nan_to_num().max()))
    return float(args[0].abs().nan_to_num().max()) * max(sizes)


@pytest.fixture(autouse=True)
def _convolutions_repeat(monkeypatch):
    """Have cuDNN add up its gradients in one order, which it does only if it is asked."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@each_pair
def test_every_backend_runs_some(op, backend):
    assert any(samples(op, dtype, backend) for dtype in DTYPES)


@each_pair
@each_dtype
def test_result(op, backend, dtype):
    for args in samples(op, dtype, backend):
        given, kept = fresh(args), fresh(args)
        with rf.use_backend(backend):
            outs = call(op, given)
            again = call(op, fresh(args))
        plain, exact = fresh(args), fresh(to_float64(args))
        plains, oracles = TRAINING[op].reference(*plain), TRAINING[op].reference(*exact)
        if TRAINING[op].mutates:
            written = [i for i in TRAINING[op].mutates if given[i] is not None]
            outs, again = [given[i] for i in written], [given[i] for i in written]
            plains, oracles = [plain[i] for i in written], [exact[i] for i in written]
        elif isinstance(plains, Tensor):
            plains, oracles = (plains,), (oracles,)
        for out, same, p, o in zip(outs, again, plains, oracles, strict=True):
            assert (out.shape, out.dtype) == (p.shape, p.dtype)
            assert same_values(out, same)
            if not out.is_floating_point():
                # Which of its own values passed; at the kink the reference's may be others.
                assert torch.equal(
                    out, _bn.bits_of(outs[0]) if out.numel() and op in _bn.WITH_BITS else p
                )
                continue
            if o.shape != p.shape:  # a copy, of 16-bit maps alone
                assert torch.equal(out, p)
                continue
            check = two_x_rule(out, p, o, terms(args), rounded_to(op, args), cancelled(op, args))
            floor = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
            slack = floor * peak(args) * terms(args) ** 0.5 if out.numel() and out.dim() == 1 else 0
            assert check.error <= check.allowed + slack, check
        for i, (a, b) in enumerate(zip(given, kept, strict=True)):
            if isinstance(a, Tensor) and i not in TRAINING[op].mutates:
                assert same_values(a, b), f"argument {i} was written"


def same_values(a, b):
    """Whether two tensors are equal, NaN being like NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@each_op
@each_dtype
def test_fake_results_have_the_real_ones_shapes(op, dtype):
    for args in samples(op, dtype):
        meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
        for real, fake in zip(call(op, fresh(args)), call(op, meta), strict=True):
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
            assert fake.stride() == real.stride() or not real.numel()


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(op, dtype):
    handle = getattr(torch.ops.resnet_fused, op).default
    for args in samples(op, dtype)[:: 5 if dtype == torch.float32 else 9]:
        wanted = {0} if op in FORWARD else set()
        given = tuple(
            a.clone().requires_grad_() if i in wanted and isinstance(a, Tensor) else a
            for i, a in enumerate(fresh(args))
        )
        torch.library.opcheck(handle, given)


@pytest.mark.parametrize("op", [n for n in TRAINING if n not in FORWARD and n != "bn_update_stats"])
def test_a_part_of_another_op_has_no_gradient_of_its_own(op):
    args = fresh(samples(op, torch.float32)[0])
    args[0].requires_grad_()
    out = call(op, args)[0]
    with pytest.raises(RuntimeError, match=f"{op}: has no gradient of its own: use the op it"):
        out.sum().backward()


# --- chains: what a block computes, beside torch's own -------------------------------------------


def batch_norm(x, weight, bias, eps=1e-5):
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def chain(x, w1, g1, b1, w2, g2, b2, ws, gs, bs, *, relu):
    """A basic block with a projection, then one with an identity, as torch writes them."""
    a = relu(batch_norm(F.conv2d(x, w1, stride=2, padding=1), g1, b1), 0)
    z = batch_norm(F.conv2d(a, w2, padding=1), g2, b2)
    y = relu(z + batch_norm(F.conv2d(x, ws, stride=2), gs, bs), 1)
    return relu(batch_norm(F.conv2d(y, w2, padding=1), g2, b2) + y, 2)


def fused_chain(x, w1, g1, b1, w2, g2, b2, ws, gs, bs, *, seen):
    ops = torch.ops.resnet_fused
    same = ([1, 1], [1, 1], [1, 1], 1)
    z1, m1, v1 = ops.conv_bn_stats(x, w1, [2, 2], [1, 1], [1, 1], 1)
    z2, m2, v2 = ops.bn_act_conv_bn_stats(z1, m1, v1, g1, b1, w2, 1e-5, "relu", *same)
    zs, ms, vs = ops.conv_bn_stats(x, ws, [2, 2], [0, 0], [1, 1], 1)
    y, _ = ops.dual_bn_act(z2, m2, v2, g2, b2, zs, ms, vs, gs, bs, 1e-5, 1e-5, "relu")
    z3, m3, v3 = ops.conv_bn_stats(y, w2, *same)
    out, _ = ops.bn_act(z3, m3, v3, g2, b2, y, 1e-5, "relu")
    seen += [ops.bn_act(z1, m1, v1, g1, b1, None, 1e-5, "relu")[0], y, out]
    return out


def chain_inputs(dtype: torch.dtype, channels: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(to)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = [[draw(channels, to=wide) + 1, draw(channels, to=wide)] for _ in range(3)]
    x = draw(4, 6, 12, 10)
    w1, w2, ws = draw(channels, 6, 3, 3), draw(channels, channels, 3, 3), draw(channels, 6, 1, 1)
    return [x, w1, *vectors[0], w2, *vectors[1], ws, *vectors[2]]


def differentiate(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, grad.to(leaves[0].dtype)))


@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
@each_dtype
def test_gradients_of_a_chain(backend, dtype):
    inputs, seen = moved(tuple(chain_inputs(dtype)), device_of(backend)), []
    if reason := declined("bn_act", backend, (inputs[0],)):
        pytest.skip(reason)
    with rf.use_backend(backend):
        ours_of = functools.partial(fused_chain, seen=seen)
        grad = torch.randn(4, 8, 6, 5, generator=torch.Generator().manual_seed(9))
        grad = grad.to(inputs[0])
        ours = differentiate(ours_of, inputs, grad)
    masks = [t > 0 for t in seen]

    def relu(t: Tensor, place: int) -> Tensor:
        return t * masks[place].to(t.dtype)

    eager = functools.partial(chain, relu=relu)
    plain = differentiate(eager, inputs, grad)
    oracle = differentiate(eager, [t.double() for t in inputs], grad.double())
    for i, (g, e, o) in enumerate(zip(ours, plain, oracle, strict=True)):
        assert (g.shape, g.dtype) == (inputs[i].shape, inputs[i].dtype)
        check = gradient_rule(g, e, o, 8 * 9 * 120, dtype)
        assert check.ok, f"input {i}: {check}"


def test_gradcheck_of_a_chain():
    inputs = [t.requires_grad_() for t in chain_inputs(torch.float64, channels=3)]

    def function(*leaves: Tensor) -> Tensor:
        return fused_chain(*leaves, seen=[])

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_gradcheck_of_the_stem():
    generator = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
        for s in ((2, 2, 9, 9), (3, 2, 3, 3), (3,), (3,))
    ]

    def stem(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        ops = torch.ops.resnet_fused
        z, mean, var = ops.conv_bn_stats(x, weight, [1, 1], [1, 1], [1, 1], 1)
        pool = ([3, 3], [2, 2], [1, 1])
        return ops.bn_act_max_pool(z, mean, var, gamma, beta, 1e-5, "relu", *pool)[0]

    assert torch.autograd.gradcheck(stem, inputs, fast_mode=True)
    z = F.conv2d(inputs[0], inputs[1], padding=1)
    eager = F.max_pool2d(torch.relu(batch_norm(z, *inputs[2:])), 3, 2, 1)
    torch.testing.assert_close(stem(*inputs), eager)


def test_only_wanted_gradients_are_computed():
    """The parts that ask for none get none, and their kernels do not run."""
    x, w1, g1, b1, *_ = chain_inputs(torch.float32)
    w1.requires_grad_()
    z, mean, var = torch.ops.resnet_fused.conv_bn_stats(x, w1, [1, 1], [1, 1], [1, 1], 1)
    y, _ = torch.ops.resnet_fused.bn_act(z, mean, var, g1, b1, None, 1e-5, "relu")
    assert not mean.requires_grad
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "resnet_fused::conv_backward_weight" in names
    assert "resnet_fused::conv_backward_data" not in names
    assert x.grad is None


# --- what passed ReLU, as bits -------------------------------------------------------------------


@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [8, 24, 64, 136])
def test_bits_say_what_passed(backend, dtype, channels):
    """A bit for each value, NaN's among them; backward by them is backward by the values."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device_of(backend))

    x, r, grad = (draw(2, channels, 5, 3).to(dtype) for _ in range(3))
    if reason := declined("bn_act", backend, (x,)):
        pytest.skip(reason)
    mean, var, gamma, beta = draw(channels), draw(channels).abs() + 0.1, *draw(2, channels)
    with rf.use_backend(backend):
        for value in (0.0, torch.nan, torch.inf, -torch.inf):
            r[1, channels - 1, 2, 1] = value
            y, bits = torch.ops.resnet_fused.bn_act(x, mean, var, gamma, beta, r, 1e-5, "relu")
            assert bits.dtype == torch.uint8
            assert bits.shape == (2, channels // 8, 5, 3)
            assert torch.equal(_bn.passed_by(bits), ~(y <= 0))
            saved = (x, mean, var, gamma, beta)
            wanted = (1e-5, "relu", (True, True, True, True, False))
            by_bits, by_values = (
                torch.ops.resnet_fused.bn_act_backward(grad, *saved, t, *wanted) for t in (bits, y)
            )
            assert torch.equal(by_bits[3], by_values[3])
            for a, b in zip(by_bits, by_values, strict=True):  # the reference sums in another order
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2, equal_nan=True)


def test_there_are_bits_in_16_bits_where_8_divides_the_channels():
    for channels, dtype, some in ((8, torch.half, 1), (8, torch.float, 0), (12, torch.half, 0)):
        x, one = torch.randn(1, channels, 4, 4).to(dtype), torch.ones(channels)
        bn = (one, one, None, None)
        with rf.use_backend("reference"):
            _, bits = torch.ops.resnet_fused.bn_act(x, *bn, x, 1e-5, "relu")
            assert bits.numel() == some * 16
            for residual, act in ((None, "relu"), (x, None)):
                assert not torch.ops.resnet_fused.bn_act(x, *bn, residual, 1e-5, act)[1].numel()


# --- running statistics --------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_are_torchs(momentum, dtype):
    bn = nn.BatchNorm2d(5, momentum=momentum).to(dtype)
    own = nn.BatchNorm2d(5, momentum=momentum).to(dtype)
    for step in range(3):
        x = torch.randn(3, 5, 4, 2, dtype=dtype) * (step + 1) + 100 * step
        bn(x)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        versions = [b._version for b in own.buffers()]
        torch.ops.resnet_fused.bn_update_stats(
            own.running_mean, own.running_var, own.num_batches_tracked, mean, var, 24, momentum
        )
        assert all(b._version > v for b, v in zip(own.buffers(), versions, strict=True))
    for a, b in zip(own.buffers(), bn.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.float16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
def test_any_number_counts_batches(backend, dtype, shape, momentum):
    """As torch's BatchNorm has it, and nothing beside the counter is written."""
    memory = torch.full((8,), 3, dtype=dtype, device=device_of(backend))
    tracked = memory[2:3].view(shape)
    bn = nn.BatchNorm2d(5, momentum=momentum)
    bn.num_batches_tracked = tracked.clone().cpu()
    running = [b.clone().to(tracked.device) for b in (bn.running_mean, bn.running_var)]
    x = torch.randn(3, 5, 4, 2)
    bn(x)
    var, mean = (v.to(tracked.device) for v in torch.var_mean(x, (0, 2, 3), correction=0))
    version = tracked._version
    with rf.use_backend(backend):
        torch.ops.resnet_fused.bn_update_stats(*running, tracked, mean, var, 24, momentum)
    torch.testing.assert_close(running[0].cpu(), bn.running_mean)
    torch.testing.assert_close(running[1].cpu(), bn.running_var)
    assert memory.tolist() == [3, 3, 4, 3, 3, 3, 3, 3]
    assert tracked._version > version


def test_a_count_of_four_bytes_is_not_written_past():
    """In eight bytes, one more than -1 would be carried into the next value."""
    memory, vector = torch.tensor([-1, 0], dtype=torch.int32), torch.ones(5)
    running = vector.clone(), vector.clone(), memory[:1]
    torch.ops.resnet_fused.bn_update_stats(*running, vector, vector, 24, 0.1)
    assert memory.tolist() == [0, 0]


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
def test_statistics_far_from_zero(offset, backend):
    """A mean ten thousand deviations away leaves the variance right to float32."""
    x = torch.randn(8, 4, 16, 16, dtype=torch.float64) + offset
    x = x.float().to(device_of(backend))
    identity = torch.eye(4).view(4, 4, 1, 1).to(x)
    with rf.use_backend(backend):
        z, mean, var = torch.ops.resnet_fused.conv_bn_stats(x, identity, [1, 1], [0, 0], [1, 1], 1)
    exact = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), exact[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=1e-6)


# --- bad input -----------------------------------------------------------------------------------

X, VECTOR = torch.randn(2, 3, 4, 4), torch.ones(3)
WEIGHT = torch.randn(5, 3, 3, 3)
GRAD, X_SIZE, BN = torch.randn(2, 5, 4, 4), [2, 3, 4, 4], (VECTOR, VECTOR, None, None)
SAME = ([1, 1], [1, 1], [1, 1], 1)
LARGE = ([9, 9], [1, 1], [0, 0])
BAD = {
    "mean's size": ("bn_act", (X, VECTOR[:2], VECTOR, None, None, None, 0.1, None), "mean must"),
    "var's dtype": ("bn_act", (X, VECTOR, VECTOR.half(), None, None, None, 0.1, None), "var must"),
    "negative eps": ("bn_act", (X, VECTOR, VECTOR, None, None, None, -1.0, None), "eps must"),
    "residual": ("bn_act", (X, VECTOR, VECTOR, None, None, X[:1], 0.1, None), "residual must"),
    "act": ("bn_act", (X, VECTOR, VECTOR, None, None, None, 0.1, "gelu"), "act must"),
    "rank": ("conv_bn_stats", (X[0], WEIGHT, *SAME), "x must have 4 dimensions"),
    "channels": ("conv_bn_stats", (X[:, :2], WEIGHT, *SAME), "groups=1 does not fit"),
    "stride": ("conv_bn_stats", (X, WEIGHT, [0, 1], [1, 1], [1, 1], 1), "stride must"),
    "integer": ("conv_bn_stats", (X.long(), WEIGHT.long(), *SAME), "x must be one of"),
    "grad's shape": ("conv_backward_data", (X, WEIGHT, X_SIZE, *SAME, None), "do not belong"),
    "residual's shape": ("conv_backward_data", (GRAD, WEIGHT, X_SIZE, *SAME, X[:1]),
                         "residual must have the output's shape"),
    "wanted": ("bn_act_conv_backward_data",
               (GRAD, WEIGHT, X, *BN, 0.1, None, *SAME, [True, True, False]),
               "wanted must be False for bn_weight"),
    "no gradient of x": ("bn_act_conv_backward",
                         (GRAD, WEIGHT, X, *BN, 0.1, None, *SAME, False, X.dtype, [False] * 3),
                         "wanted must be True for x"),
    "an activation with a residual": ("bn_act_backward",
                                      (X, X, *BN, X, 0.1, "relu", [True, *[False] * 3, True]),
                                      "wanted must be False for activation"),
    "an activation's grad": ("bn_act_conv_backward_weight",
                             (X, X, *BN, [5, 3, 3, 3], 0.1, None, *SAME, False, torch.float32),
                             "do not belong"),
    "x's shape": ("conv_backward_weight",
                  (X, X[..., :2], [3, 3, 3, 3], *SAME, False, torch.float32), "belong"),
    "a gradient's dtype": ("conv_backward_weight",
                           (GRAD, X, [5, 3, 3, 3], *SAME, False, torch.float64),
                           "dtype must be torch.float32 for x of torch.float32, got torch.float64"),
    "a weight's dtype": ("conv_bn_stats", (X.bfloat16(), WEIGHT.half(), *SAME),
                         "weight must be torch.bfloat16 or torch.float32 for x"),
    "a frozen weight's dtype": ("conv_bn_act",
                                (X.bfloat16(), WEIGHT, None, None, None, *SAME, None),
                                "weight must have x's dtype"),
    "one value": ("bn_update_stats", (VECTOR, VECTOR, None, VECTOR, VECTOR, 1, 0.1), "count must"),
    "no count": ("bn_update_stats", (VECTOR, VECTOR, None, VECTOR, VECTOR, 2, None), "batches"),
    "count's dtype": ("bn_update_stats", (VECTOR, VECTOR, VECTOR > 0, VECTOR, VECTOR, 2, 0.1),
                      "num_batches_tracked must be an integer"),
    "two counts": ("bn_update_stats", (VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, 2, None),
                   "num_batches_tracked must hold one number"),
    "window": ("bn_act_max_pool", (X, VECTOR, VECTOR, None, None, 0.1, None, *LARGE),
               "smaller than pool_size"),
    "index": ("max_pool_backward", (X, X, [2, 3, 8, 8], [2, 2], [2, 2], [0, 0]), "torch.uint8"),
    "places": ("bn_act_max_pool_backward",
               (X, X, X, X, *BN, 0.1, None, [1, 1], [1, 1], [0, 0], [True, False, False]),
               "index must be torch.uint8"),
    "a pool's grad": ("bn_act_max_pool_backward",
                      (X, X.byte(), X, X, *BN, 0.1, None, [2, 2], [2, 2], [0, 0],
                       [True, False, False]),
                      "grad must have the pool's shape"),
    "what is pooled": ("bn_act_max_pool_backward",
                       (X, X.byte(), X, X.half(), *BN, 0.1, None, [1, 1], [1, 1], [0, 0],
                        [True, False, False]), "x must"),
    "what was taken": ("bn_act_max_pool_backward",
                       (X, X.byte(), X[:, :, 1:], X, *BN, 0.1, None, [1, 1], [1, 1], [0, 0],
                        [True, False, False]), "taken must have shape"),
    "no bias": ("bn_act_max_pool_backward",
                (X, X.byte(), X, X, *BN, 0.1, None, [1, 1], [1, 1], [0, 0], [True, False, True]),
                "wanted must be False for bias"),
    "mask": ("dual_bn_act_backward_reduce", (X, X, VECTOR, X, VECTOR, None, "relu"), "y must be"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "images", "said"),
    [(torch.bfloat16, 1, "or bits of shape"), (torch.float32, 2, "only for 16-bit")],
)
def test_bits_of_another_map_are_refused(dtype, images, said):
    x, one = torch.zeros(2, 16, 3, 3, dtype=dtype), torch.ones(16)
    bits = torch.zeros(images, 2, 3, 3, dtype=torch.uint8)
    rest = (one, one, None, None, bits, 0.1, "relu", (True, False, False, True, False))
    with pytest.raises(ValueError, match=f"bn_act_backward: y must be like x, .*{said}"):
        torch.ops.resnet_fused.bn_act_backward(x, x, *rest)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    op, args, words = BAD[case]
    with pytest.raises((ValueError, TypeError), match=words):
        call(op, args)


@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_and_so_do_their_versions(backend, momentum):
    """What is computed from them is kept until their versions move."""
    device = device_of(backend)
    bn, generator = torch.nn.BatchNorm2d(5, momentum=momentum), torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 4, 4, generator=generator)
    running = [b.clone().to(device) for b in bn.buffers()]
    before = [b._version for b in running]
    with rf.use_backend(backend):
        for step in (x, x + 1):
            bn(step)
            mean, var = step.mean((0, 2, 3)), step.var((0, 2, 3), correction=0)
            args = (mean.to(device), var.to(device), 48, momentum)
            torch.ops.resnet_fused.bn_update_stats(*running, *args)
    for ours, torchs, version in zip(running, bn.buffers(), before, strict=True):
        torch.testing.assert_close(ours.cpu(), torchs)
        assert ours._version > version
