"""``freeze``: answers against float64, whose memory a result is, shapes, threads, refusals."""

import copy
import io
import pickle
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from nets import ConvBnRelu, Residual, SmallNet, assert_same_model, calibrate, image, small_net
from torch import nn

import resnet_fused as rf
from resnet_fused.backends import onednn
from resnet_fused.freeze import MAX_PLANS, FrozenModule
from resnet_fused.testing import max_error, two_x_rule

X = image(2, 3, 32, 32)
REDUCED = 16 * 9


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return small_net()


@pytest.fixture
def frozen(net) -> nn.Module:
    return rf.freeze(net, X)


def assert_right(frozen, model, x, reduced=REDUCED):
    assert_same_model(frozen, model, x, reduced=reduced)


# What comes out


def build(name: str, request) -> nn.Module:
    package, _, kind = name.partition(".")
    if package == "ours":
        options = {"shortcut": "A"} if kind.endswith("A") else {}
        return rf.models.create_model(kind.removesuffix("-A"), num_classes=10, **options)
    library = request.getfixturevalue(package)
    if package == "torchvision" and kind == "resnext50_32x4d":
        resnet = library.models.resnet
        return resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], groups=32, width_per_group=4)
    if package == "torchvision":
        return library.models.get_model(kind)
    if package == "timm":
        return library.create_model(kind, layers=[1, 2, 1, 1])
    return library.ResNetForImageClassification(library.ResNetConfig(depths=[1, 2, 1, 1]))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision.resnet18", 64),
        ("torchvision.resnet50", 64),
        ("torchvision.resnext50_32x4d", 64),
        ("torchvision.vgg11_bn", 32),
        ("timm.resnet50d", 64),
        ("timm.seresnet50", 64),
        ("transformers.resnet", 64),
        ("ours.cifar_resnet20", 32),
        ("ours.cifar_resnet20-A", 32),
        ("ours.plain18", 64),
    ],
)
def test_network(name, size, request):
    x = image(2, 3, size, size)
    model = calibrate(build(name, request), x)
    frozen = rf.freeze(model, x)
    # The roundings of all layers meet in the output; a plain net has no shortcut past them.
    terms = sum(p[0].numel() for p in model.parameters() if p.dim() > 1)
    assert_right(frozen, model, x, terms)
    assert_right(frozen, model, x[:1], terms)
    if name.startswith("transformers"):
        assert type(frozen(x)) is type(model(x))
        assert frozen(x).logits.shape == (2, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("given", ["dtype", "example"])
def test_dtypes(net, dtype, given):
    model = copy.deepcopy(net).to(dtype)
    if given == "example":
        assert_right(rf.freeze(model, X.to(dtype)), model, X.to(dtype))
        return
    frozen = rf.freeze(net, X, dtype=dtype)
    assert frozen(X).dtype == dtype
    torch.testing.assert_close(frozen(X), frozen(X.to(dtype)), rtol=0, atol=0)
    with torch.no_grad():
        if dtype == torch.float64:
            assert max_error(frozen(X), copy.deepcopy(net).double()(X.double())) < 1e-12
        else:
            oracle = copy.deepcopy(net).double()(X.double())
            check = two_x_rule(frozen(X), model(X.to(dtype)), oracle, REDUCED)
            assert check.ok, check


def test_folding_does_not_overflow_float16():
    """running_var beyond 65504 and eps below float16's smallest: both stay float32."""
    model = ConvBnRelu(3, 4).eval()
    model[1].running_var.fill_(3e5)
    model[1].weight.data.fill_(500.0)
    y = rf.freeze(model, X, dtype=torch.float16)(X)
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(X.double())
    assert max_error(y, oracle) < 2e-3 * float(oracle.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_that_are_not_fused_in_other_dtypes(dtype, torchvision):
    """A norm before its convolution keeps float32 statistics and still fits the dtype."""

    class Frozen(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm, self.conv = norm, nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(torch.relu(self.norm(x)))

    for norm in (nn.BatchNorm2d(3), torchvision.ops.misc.FrozenBatchNorm2d(3)):
        model = Frozen(norm).eval()
        model.norm.running_var.uniform_(0.5, 1.5)
        y = rf.freeze(model, X, dtype=dtype)(X)
        with torch.no_grad():
            other = copy.deepcopy(model).to(dtype)(X.to(dtype))
            check = two_x_rule(y, other, copy.deepcopy(model).double()(X.double()), 27)
        assert y.dtype == dtype
        assert check.ok, check


LAYOUTS = {
    "NCHW": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded batch": lambda x: x[:1].expand(2, -1, -1, -1),
    "expanded channels": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "grad": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(net, frozen, layout):
    x = LAYOUTS[layout](X)
    assert_right(frozen, net, x)
    assert_right(rf.freeze(net, x), net, x)
    assert len(frozen._plans) == 1
    assert not frozen(x).requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite(value, dtype):
    """NaN and infinities reach the outputs they reach in float64.

    In bfloat16 torch's own convolution can spread them to a neighbouring pixel.
    """
    model = nn.Sequential(ConvBnRelu(3, 8), nn.MaxPool2d(3, 2, 1), Residual()).eval().to(dtype)
    head = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    head = head.to(dtype)
    x = X.to(dtype, copy=True)
    x[1, 2, 5, 7] = value
    for m in (model, head):
        y = rf.freeze(m, x)(x)
        with torch.no_grad():
            want = copy.deepcopy(m).double()(x.double())
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.isposinf(), want.isposinf())
        assert torch.equal(y.isneginf(), want.isneginf())
        assert y[0].isfinite().all()


# Whose memory it is


def test_results_are_the_caller_s_own(frozen):
    x = X.clone()
    first = frozen(x)
    kept = first.clone()
    other = frozen(image(2, 3, 32, 32) * 2)
    assert torch.equal(first, kept)
    assert not torch.equal(first, other)
    first.zero_()
    other.zero_()
    assert torch.equal(x, X)
    assert torch.equal(frozen(x), kept)
    x.zero_()
    assert torch.equal(frozen(X), kept)


class Pyramid(nn.Module):
    """Several feature maps, one of them twice, views, the input, and what is no tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = ConvBnRelu(3, 8), Residual()
        self.register_buffer("anchor", torch.arange(8.0).view(1, 8, 1, 1))

    def forward(self, x):
        a = self.stem(x)
        b = self.block(a)
        return {
            "maps": (a, b, a),
            "views": [b[:, :4], b.flatten(2), *b.chunk(2, 1)],
            "input": (x, x[:, 1:]),
            "constant": (self.anchor, self.anchor.expand_as(b), self.anchor + 1),
            "none": None,
            "count": 3,
            "name": "pyramid",
        }


def test_feature_maps_views_and_constants_are_copies():
    model = calibrate(Pyramid(), X)
    frozen = rf.freeze(model, X)
    assert_right(frozen, model, X)
    first = frozen(X)
    assert (first["none"], first["count"], first["name"]) == (None, 3, "pyramid")
    assert first["maps"][0] is first["maps"][2]
    kept = copy.deepcopy(first)
    frozen(X * 2)
    for a, b in zip(map_tensors(first), map_tensors(kept), strict=True):
        assert torch.equal(a, b)
    for tensor in map_tensors(first):
        tensor.clone()  # expanded results may not be written, all others may
        if 0 not in tensor.stride():
            tensor.fill_(7)
    for a, b in zip(map_tensors(frozen(X)), map_tensors(kept), strict=True):
        assert torch.equal(a, b)


def map_tensors(outputs):
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]


def test_an_output_as_the_next_input():
    model = calibrate(nn.Sequential(ConvBnRelu(4, 4), Residual(4, 4)), image(2, 4, 16, 16))
    x = image(2, 4, 16, 16)
    frozen = rf.freeze(model, x)
    with torch.no_grad():
        y, want = x, x
        for _ in range(3):
            y, want = frozen(y), model(want)
    torch.testing.assert_close(y, want)


def test_no_memory_of_torch_s_is_held_between_calls(frozen):
    plan = frozen.plan(X)
    frozen(X)
    assert all(plan._values[i] is None for i in plan._passing)


# Forwards that a careless plan gets wrong


class Forward(nn.Module):
    """Two convolutions and a forward given by the test."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = ConvBnRelu(3, 8), ConvBnRelu(8, 8)
        self.fc = nn.Linear(8, 5)
        self.register_buffer("vector", torch.linspace(0.5, 1.5, 8).view(1, 8, 1, 1))
        self.rule = forward

    def forward(self, x):
        return self.rule(self, x)


def _in_place(m, x):
    a = m.a(x)
    b = m.b(a)
    a.mul_(2)
    return a + b, b.add_(a)


def _in_place_view(m, x):
    a = m.a(x)
    low, high = a.chunk(2, 1)
    low.zero_()
    b = m.b(a)
    return b + high.repeat(1, 2, 1, 1)


def _in_place_constant(m, x):
    c = m.vector.clone()
    c[:, :4].add_(x.mean())
    return m.b(m.a(x)) * c


def _in_place_input(m, x):
    return m.a(x.mul_(2)) + 0 * x.sum()


def _views_of_two(m, x):
    a, b = torch.broadcast_tensors(m.a(x), m.b(m.a(x)))
    c = m.b(m.b(m.b(b)))
    return a + b + c


def _long_lived_views(m, x):
    a = m.a(x)
    parts = a.split(3, 1)
    for _ in range(4):
        a = m.b(a)
    return torch.cat([*parts, a], 1)


def _batch_doubled(m, x):
    y = m.b(m.a(torch.cat([x, x.flip(3)])))
    return y[: len(x)] + y[len(x) :]


def _batch_of_one_more(m, x):
    return m.b(m.a(x)[:1])


def _two_heads(m, x):
    y = m.b(m.a(x))
    pooled = torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)
    return m.fc(pooled), pooled


def _head_whose_input_is_written(m, x):
    y = m.b(m.a(x))
    pooled = F.adaptive_avg_pool2d(y, 1)
    y.add_(5)
    return m.fc(torch.flatten(pooled, 1)), y


def _head_of_dynamic_weights(m, x):
    y = m.b(m.a(x))
    weight = y.mean((0, 2)).t()[:4].contiguous()
    return F.linear(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1), weight)


def _heads_that_the_op_does_not_take(m, x):
    y = m.b(m.a(x))
    flat = torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)
    column = m.fc.weight[:, :1]
    one_by_one = [F.linear(torch.flatten(F.adaptive_avg_pool2d(p, 1), 1), column) for p in y]
    return F.linear(flat, m.vector.view(8)), torch.stack(one_by_one)


def _dynamic_weights(m, x):
    y = m.a(x)
    weight = y.mean((0, 2, 3)).view(8, 1, 1, 1).expand(-1, 8, -1, -1).contiguous()
    return rf.functional.conv_bn_act(y, weight, act="relu")


def _constant_residual(m, x):
    y = m.a(x)
    residual = m.vector.expand_as(y[:1]).contiguous()
    weight = m.b[0].weight
    parts = [rf.functional.conv_bn_act(p[None], weight, residual=residual, padding=1) for p in y]
    return torch.cat(parts)


def _pools(m, x):
    y = m.a(x)
    indexed, indices = F.max_pool2d(y, 2, return_indices=True)
    return (
        F.max_pool2d(y, 3, 2, 1, ceil_mode=True),
        F.max_pool2d(y, 2, 2, 0, 2),
        F.max_pool2d(y, (3, 2), (2, 1)),
        F.max_pool2d(y, 2),
        F.max_pool2d(y, 3, 2, 1),
        indexed + indices,
    )


def _residual_read_again(m, x):
    a = m.a(x)
    weight = m.b[0].weight
    b = rf.functional.conv_bn_act(m.b(a), weight, residual=a, padding=1, act="relu")
    return rf.functional.conv_bn_act(b, weight, residual=a, padding=1), b


def _residual_of_itself(m, x):
    a = m.a(x)
    return rf.functional.conv_bn_act(a, m.b[0].weight, residual=a, padding=1, act="relu")


def _under_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = m.b(m.a(x))
    return y.float() * (m.vector * 2)


def _integer_index(m, x):
    return m.b(m.a(x)[:, torch.arange(7, -1, -1)])


def _masked(m, x):
    y = m.a(x)
    y[y < 1] = 3.0
    return m.b(y)


FORWARDS = {
    f.__name__[1:]: f
    for f in (
        _in_place, _in_place_view, _in_place_constant, _views_of_two, _long_lived_views,
        _batch_doubled, _batch_of_one_more, _two_heads, _head_whose_input_is_written,
        _head_of_dynamic_weights, _heads_that_the_op_does_not_take, _dynamic_weights,
        _constant_residual, _pools, _residual_read_again, _residual_of_itself, _integer_index,
        _masked,
    )
}  # fmt: skip


@pytest.mark.parametrize("rule", FORWARDS)
def test_forward(rule):
    model = calibrate(Forward(FORWARDS[rule]), X)
    frozen = rf.freeze(model, image(2, 3, 32, 32) * 3)
    for x in (X, X * 2, image(4, 3, 24, 40)):
        assert_right(frozen, model, x)


def test_forward_that_writes_its_input():
    model = calibrate(Forward(_in_place_input), X.clone())
    frozen, x = rf.freeze(model, X), X.clone()
    y = frozen(x)
    assert torch.equal(x, X)  # the engine works on a copy
    with torch.no_grad():
        torch.testing.assert_close(y, model(x))


def test_forward_under_autocast():
    model = calibrate(Forward(_under_autocast), X)
    frozen = rf.freeze(model, X)
    with torch.no_grad():
        without = Forward(lambda m, x: m.b(m.a(x)) * (m.vector * 2)).eval()
        without.load_state_dict(model.state_dict())
        y, eager, oracle = frozen(X * 2), model(X * 2), without.double()(X.double() * 2)
    check = two_x_rule(y, eager, oracle, REDUCED, torch.bfloat16)
    assert check.ok, check
    assert not torch.is_autocast_enabled("cpu")


def test_dropout_is_gone_and_drawn_numbers_are_new(net):
    model = nn.Sequential(ConvBnRelu(3, 4), nn.Dropout2d(0.5), nn.Dropout(0.5)).eval()
    assert_right(rf.freeze(model, X), model, X)

    model = Forward(lambda m, x: m.a(x) * torch.bernoulli(m.vector * 0.5)).eval()
    frozen = rf.freeze(model, X)
    draws = [frozen(X) for _ in range(8)]
    assert any(not torch.equal(draws[0], d) for d in draws)
    torch.manual_seed(5)
    a = frozen(X)
    torch.manual_seed(5)
    assert torch.equal(a, frozen(X))


# Shapes


def test_every_shape_gets_its_own_right_answer(net, frozen):
    sizes = [
        (1, 32),
        (2, 32),
        (3, 24),
        (8, 32),
        (2, 33),
        (1, 17),
        (5, 16),
        (2, 40),
        (2, 48),
        (1, 1),
    ]
    assert len(sizes) > MAX_PLANS
    for n, size in [*sizes, sizes[0], sizes[1]]:
        assert_right(frozen, net, image(n, 3, size, size))
        assert len(frozen._plans) <= MAX_PLANS


def test_the_plan_unused_for_longest_goes_first(net, frozen, monkeypatch):
    # Under this name the package has the function.
    monkeypatch.setattr(sys.modules["resnet_fused.freeze"], "MAX_PLANS", 2)
    for batch in (1, 2, 3):
        frozen(image(batch, 3, 32, 32))
    assert {shape[0] for shape in frozen._plans} == {2, 3}
    frozen(X)
    frozen(image(1, 3, 32, 32))
    assert {shape[0] for shape in frozen._plans} == {1, 2}
    assert "(2, 3, 32, 32)" in repr(frozen)
    assert "MiB" in repr(frozen)


def test_empty_batches(net, frozen):
    empty = X[:0]
    assert frozen(empty).shape == (0, 5)
    again = rf.freeze(net, empty)
    assert again(empty).shape == (0, 5)
    assert_right(again, net, X)
    assert_right(frozen, net, X)


# Refusals


class Branching(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.conv, self.rule = nn.Conv2d(3, 4, 1), rule

    def forward(self, x):
        return self.rule(self.conv(x))


def _counts(y):
    raise AssertionError


class Stateful(nn.Module):
    def __init__(self, *, in_place):
        super().__init__()
        self.conv, self.in_place = nn.Conv2d(3, 4, 1), in_place
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.in_place:
            self.seen += 1
        else:
            self.seen = self.seen + 1
        return self.conv(x) * self.seen


def _trained_submodule():
    model = small_net()
    model.layer1[0].bn1.train()
    return model


INTEGERS = torch.zeros(1, 3, 8, 8, dtype=torch.int64)
REFUSALS = {
    "no module": (lambda: torch.relu, X, None, TypeError, "model must be an nn.Module"),
    "training": (lambda: SmallNet(), X, None, ValueError, "call model.eval"),
    "training inside": (_trained_submodule, X, None, ValueError, "'layer1.0.bn1' is in training"),
    "no conv": (lambda: nn.Linear(3, 3).eval(), X, None, ValueError, "no Conv2d"),
    "integers": (small_net, INTEGERS, None, TypeError, "example_input must be a floating point"),
    "no tensor": (small_net, [1.0], None, TypeError, "got list"),
    "rank": (small_net, X[0], None, ValueError, "4 dimensions"),
    "channels": (small_net, X[:, :2], None, ValueError, "x of 2 channels"),
    "device": (small_net, X.to("meta"), None, ValueError, "must be on the model's device cpu"),
    "dtype": (small_net, X, torch.int8, TypeError, "torch.int8"),
    "no dtype": (small_net, X, "half", TypeError, "half"),
    "float8": (small_net, X.to(torch.float8_e5m2), None, TypeError, "float8"),
    "bool": (lambda: Branching(lambda y: y if y.sum() > 0 else -y).eval(), X, None, ValueError,
             "branches on the values"),
    "item": (lambda: Branching(lambda y: y * y.max().item()).eval(), X, None, ValueError,
             "branches on the values"),
    "mask": (lambda: Branching(lambda y: y[y > 0]).eval(), X, None, ValueError,
             "shape that depends"),
    "nonzero": (lambda: Branching(lambda y: y.nonzero()).eval(), X, None, ValueError,
                "shape that depends"),
    "buffer written": (lambda: Stateful(in_place=True).eval(), X, None, ValueError, "own seen"),
    "buffer replaced": (lambda: Stateful(in_place=False).eval(), X, None, ValueError,
                        "own seen"),
    "frozen": (lambda: rf.freeze(small_net(), X), X, None, ValueError, "frozen already"),
    "partly frozen": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), rf.freeze(small_net(), X)).eval(),
                      X, None, ValueError, "frozen already"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_freeze_refuses(case):
    make, x, dtype, error, words = REFUSALS[case]
    with pytest.raises(error, match=words):
        rf.freeze(make(), x, dtype=dtype)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (X.double(), TypeError, "torch.float32, got torch.float64"),
        (INTEGERS, TypeError, "got torch.int64"),
        (None, TypeError, "got NoneType"),
        (X[0], ValueError, "rank and channels"),
        (X[:, :2], ValueError, "rank and channels"),
        (X.to("meta"), ValueError, "must be on cpu, got meta"),
        (image(1, 3, 0, 0), (ValueError, RuntimeError), ""),
    ],
)
def test_inputs_it_was_not_frozen_for(net, frozen, x, error, words):
    with pytest.raises(error, match=words):
        frozen(x)
    assert_right(frozen, net, X)


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to("meta"),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: nn.Sequential(m).cpu(),
    ],
)
def test_it_cannot_be_moved(frozen, move):
    with pytest.raises(RuntimeError, match="move the model and freeze it again"):
        move(frozen)


def test_inside_a_compiled_model(net, frozen):
    torch._dynamo.reset()
    compiled = torch.compile(nn.Sequential(frozen, nn.ReLU()), backend="eager")
    for x in (X, X * 2, image(1, 3, 24, 24)):
        assert torch.equal(compiled(x), torch.relu(frozen(x)))


def test_it_cannot_be_trained_or_traced(frozen):
    with pytest.raises(ValueError, match="inference only"):
        frozen.train()
    assert frozen.eval() is frozen
    assert frozen.train(False) is frozen
    assert not frozen.training
    with pytest.raises(RuntimeError, match="cannot be traced"):
        torch.jit.trace(frozen, X)
    with pytest.raises(RuntimeError, match="cannot be traced"):
        torch.export.export(frozen, (X,))


# The module


def test_no_parameters(frozen):
    assert list(frozen.parameters()) == list(frozen.buffers()) == list(frozen.children()) == []
    assert frozen.state_dict() == {}
    frozen.load_state_dict({})


def test_changes_of_the_model_do_not_reach_it():
    model = small_net()
    frozen = rf.freeze(model, X)
    want = frozen(X)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    model.train()
    model.double()
    assert torch.equal(frozen(X), want)
    assert torch.equal(frozen(torch.cat([X, X]))[:2], want)  # a plan made after the changes


def test_freezing_changes_nothing(net):
    model = small_net()
    noisy = Forward(lambda m, x: F.dropout(m.a(x), 0.5, training=True)).eval()
    state = copy.deepcopy(model.state_dict())
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    kinds = [type(m) for m in model.modules()]
    for m in (model, noisy):
        rf.freeze(m, X, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == threads
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": lambda m: _saved(m),
}


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
def test_copies(frozen, how):
    want = frozen(X)
    twin = COPIES[how](frozen)
    assert isinstance(twin, FrozenModule)
    assert torch.equal(twin(X), want)
    assert torch.equal(frozen(X), want)
    with pytest.raises(ValueError, match="rank and channels"):
        twin(X[:, :1])


MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(net, mode):
    with MODES[mode]():
        frozen = rf.freeze(net, X)
        inside = frozen(X)
        small = frozen(X[:1])
    outside = frozen(X.clone().requires_grad_())
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert not outside.requires_grad
    assert not outside.is_inference()
    with MODES[mode]():
        assert torch.equal(frozen(X[:1]), small)
    assert_right(frozen, net, X)


def test_made_and_frozen_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(ConvBnRelu(3, 4), Residual(4, 4)).eval()
        x = X.clone()
        frozen = rf.freeze(model, x, dtype=torch.bfloat16)
        want = frozen(x)
    assert torch.equal(frozen(X), want)
    with torch.inference_mode():
        torch.testing.assert_close(want.float(), model(x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["reference", "onednn"])
def test_a_backend_asked_for_by_name(net, name, dtype):
    if name == "onednn" and not onednn.computes_in(dtype):
        pytest.skip("oneDNN does not compute in this dtype here")
    model = copy.deepcopy(net).to(dtype)
    x = X.to(dtype)
    with rf.use_backend(name):
        frozen = rf.freeze(model, x)
        assert_right(frozen, model, x)
        assert len(frozen.plan(x)._passing) > 5  # nothing was given to the native kernels
    assert_right(frozen, model, x)
    assert_right(frozen, model, x[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_the_extension(net, dtype, monkeypatch):
    from resnet_fused.backends import native

    monkeypatch.setattr(native, "_load", lambda: (None, "not built"))
    model = copy.deepcopy(net).to(dtype)
    assert_right(rf.freeze(model, X.to(dtype)), model, X.to(dtype))


def test_a_fused_model(net):
    fused = rf.fuse(net)
    assert torch.equal(rf.freeze(fused, X)(X), rf.freeze(net, X)(X))
    assert len(rf.fusion_report(fused).fused) == 6


def test_frozen_with_one_thread_run_with_two(net):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        frozen = rf.freeze(net, X)
        torch.set_num_threads(2)
        assert_right(frozen, net, X)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shapes", [1, 12])
def test_threads(frozen, shapes):
    """Each thread gets the answer to its own input, on one shape and on more than are kept."""
    inputs = [image(1 + i % shapes, 3, 32, 32) * (i + 1) for i in range(12)]
    want = [frozen(x) for x in inputs]
    wrong = []

    def work(start: int) -> None:
        for i in range(24):
            x, y = inputs[(start + i) % 12], want[(start + i) % 12]
            if not torch.equal(frozen(x), y):
                wrong.append(x.shape)

    workers = [threading.Thread(target=work, args=(3 * i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
