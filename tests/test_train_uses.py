"""The ways people train: parts frozen, gradients scaled, hooked or accumulated, inputs far away."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from nets import ConvBnRelu, Ops, Residual, SmallNet, image
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused as rf
from resnet_fused.backends import cpu
from resnet_fused.testing import max_error

X = image(4, 3, 32, 32)
TARGET = torch.tensor([0, 1, 2, 3])
BACKENDS = ["cpu", "reference"] if cpu.available() is None else ["reference"]

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def net() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet().train()


def loss(model: nn.Module, x: Tensor = X) -> Tensor:
    return F.cross_entropy(model(x).float(), TARGET[: len(x)])


def near(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> bool:
    return max_error(a, b) <= tolerance * max(float(b.abs().max()), 1e-12)


def assert_same_gradients(ours: nn.Module, eager: nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or near(a.grad, b.grad), name


# --- only what is needed -------------------------------------------------------------------------


def backward_ops(model: nn.Module) -> dict[str, int]:
    return backward_ops_of(loss(model))


def backward_ops_of(result: Tensor) -> dict[str, int]:
    with Ops() as ops:
        result.sum().backward()
    return dict(ops.found)


FROZEN = {
    # The last block alone: three weights, and the gradient between its two convolutions.
    "all but the last block": (
        lambda name: "layer1.1" in name or "fc" in name,
        {"conv_backward_weight": 2, "bn_act_conv_backward": 1, "dual_bn_act_backward_reduce": 1,
         "dual_bn_act_backward_apply": 1},
    ),
    # Sums alone give a BatchNorm's own gradients.
    "all but the last BatchNorms": (
        lambda name: "layer1.1.bn2" in name or "layer1.1.downsample.1" in name,
        {"dual_bn_act_backward_reduce": 1},
    ),
    "all but the classifier": (lambda name: "fc" in name, {}),
    # Down to the stem, but of all weights none.
    "all but the stem's BatchNorm": (
        lambda name: name.startswith("bn1"),
        {"conv_backward_data": 3, "bn_act_conv_backward_data": 2, "bn_act_backward": 1,
         "dual_bn_act_backward_reduce": 1,
         "dual_bn_act_backward_apply": 1, "bn_act_max_pool_backward": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FROZEN)
def test_only_needed_gradients_are_computed(kind):
    wanted, expected = FROZEN[kind]
    model = net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))
    fused = rf.fuse(model)
    with rf.use_backend("reference"):
        assert backward_ops(fused) == expected
    loss(model).backward()
    assert_same_gradients(fused, model)


class Additions(TorchDispatchMode):
    """Counts the additions of two feature maps, autograd's own among them."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        maps = [a for a in args if isinstance(a, Tensor) and a.dim() == 4 and a.numel() > 1]
        adds = func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_)
        self.found += adds and len(maps) == 2
        return func(*args, **(kwargs or {}))


@each_backend
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_by_all_readers_of_a_map_meet_in_a_kernel(backend, memory, autocast):
    """A block's input has two readers, or three with what follows a block that hands it on."""
    torch.manual_seed(0)
    model = nn.Sequential(ConvBnRelu(3, 8), Residual(8, 12, 2), Residual(12, 12)).train()
    fused = rf.fuse(model, memory=memory)

    def step(m: nn.Module, counter: Additions) -> list[Tensor]:
        m.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = m(X).float().square().sum()
        with counter:
            result.backward()
        return [p.grad for p in m.parameters()]

    eager, watched = Additions(), Additions()
    step(model, eager)
    with rf.use_backend(backend):
        grads = step(fused, watched)
        unwatched = step(fused, contextlib.nullcontext())
    assert (eager.found, watched.found) == (2, 0)
    assert all(torch.equal(a, b) for a, b in zip(grads, unwatched, strict=True))
    if not autocast:
        assert_same_gradients(fused, model)


def test_what_an_input_without_gradient_is_added_to_asks_for_none():
    """The images themselves, read by a convolution and a shortcut."""
    fused = rf.fuse(nn.Sequential(Residual(3, 3)).train())
    with rf.use_backend("reference"):
        assert backward_ops_of(fused(X)).get("conv_backward_data") is None


@each_backend
def test_writing_an_input_that_is_read_again_raises_as_in_torch(backend):
    class Writes(Residual):
        def forward(self, x: Tensor) -> Tensor:
            out = self.bn1(self.conv1(x))
            return out + x.relu_()

    fused = rf.fuse(nn.Sequential(ConvBnRelu(3, 8), Writes(8, 8)).train())
    with rf.use_backend(backend), pytest.raises(RuntimeError, match="modified by an inplace"):
        fused(X).sum().backward()


@each_backend
@pytest.mark.parametrize("memory", ["default", "low"])
def test_biases_written_between_forward_and_backward(backend, memory):
    """As where biases alone are trained, and two losses share a forward's parameters."""
    found = []
    for fused in (False, True):
        model = rf.fuse(net(), memory=memory) if fused else net()
        model.requires_grad_(False)
        biases = [m.bias.requires_grad_() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        with rf.use_backend(backend):
            first, second = loss(model), loss(model, -X)
            first.backward()
            torch.optim.SGD(biases, lr=0.1).step()
            second.backward()
        found.append(model)
    assert_same_gradients(found[1], found[0])


@each_backend
def test_every_norm_frozen(backend):
    """As for detection: no statistic of the batch is taken, none moves."""
    model = net()
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.eval()
        norm.running_mean.normal_()
    fused = rf.fuse(model)
    before = copy.deepcopy(dict(fused.named_buffers()))
    with rf.use_backend(backend), Ops() as ops:
        loss(fused).backward()
    assert not {"conv_bn_stats", "bn_update_stats"} & ops.found.keys()
    loss(model).backward()
    assert_same_gradients(fused, model)
    assert all(torch.equal(b, before[n]) for n, b in fused.named_buffers())


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("frozen", ["bn2", "conv1", "downsample.1", "bn1"])
def test_one_norm_of_each_block_frozen(frozen, memory):
    torch.manual_seed(0)
    model = nn.Sequential(ConvBnRelu(3, 8), Residual(8, 12, 2), Residual(12, 12)).train()
    for name, module in model.named_modules():
        if name.endswith(frozen):
            module.eval().requires_grad_(False)
    fused = rf.fuse(model, memory=memory)
    for m in (fused, model):
        m(X).square().mean().backward()
    assert_same_gradients(fused, model)
    for a, b in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)


# --- mixed precision -----------------------------------------------------------------------------


def scaled_steps(model: nn.Module, poison: int | None) -> tuple[list[float], float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    for i in range(3):
        x = X * float("inf") if i == poison else X
        with torch.autocast("cpu", torch.float16):
            result = loss(model, x)
        optimizer.zero_grad()
        scaler.scale(result).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(result.item())
    return losses, scaler.get_scale()


def test_float16_with_a_gradient_scaler():
    """On the CPU the ops of float16 are the reference's."""
    model = net()
    fused = rf.fuse(model)
    with rf.use_backend("reference"):
        ours, scale = scaled_steps(fused, None)
    eager, _ = scaled_steps(model, None)
    assert scale == 1024
    assert ours == pytest.approx(eager, rel=2e-2)
    assert ours[-1] < ours[0]


def test_a_gradient_scaler_skips_what_is_not_finite():
    model = rf.fuse(net())
    before = copy.deepcopy(list(model.parameters()))
    with rf.use_backend("reference"):
        _, scale = scaled_steps(model, 0)
    assert scale == 512
    # The steps after it were taken, but on statistics that are not finite for ever, as in torch.
    assert not all(map(torch.equal, before, model.parameters()))
    assert not bool(model.bn1.running_mean.isfinite().all())


# --- hooks and accumulation ----------------------------------------------------------------------


@each_backend
def test_hooks_on_blocks_and_parameters(backend):
    """Blocks are called as modules; gradients pass through tensor hooks."""
    seen: list[str] = []
    model = net()
    fused = rf.fuse(model)
    for m in (fused, model):
        m.layer1[0].register_full_backward_hook(lambda *_: seen.append("block"))
        m.layer1[0].conv1.weight.register_hook(lambda grad: grad * 2)
        m.layer1[1].bn1.bias.register_post_accumulate_grad_hook(lambda p: seen.append("bias"))
    with rf.use_backend(backend):
        loss(fused).backward()
    assert sorted(seen) == ["bias", "block"]
    loss(model).backward()
    assert_same_gradients(fused, model)


@each_backend
def test_a_gradient_that_is_the_negative_of_what_its_memory_holds(backend):
    """As that of the imaginary part of a conjugate."""
    model = Residual(3, 8).train()
    fused = rf.fuse(model)
    grad = image(4, 8, 32, 32).contiguous(memory_format=torch.channels_last)
    with rf.use_backend(backend):
        fused(X).backward(torch._neg_view(-grad))
    model(X).backward(grad)
    assert_same_gradients(fused, model)


@pytest.mark.parametrize("memory", ["default", "low"])
def test_accumulated_gradients_are_the_sum(memory):
    model = rf.fuse(net(), memory=memory)
    apart = []
    for part in X.split(2):
        model.zero_grad()
        loss(model, part).backward()
        apart.append([p.grad for p in model.parameters()])
    model.zero_grad()
    for part in X.split(2):
        loss(model, part).backward()
    for p, first, second in zip(model.parameters(), *apart, strict=True):
        assert torch.equal(p.grad, first + second)


# --- watched by others ---------------------------------------------------------------------------


@pytest.mark.parametrize("watched", ["by nobody", "by a profiler", "by torch.compile"])
@each_backend
def test_an_average_over_batches_that_nobody_counts(backend, watched):
    """It moves nothing, as with torch."""
    model = nn.Sequential(*ConvBnRelu(3, 8)).train()
    model[1].momentum, model[1].num_batches_tracked = None, None
    run = fused = rf.fuse(model)
    if watched == "by torch.compile":
        torch._dynamo.reset()
        run = torch.compile(fused, backend="aot_eager", fullgraph=True)
    profiler = torch.profiler.profile if watched == "by a profiler" else contextlib.nullcontext
    with rf.use_backend(backend), profiler():
        y = run(X)
    torch.testing.assert_close(y, model(X))
    for a, b in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(fused[1].running_mean, torch.zeros(8))


@each_backend
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode(backend, training):
    """The ops have a backward alone, so that torch's own run: with its tangents, by either API."""
    eager = net().train(training)
    tangents = []
    for model in (rf.fuse(eager), eager):
        with rf.use_backend(backend), forward_ad.dual_level():
            dual = forward_ad.unpack_dual(model(forward_ad.make_dual(X, X.cos())))
        state = dict(model.named_parameters())

        def function(x: Tensor, model=model, state=state) -> Tensor:
            return functional_call(
                model, (state, {n: b.clone() for n, b in model.named_buffers()}), (x,)
            )

        with rf.use_backend(backend):
            tangents += [dual.tangent, torch.func.jvp(function, (X,), (X.cos(),))[1]]
    for tangent in tangents:
        assert near(tangent, tangents[-1])


# --- inputs --------------------------------------------------------------------------------------


@each_backend
def test_means_far_larger_than_deviations(backend):
    """Images a thousand deviations away give gradients as good as eager's."""
    torch.manual_seed(0)
    model = nn.Sequential(*ConvBnRelu(3, 8), *ConvBnRelu(8, 8)).train()
    fused, oracle = rf.fuse(model), copy.deepcopy(model).double()
    x, errors = X + 1000, []
    with rf.use_backend(backend):
        for m in (fused, model, oracle):
            m(x.to(m[0].weight)).square().mean().backward()
    for m in (fused, model):
        pairs = zip(m.parameters(), oracle.parameters(), strict=True)
        errors.append([max_error(p.grad, o.grad) / float(o.grad.abs().max()) for p, o in pairs])
    assert sum(errors[0]) <= 2 * sum(errors[1]) + 1e-5
    for a, b in zip(fused.buffers(), oracle.buffers(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


@each_backend
def test_an_empty_batch(backend):
    model = nn.Sequential(*ConvBnRelu(3, 8), Residual(8, 8)).train()
    fused = rf.fuse(model)
    with rf.use_backend(backend):
        for m in (fused, model):
            m(X[:0]).sum().backward()
    for a, b in zip(fused.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(fused.buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b)


@each_backend
def test_a_norm_of_another_width_gets_torchs_words(backend):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    fused = rf.fuse(model)
    with rf.use_backend(backend), pytest.raises(RuntimeError, match="contain 8 elements not 4"):
        fused(X)
    assert torch.equal(fused[1].running_mean, torch.zeros(4))
