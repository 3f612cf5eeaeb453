"""What fused training keeps for backward, by default and with ``memory="low"``."""

import contextlib
import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from nets import ConvBnRelu, Ops, Residual, SmallNet, image
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import resnet_fused as rf
from resnet_fused.backends import cpu
from resnet_fused.backends.cpu import FASTER_IN_TRAINING
from resnet_fused.nn import recompute

X = image(2, 3, 16, 16)


def stage(blocks: int = 3, channels: int = 8) -> nn.Sequential:
    """A stem, a block with a projection, and others without."""
    torch.manual_seed(0)
    rest = [Residual(channels, channels) for _ in range(blocks - 1)]
    return nn.Sequential(ConvBnRelu(3, 6), Residual(6, channels, 2), *rest).train()


def both(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return rf.fuse(model), rf.fuse(model, memory="low")


@contextlib.contextmanager
def saved_bytes(model: nn.Module):
    """Count the unique storages saved for backward, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        yield found


def shares(name: str, x: Tensor) -> list[int]:
    """Return the bytes that a model keeps for backward, eager, fused, and fused for memory."""
    model = rf.models.create_model(name).train()
    kept = []
    for m in (model, *both(model)):
        with saved_bytes(m) as found:
            loss = m(x).sum()
        kept.append(sum(found.values()))
        del loss
    return kept


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_shares_kept_for_backward(name):
    eager, default, low = shares(name, torch.randn(2, 3, 64, 64))
    assert default <= 0.80 * eager, f"{default / eager:.3f} of eager"
    assert low <= 0.60 * eager, f"{low / eager:.3f} of eager"


@pytest.mark.skipif(cpu.available() is not None, reason="about the native kernels")
def test_shares_kept_for_backward_by_the_convolutions_that_pay(monkeypatch):
    """At batch 1 of 224x224 images the first 1x1 is torch's, which keeps its activation."""
    monkeypatch.setattr(cpu, "FASTER_IN_TRAINING", FASTER_IN_TRAINING)
    eager, default, low = shares("resnet50", torch.randn(1, 3, 224, 224))
    assert default <= 0.81 * eager, f"{default / eager:.3f} of eager"
    assert low <= 0.56 * eager, f"{low / eager:.3f} of eager"


@pytest.mark.skipif(cpu.available() is not None, reason="about the native kernels")
def test_a_block_end_in_16_bits_keeps_a_bit_for_each_value():
    """Beside what the next convolution keeps of it anyway; the last one's result is not kept."""
    model = rf.fuse(stage(2, channels=16)).bfloat16()
    with saved_bytes(model) as found, rf.use_backend("cpu"):
        y = model(X.bfloat16())
    storages = {y.untyped_storage().data_ptr(): y.nbytes}
    assert not storages.keys() & found.keys()
    assert list(found.values()).count(y.nbytes // 16) >= 2


# --- memory="low": the same bits -----------------------------------------------------------------


def gradients(model: nn.Module, x: Tensor, around=contextlib.nullcontext) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with around():
        loss = model(x).square().mean()
    loss.backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b) > 1
    assert all(map(torch.equal, a, b))


def padded_shortcut() -> nn.Module:
    return rf.models.create_model("cifar_resnet20").layer2


NATIVE = [("cpu", torch.float32), ("cpu", torch.bfloat16)] if cpu.available() is None else []


@pytest.mark.parametrize("make", [stage, SmallNet, padded_shortcut])
@pytest.mark.parametrize(("backend", "dtype"), [*NATIVE, ("reference", torch.float64)], ids=str)
def test_gradients_and_buffers_are_those_of_the_default(make, backend, dtype):
    default, low = both(make().to(dtype).train())
    x = image(2, 16, 8, 8, dtype=dtype) if make is padded_shortcut else X.to(dtype)
    with rf.use_backend(backend):
        assert_same_bits(*(gradients(m, x) for m in (default, low)))
    assert all(map(torch.equal, default.buffers(), low.buffers()))


def test_each_block_end_is_computed_once_more():
    calls = []
    for model in both(stage(blocks=4)):
        with Ops() as counter, rf.use_backend("reference"):
            gradients(model, X)
        calls.append(counter.found)
    assert calls[1] - calls[0] == {"bn_act": 3, "dual_bn_act": 1}
    assert not calls[0] - calls[1]


def test_outputs_go_as_the_gradient_passes():
    """At no time do more live than one stage has, and in the end none."""
    model = rf.fuse(nn.Sequential(*stage(3), Residual(8, 12, 2), Residual(12, 12)), memory="low")
    alive: list[int] = []
    outputs: list = []

    def count(*_: object) -> None:
        alive.append(sum(o() is not None and o()._y is not None for o in outputs))

    for block in list(model)[1:]:
        block.register_forward_hook(lambda m, a, y: outputs.append(recompute._outputs[y][0]))
        block.register_full_backward_hook(count)
    with rf.use_backend("reference"):
        loss = model(X).square().mean()
        count()
        loss.backward()
    assert alive[0] == 0
    assert max(alive) <= 3
    assert not any(o() for o in outputs)


def test_no_output_outlives_the_forward():
    """Neither the graph nor what it calls holds one: their memory is there for the next block."""
    model = rf.fuse(stage(4), memory="low")
    outputs: list = []
    for block in list(model)[1:]:
        block.register_forward_hook(lambda m, a, y: outputs.append(weakref.ref(y)))
    loss = model(X).sum()
    assert len(outputs) == 4
    assert not any(y() is not None for y in outputs)
    loss.backward()


def test_of_a_long_stage_some_outputs_are_kept():
    """Else all were there at once in the end, as if none had been dropped."""
    blocks = 2 * recompute.LONGEST + 3
    default, low = both(stage(blocks))
    lengths: list[int] = []
    compute = recompute.Output._compute

    def count(output: recompute.Output) -> None:
        if output._y is None:
            lengths.append(output.length)
        compute(output)

    with pytest.MonkeyPatch.context() as patch, rf.use_backend("reference"):
        patch.setattr(recompute.Output, "_compute", count)
        assert_same_bits(gradients(low, X), gradients(default, X))
    assert max(lengths) == recompute.LONGEST
    assert len(lengths) == blocks - 2


def test_an_output_kept_by_the_caller_keeps_nothing_else():
    model = rf.fuse(stage(), memory="low")
    y = model(X)
    output = recompute._outputs[y][0]
    assert output() is not None
    y.sum().backward()
    assert output() is None


def test_a_graph_kept_gives_the_same_again():
    default, low = both(stage())
    results = []
    for model in (default, low):
        loss = model(X).square().mean()
        parameters = list(model.parameters())
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert_same_bits(list(first), list(torch.autograd.grad(loss, parameters)))
        results.append(list(first))
    assert_same_bits(*results)


def test_a_gradient_of_one_early_part():
    results = []
    for model in both(stage()):
        loss = model(X).square().mean()
        results.append(list(torch.autograd.grad(loss, [model[1].conv1.weight, model[0][1].bias])))
    assert_same_bits(*results)


def test_more_blocks_than_python_nests_calls():
    def add(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a + b, a

    one = torch.ones(3)
    output = recompute.Output(add, [recompute.Kept(one, None), one], None)
    for _ in range(3000):
        output = recompute.Output(add, [recompute.Kept(one, None), output], None)
    assert torch.equal(output.value(), 3002 * one)


# --- memory="low" among other uses of saved tensors ----------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, parts: nn.Sequential) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = checkpoint(part, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("together", [False, True])
def test_activation_checkpointing(together):
    parts = list(stage(4))
    groups = [nn.Sequential(*parts[:3]), nn.Sequential(*parts[3:])] if together else parts
    default, low = both(Checkpointed(nn.Sequential(*groups)))
    assert_same_bits(*(gradients(m, X) for m in (default, low)))


@pytest.mark.parametrize("around", [
    save_on_cpu, lambda: saved_tensors_hooks(lambda t: (t.clone(),), lambda t: t[0]),
    lambda: disable_saved_tensors_hooks("no hooks here"),
])  # fmt: skip
def test_inside_other_hooks(around):
    default, low = both(stage())
    assert_same_bits(gradients(default, X, around), gradients(low, X, around))


def test_hooks_around_a_part_alone():
    default, low = both(stage(4))

    def halves(model: nn.Module):
        def forward(x: Tensor) -> Tensor:
            with save_on_cpu():
                x = model[:3](x)
            return model[3:](x)

        return forward

    results = []
    for model in (default, low):
        halves(model)(X).square().mean().backward()
        results.append([p.grad for p in model.parameters()])
    assert_same_bits(*results)


def test_compile():
    torch._dynamo.reset()
    default, low = both(stage())
    compiled = torch.compile(low, backend="aot_eager", fullgraph=True)
    a, b = gradients(default, X), gradients(compiled, X)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q)


# --- memory="low" and what is written in between --------------------------------------------------


@pytest.mark.parametrize("kind", ["the input", "a convolution's weight", "a weight of BatchNorm"])
def test_a_write_between_forward_and_backward_is_noticed(kind):
    """As by torch without hooks."""
    block = rf.fuse(nn.Sequential(Residual(3, 3), Residual(3, 3)).train(), memory="low")
    x = X.clone().requires_grad_() * 1
    y = block(x)
    written = {"the input": x, "a convolution's weight": block[1].conv1.weight,
               "a weight of BatchNorm": block[1].bn1.weight}[kind]  # fmt: skip
    with torch.no_grad():
        written.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_written_in_place_is_no_longer_the_block_s():
    """What reads it then keeps what it read; the block's own ReLU is still where it was."""
    default, low = both(stage(2))

    def out_of_place(x: Tensor) -> Tensor:
        return default[2](default[:2](x) + 1)

    def in_place(x: Tensor) -> Tensor:
        return low[2](low[:2](x).add_(1))

    results = []
    for model, function in ((default, out_of_place), (low, in_place)):
        function(X).square().mean().backward()
        results.append([p.grad for p in model.parameters()])
    assert_same_bits(*results)


def test_a_write_that_no_counter_sees_gives_other_gradients():
    """As the documentation says; by default the map itself is kept, as in torch."""
    gradients = []
    for model in both(stage(2)):
        y = model[:2](X)
        y.data.mul_(2)
        model[2](y).square().mean().backward()
        gradients.append(model[2].conv1.weight.grad)
    assert not torch.equal(*gradients)


# --- the option ----------------------------------------------------------------------------------


def test_the_option_is_checked_before_anything_changes():
    model = stage()
    with pytest.raises(ValueError, match=r"memory must be one of .*default.*low.*got 'less'"):
        rf.fuse(model, inplace=True, memory="less")
    assert not rf.fusion_report(model).fused


def test_copies_pickles_and_the_report_know_it():
    default, low = both(stage())
    for model in (low, copy.deepcopy(low), pickle.loads(pickle.dumps(low))):
        report = rf.fusion_report(model)
        assert report.memory == "low"
        assert "memory in training: low" in str(report)
        y = model(X)
        assert recompute._outputs[y][0]() is not None
    assert rf.fusion_report(default).memory == "default"
    assert "memory" not in str(rf.fusion_report(default))
    assert rf.fusion_report(nn.Sequential(default, low)).memory == "default and low"
    assert rf.fusion_report(rf.fuse(low)).memory == "default"
    back = rf.unfuse(low)
    assert rf.fusion_report(back).memory == "default"
    assert type(back[1]) is Residual


def test_nothing_is_noted_where_nothing_is_saved():
    low = rf.fuse(stage(), memory="low")
    with torch.no_grad():
        y = low(X)
    assert y not in recompute._outputs
    low.eval()
    y = low(X)
    assert y not in recompute._outputs
    assert F.relu(y).requires_grad
