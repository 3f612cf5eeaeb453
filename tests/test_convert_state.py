"""A fused model through its life: saved, loaded, cast, changed, hooked, compiled, trained."""

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from nets import Residual, SmallNet, assert_same_model, calibrate, fused_calls, image, small_net
from torch import nn
from torch.func import functional_call

import resnet_fused as rf
from resnet_fused.backends import _derived
from resnet_fused.testing import gradient_metrics

X = image(2, 3, 32, 32)
GROUPS = 6
REDUCED = 144


def pair() -> tuple[nn.Module, nn.Module]:
    """The same network twice, the first fused; a forward has been run, so constants are kept."""
    model = small_net()
    fused = rf.fuse(model)
    with torch.no_grad():
        fused(X)
    return fused, model


def assert_same(fused: nn.Module, model: nn.Module, groups: int = GROUPS) -> None:
    assert_same_model(fused, model, X, reduced=REDUCED)
    assert fused_calls(fused, X) == groups


# --- copies --------------------------------------------------------------------------------------


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_run_fused_and_apart(how):
    fused, model = pair()
    other = COPIES[how](fused)
    assert isinstance(other, SmallNet)
    assert_same(other, model)
    if how != "copy":
        with torch.no_grad():
            other.bn1.weight.mul_(2)
        assert_same(fused, model)
    rf.unfuse(other)
    assert type(other) is SmallNet
    assert fused_calls(other, X) == 0


def test_checkpoints_hold_tensors_alone():
    fused, model = pair()
    buffer = io.BytesIO()
    torch.save(fused.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert list(state) == list(model.state_dict())
    model.load_state_dict(state, strict=True)


def test_nothing_is_kept_for_a_model_that_is_gone():
    gc.collect()
    before = len(_derived._cache)
    fused, model = pair()
    assert len(_derived._cache) > before
    del fused, model
    gc.collect()
    assert len(_derived._cache) == before


# --- changed parameters --------------------------------------------------------------------------


def test_load_state_dict_after_a_forward():
    fused, _ = pair()
    torch.manual_seed(7)
    other = calibrate(SmallNet(), X)
    fused.load_state_dict(other.state_dict(), strict=True)
    assert_same(fused, other)
    fused.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)
    assert_same(fused, other)


NAMES = [k for k in SmallNet().state_dict() if "num_batches" not in k]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_changed_between_forwards(mode):
    fused, model = pair()
    with mode():
        fused(X)
        for name in NAMES:
            for m in (fused, model):
                m.state_dict()[name].mul_(1.25)
            twin = copy.deepcopy(model)
            assert (fused(X) - twin(X)).abs().max() < 1e-4, name
    assert_same(fused, model)


def test_parameters_replaced_between_forwards():
    fused, model = pair()
    for m in (fused, model):
        m.conv1.weight = nn.Parameter(m.conv1.weight.detach() * 2)
        m.bn1.running_var = m.bn1.running_var * 3
        m.layer1[0].bn1.bias.data = m.layer1[0].bn1.bias.data + 1
    assert_same(fused, model)


def test_an_optimizer_step_between_forwards():
    fused, model = pair()
    for m in (fused, model):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            m.train()
            F.cross_entropy(m(X), torch.tensor([0, 1])).backward()
            optimizer.step()
            optimizer.zero_grad()
        m.eval()
    assert_same(fused, model)


def test_models_made_in_inference_mode():
    with torch.inference_mode():
        model = SmallNet().eval()
        fused = rf.fuse(model)
        for _ in range(2):
            value, eager = fused(X), model(X)
            torch.testing.assert_close(value, eager)
            fused.bn1.weight.mul_(2)
            model.bn1.weight.mul_(2)


@pytest.mark.parametrize("outer", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_constants_made_in_one_mode_serve_another(outer):
    model = small_net()
    fused = rf.fuse(model)
    with outer():
        fused(X)
    x = X.clone().requires_grad_()
    fused(x).sum().backward()
    for parameter in fused.parameters():
        parameter.requires_grad_(False)
    fused(x).sum().backward()
    assert_same(fused, model)


# --- dtype, layout, device -----------------------------------------------------------------------


def test_to_and_fro_between_dtypes():
    fused, model = pair()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        fused, model = fused.to(dtype), model.to(dtype)
        assert_same_model(fused, model, X.to(dtype), reduced=REDUCED)


def test_16_bit_model_with_float32_norms():
    fused, model = pair()
    for m in (fused, model):
        m.bfloat16()
        for norm in m.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.float()
    assert_same_model(fused, model, X.bfloat16(), reduced=REDUCED)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_to_memory_format(layout):
    fused, model = pair()
    fused = fused.to(memory_format=layout)
    assert_same(fused, model)
    assert_same_model(fused, model, X.contiguous(memory_format=layout), reduced=REDUCED)


def test_meta_and_fake_tensors():
    fused = rf.fuse(SmallNet().to("meta").eval())
    assert fused(X.to("meta")).shape == (2, 5)
    fused, _ = pair()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert fused(torch.empty(4, 3, 32, 32)).shape == (4, 5)
    assert fused_calls(fused, X) == GROUPS


def test_empty_batch():
    fused, model = pair()
    x = torch.empty(0, 3, 32, 32)
    assert fused(x).shape == model(x).shape == (0, 5)


class OutOfPlace(Residual):
    def forward(self, x):
        return self.relu(self.bn2(self.conv2(x)) + x)


def test_autocast_with_a_residual_that_is_not_cast():
    model = OutOfPlace().eval()
    fused = rf.fuse(model)
    x = image(2, 8, 6, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        value, eager = fused(x), model(x)  # bfloat16 + float32
    assert value.dtype == eager.dtype == torch.float32
    torch.testing.assert_close(value, eager, rtol=2**-7, atol=2**-7 * float(eager.abs().max()))


# --- training ------------------------------------------------------------------------------------


def test_train_and_eval_in_turns():
    fused, model = pair()
    for _ in range(2):
        for m in (fused, model):
            m.train()
            m(X)
            m.eval()
        for a, b in zip(fused.state_dict().values(), model.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        twin = copy.deepcopy(model)
        twin.load_state_dict(fused.state_dict())
        assert_same(fused, twin)


def freeze_norms(model: nn.Module, *, parameters: bool) -> None:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            m.weight.requires_grad_(parameters)
            m.bias.requires_grad_(parameters)


@pytest.mark.parametrize("parameters", [True, False])
def test_frozen_norms_in_a_model_that_trains(parameters):
    fused, model = pair()
    oracle = copy.deepcopy(model).double()
    gradients, states = [], []
    for m, dtype in ((fused, torch.float32), (model, torch.float32), (oracle, torch.float64)):
        m.train()
        freeze_norms(m, parameters=parameters)
        x = X.to(dtype, copy=True).requires_grad_()
        F.cross_entropy(m(x), torch.tensor([0, 1])).backward()
        gradients.append([x.grad, *(p.grad for p in m.parameters())])
        states.append(m.bn1.running_var.float())
    assert torch.equal(states[0], states[1])
    for value, eager, exact in zip(*gradients, strict=True):
        assert (value is None) == (exact is None)
        if value is not None:
            ours, theirs = (gradient_metrics(g, exact).cosine for g in (value, eager))
            assert 1 - ours <= 2 * (1 - theirs) + 1e-10
    assert fused_calls(fused, X) == GROUPS


def test_one_norm_frozen_alone():
    fused, model = pair()
    for m in (fused, model):
        m.train()
        m.layer1[0].bn2.eval()
    assert fused_calls(fused, X) == 1
    model(X)
    torch.testing.assert_close(fused(X), model(X))


def test_sync_batch_norm_comes_later():
    fused, model = pair()
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert_same(fused, model)


# --- changes to the module tree ------------------------------------------------------------------


@pytest.fixture
def hooks_seen() -> list[str]:
    return []


HOOKED = ["conv1", "bn1", "relu", "layer1.1.downsample", "layer1.1.downsample.1", "layer1.0"]


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_added_before_fuse(name, kind, hooks_seen):
    model = small_net()
    getattr(model.get_submodule(name), kind)(lambda *args: hooks_seen.append(name))
    fused = rf.fuse(model)
    fused(X)
    assert hooks_seen == [name]
    assert_same_model(fused, model, X, reduced=REDUCED)


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_added_after_fuse(name, hooks_seen):
    fused, model = pair()
    handle = fused.get_submodule(name).register_forward_hook(lambda *a: hooks_seen.append(name))
    fused(X)
    assert hooks_seen == [name]
    assert_same_model(fused, model, X, reduced=REDUCED)
    handle.remove()
    assert_same(fused, model)
    assert len(hooks_seen) == 2


def test_a_hook_that_changes_the_result():
    fused, model = pair()
    for m in (fused, model):
        m.layer1[0].conv1.register_forward_hook(lambda module, args, y: y * 2)
    assert_same_model(fused, model, X, reduced=REDUCED)


def test_a_backward_hook(hooks_seen):
    fused, _ = pair()
    fused.conv1.register_full_backward_hook(lambda *args: hooks_seen.append("conv1"))
    fused(X.clone().requires_grad_()).sum().backward()
    assert hooks_seen == ["conv1"]


def replace(path: str, make):
    def change(model):
        parent, _, last = path.rpartition(".")
        torch.manual_seed(11)
        setattr(model.get_submodule(parent), last, make())

    return change


def append(model):
    model.layer1[1].downsample.append(nn.BatchNorm2d(16).eval())
    nn.init.constant_(model.layer1[1].downsample[2].weight, 2)


def monkeypatch_forward(model):
    model.layer1[0].relu.forward = torch.sigmoid


def other_padding(model):
    model.conv1.padding_mode = "circular"
    model.conv1._reversed_padding_repeated_twice = [3] * 4


CHANGES = {
    "a convolution of another kind": replace("conv1", lambda: nn.Conv2d(3, 8, 3, 2, 1)),
    "a convolution that is none": replace("layer1.0.conv1", nn.Identity),
    "another norm": replace("bn1", lambda: nn.GroupNorm(2, 8)),
    "another activation": replace("relu", nn.GELU),
    "another activation in a block": replace("layer1.0.relu", nn.Sigmoid),
    "another projection": replace(
        "layer1.1.downsample", lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 16, 1))
    ),
    "a projection where there was none": replace("layer1.0.downsample", lambda: nn.Conv2d(8, 8, 1)),
    "a longer projection": append,
    "a stage cut out": replace("layer1.0", nn.Identity),
    "a forward on the instance": monkeypatch_forward,
    "another padding mode": other_padding,
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model.conv1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_modules_changed_after_fuse(name):
    fused, model = pair()
    for m in (fused, model):
        CHANGES[name](m)
    with torch.no_grad():
        torch.testing.assert_close(fused(X), model(X), rtol=1e-4, atol=1e-5)


class Switched(Residual):
    def __init__(self):
        super().__init__()
        self.scale = 1.0
        self.double = False

    def forward(self, x):
        out = super().forward(x) * self.scale
        return out + out if self.double else out


@pytest.mark.parametrize(("flag", "value"), [("scale", 0.5), ("double", True)])
def test_flags_set_after_fuse(flag, value):
    model = Switched().eval()
    fused = rf.fuse(model)
    x = image(2, 8, 6, 6)
    assert fused_calls(fused, x) == 2
    for m in (fused, model):
        setattr(m, flag, value)
    torch.testing.assert_close(fused(x), model(x))


class Optional(Residual):
    def forward(self, x, residual):
        out = self.relu(self.bn1(self.conv1(x)))
        return out if residual is None else out + residual


def test_an_argument_that_is_none():
    model = Optional().eval()
    fused = rf.fuse(model)
    x = image(2, 8, 6, 6)
    torch.testing.assert_close(fused(x, None), model(x, None))
    torch.testing.assert_close(fused(x, x), model(x, x))
    torch.testing.assert_close(fused(x, residual=x), model(x, x))
    with pytest.raises(TypeError, match="residual"):
        fused(x)


# --- torch's own transforms ----------------------------------------------------------------------


def test_functional_call():
    fused, model = pair()
    torch.manual_seed(5)
    state = calibrate(SmallNet(), X).state_dict()
    with torch.no_grad():
        value, eager = functional_call(fused, state, (X,)), functional_call(model, state, (X,))
    torch.testing.assert_close(value, eager)
    assert_same(fused, model)


def test_func_grad():
    fused, model = pair()
    gradients = []
    for m in (fused, model):
        parameters = dict(m.named_parameters())
        gradients.append(
            torch.func.grad(lambda p, m=m: functional_call(m, p, (X,)).square().sum())(parameters)
        )
    for key in gradients[0]:
        torch.testing.assert_close(gradients[0][key], gradients[1][key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_compile(training):
    fused, model = pair()
    fused.train(training)
    model.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(X), model(X))
    with torch.no_grad():
        for m in (fused, model):
            m.bn1.weight.mul_(2)
        torch.testing.assert_close(compiled(X), model(X))


def test_export():
    fused, model = pair()
    program = torch.export.export(fused, (X,))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("resnet_fused.conv_bn_act.default") == GROUPS
    assert_same_model(program.module(), model, X, reduced=REDUCED)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace():
    fused, model = pair()
    traced = torch.jit.trace(fused, X)
    torch.testing.assert_close(traced(X), model(X))


def test_threads():
    fused, model = pair()
    results = [None] * 4

    def work(i):
        with torch.no_grad():
            for _ in range(10):
                results[i] = fused(X + i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in enumerate(results):
        torch.testing.assert_close(result, model(X + i))
