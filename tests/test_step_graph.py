"""capture_step without a GPU: on a fake of torch.cuda. A real capture is for ``tests/gpu``."""

import copy
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf
from resnet_fused import step_graph
from resnet_fused.backends import _derived, _requested
from resnet_fused.ops import _casts

sys.path.append(str(Path(__file__).parent / "engine"))
import fake_cuda

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


class Adam(torch.optim.Optimizer):
    """As torch's capturable one, which runs on GPUs only: its count of steps is a tensor."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"lr": torch.tensor(0.01)})

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state |= {"step": torch.zeros(()), "m": p.new_zeros(p.shape)}
            state["step"] += 1
            state["m"].lerp_(p.grad, 0.1)
            p.sub_(self.param_groups[0]["lr"] * state["m"] / (1 - 0.9 ** state["step"]))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": Adam,
}


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(step_graph, "_device", lambda examples, warmup: CPU)
    with rf.use_backend("reference"):
        yield fake_cuda.install(monkeypatch, CPU)


def batch(seed: int, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 6, 6, generator=generator)
    return x, torch.randint(5, (n,), generator=generator)


def trained(model: nn.Module, optimizer, update: bool = True):
    def step(x, target):
        if update:
            optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        if update:
            optimizer.step()
        return {"loss": loss}

    return step


def state(model: nn.Module, optimizer=None) -> dict[str, torch.Tensor]:
    values = {k: v.clone() for k, v in model.state_dict().items()}
    made = optimizer.state_dict()["state"] if optimizer else {}
    for i, entries in made.items():
        values |= {f"{i}.{k}": v.clone() for k, v in entries.items() if torch.is_tensor(v)}
    return values


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_captured_steps_are_eager_steps(cuda, name, steps_before):
    """From no state of the optimizer and from some, the same losses and the same state."""
    eager = rf.fuse(Net().train())
    model = copy.deepcopy(eager)
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in (eager, model)]
    plain, step = (trained(m, o) for m, o in zip((eager, model), optimizers, strict=True))
    for seed in range(steps_before):
        plain(*batch(seed)), step(*batch(seed))
    before = state(model, optimizers[1])
    captured = rf.capture_step(step, *batch(7), model=model, optimizer=optimizers[1])
    after = state(model, optimizers[1])
    assert_same({k: after[k] for k in before}, before)
    assert steps_before or not any(v.any() for k, v in after.items() if k not in before)
    losses = []
    for seed in range(10, 14):
        expected, got = plain(*batch(seed))["loss"], captured(*batch(seed))["loss"]
        torch.testing.assert_close(got, expected.detach())
        assert not got.requires_grad
        losses.append(got)
    assert len({loss.item() for loss in losses}) == 4, "each the caller's own"
    assert_same(state(model, optimizers[1]), state(eager, optimizers[0]))
    assert int(model.bn.num_batches_tracked) == steps_before + 4


def test_all_of_it_runs_as_is_best_in_a_graph_and_nothing_else(cuda):
    """The warm-up too, or kernels would be compiled while they are recorded."""
    model, asked = rf.fuse(Net().train()), []
    step = trained(model, None, update=False)

    def noting(*given):
        asked.append(_requested.for_a_graph())
        return step(*given)

    rf.capture_step(noting, *batch(0), model=model)
    assert asked == [True] * 5
    noting(*batch(0))
    with pytest.raises(Unrepeatable):
        rf.capture_step(lambda x, t: raises(model, x, t), *batch(0), model=model)
    noting(*batch(0))
    assert asked[5:] == [False, False]


def test_a_compiled_model_stays_compiled(cuda):
    """Dynamo leaves alone, for good, what it meets under a mode that does not say otherwise."""
    compiled = []

    def backend(graph, examples):
        def run(*args):
            compiled.append(len(args))
            return graph(*args)

        return run

    torch._dynamo.reset()
    model = Net()
    forward = torch.compile(model, backend=backend)
    x = torch.randn(4, 3, 8, 8)
    forward(x)
    assert len(compiled) == 1
    captured = rf.capture_step(lambda t: forward(t).sum().backward(), x, model=model, warmup=2)
    # One more to be recorded, but for the mode by which the fake records.
    assert len(compiled) == 1 + 1 + 2, "the first, the examination and the warm-up"
    captured(x)


def test_gradients_alone_are_added_to_what_was_there(cuda):
    model = rf.fuse(Net().train())
    step = trained(model, None, update=False)
    step(*batch(0))
    before = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters()}
    captured = rf.capture_step(step, *batch(1), model=model)
    for name, p in model.named_parameters():
        kept, values = before[name]
        assert p.grad is kept
        assert torch.equal(kept, values)
    twin = copy.deepcopy(model)
    for name, q in twin.named_parameters():
        q.grad = before[name][1].clone()
    captured(*batch(2))
    trained(twin, None, update=False)(*batch(2))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_random_numbers_go_on_where_they_were(cuda):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(108, 5)).train()
    torch.manual_seed(3)
    rf.capture_step(trained(model, None, update=False), *batch(0), model=model, warmup=1)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    # The recording draws once: on a GPU it does not, and the warm-up is what is put back.
    F.dropout(torch.ones(4, 108))
    assert torch.equal(drawn, torch.rand(3))


def test_what_was_derived_from_parameters_is_made_anew(cuda):
    """Replays move no version; weights packed or folded before must not outlive them."""
    model = rf.fuse(Net().train())
    captured = rf.capture_step(
        trained(model, o := OPTIMIZERS["sgd"](model.parameters())), *batch(0), model=model,
        optimizer=o,
    )  # fmt: skip
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    captured(*batch(1))
    moved = [t._version for t in (*model.parameters(), *model.buffers())]
    assert all(b > a for a, b in zip(versions, moved, strict=True))


class Unrepeatable(Exception):
    pass


def reads_back(model, x, target):
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    return loss.item()


def raises(model, x, target):
    F.cross_entropy(model(x), target).backward()
    raise Unrepeatable


losses = weakref.WeakSet()


def on_another_stream(model, x, target):
    """As torch warns where an older loss is held, but on a GPU alone."""
    loss = F.cross_entropy(model(x), target)
    losses.add(loss)
    loss.backward()
    warnings.warn("The AccumulateGrad node's stream does not match the str...", stacklevel=1)


def warns(model, x, target):
    F.cross_entropy(model(x), target).backward()
    raise UserWarning("of its own")


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        (reads_back, RuntimeError, "reads a value back to the host"),
        (raises, Unrepeatable, "^$"),
        (on_another_stream, RuntimeError, "held, on another stream, by a result of an earlier ste"),
        (warns, UserWarning, "^of its own$"),
    ],
)
def test_a_step_that_fails_leaves_no_trace(cuda, body, error, words):
    model = rf.fuse(Net().train())
    before = state(model)
    with pytest.raises(error, match=words) as raised:
        rf.capture_step(lambda x, t: body(model, x, t), *batch(0), model=model)
    assert not losses, f"held by {raised.value!r}: the next capture would meet them"
    assert_same(state(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert cuda.recordings == []


def test_a_recording_that_fails_leaves_no_trace(cuda):
    model = rf.fuse(Net().train())
    before = state(model)
    cuda.fault = RuntimeError("operation not permitted")
    with pytest.raises(RuntimeError, match="not permitted"):
        rf.capture_step(trained(model, None, update=False), *batch(0), model=model)
    assert_same(state(model), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (batch(0)[:1], "got 1 inputs, was captured with 2"),
        (batch(0, n=3), r"input 0 is \(3, 3, 6, 6\) in torch.float32, was captured with \(4,"),
        ((batch(0)[0].double(), batch(0)[1]), "input 0 is .* in torch.float64"),
    ],
)
def test_inputs_that_do_not_fit(cuda, inputs, words):
    model = rf.fuse(Net().train())
    captured = rf.capture_step(trained(model, None, update=False), *batch(0), model=model)
    before = state(model)
    with pytest.raises(ValueError, match=words):
        captured(*inputs)
    assert_same(state(model), before)


@pytest.mark.parametrize(
    ("examples", "options", "error", "words"),
    [
        ((), {}, ValueError, "examples: needs at least one"),
        ((torch.zeros(1),), {}, ValueError, "examples: must be on a CUDA device, 0 is on cpu"),
        ((3,), {}, TypeError, "examples: all must be tensors, 0 is int"),
        ((torch.zeros(1),), {"warmup": 0}, ValueError, "warmup: must be at least 1, got 0"),
    ],
)
def test_bad_arguments(examples, options, error, words):
    with pytest.raises(error, match=words):
        rf.capture_step(pytest.fail, *examples, model=Net(), **options)


# --- weights cast together ------------------------------------------------------------------------


def test_a_cast_is_made_ahead_once_it_was_noted():
    weight = nn.Parameter(torch.randn(4, 3))
    assert _casts.cast(weight, torch.bfloat16).grad_fn.name() == "ToCopyBackward0"
    with _casts.together() as casts:
        first = _casts.cast(weight, torch.bfloat16)
        casts.begin()
        made = _casts.cast(weight, torch.bfloat16)
        again = _casts.cast(weight, torch.bfloat16)
        other = _casts.cast(weight, torch.float16)
        plain = _casts.cast(weight.detach(), torch.bfloat16)
    assert made.data_ptr() == again.data_ptr() != first.data_ptr()
    assert plain.data_ptr() not in (made.data_ptr(), first.data_ptr())
    for cast in (first, made, again, other):
        assert torch.equal(cast, weight.detach().to(cast.dtype))
        (grad,) = torch.autograd.grad(cast.float().square().sum(), weight)
        assert grad.dtype == torch.float32
        assert torch.equal(grad, 2 * cast.float().detach().to(cast.dtype).float())


def test_what_was_made_holds_until_the_parameter_is_written():
    weight = nn.Parameter(torch.ones(3))
    with _casts.together() as casts:
        _casts.cast(weight, torch.bfloat16)
        casts.begin()
        with torch.no_grad():
            weight.add_(1)
        assert _casts.cast(weight, torch.bfloat16).tolist() == [2, 2, 2]
        casts.begin()
        made = _casts.cast(weight, torch.bfloat16)
        assert made.grad_fn.name() == "_MadeBackward"
        assert made.tolist() == [2, 2, 2]
    with _casts.together() as others, torch.no_grad():
        others.begin()
        assert _casts.cast(weight, torch.bfloat16).data_ptr() != made.data_ptr()


def test_a_parameter_that_is_written_unseen_is_cast_again():
    """At the head of a step by anyone; by an optimizer, which may move no counter, at any time."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    with _casts.together() as casts:
        _casts.cast(weight, torch.bfloat16)
        casts.begin()
        weight.data.mul_(3)
        assert _casts.cast(weight, torch.bfloat16).tolist() == [3, 3, 3]
        weight.grad = torch.ones(3)
        optimizer.step()
        assert _casts.cast(weight, torch.bfloat16).tolist() == [2, 2, 2]
        casts.begin()
        assert _casts.cast(weight, torch.bfloat16).grad_fn.name() == "_MadeBackward"
        weight.data = torch.full((3,), 7.0)
        assert _casts.cast(weight, torch.bfloat16).tolist() == [7, 7, 7]


@pytest.mark.parametrize("waits", [True, False])
def test_another_stream_waits_for_what_the_first_cast_made(cuda, waits, monkeypatch):
    """Also where a step meets its first cast on a stream beside its own."""
    if not waits:  # the detector then sees it
        monkeypatch.setattr(_derived.Made, "wait", lambda self: None)
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    own, beside = cuda.caller_stream(), cuda.caller_stream()
    with _casts.together() as casts, cuda.device(CPU):
        with cuda.on(own):
            for weight in (first, second):
                _casts.cast(weight, torch.bfloat16)
        for _ in range(2):
            casts.begin()
            beside.wait_stream(own)
            with cuda.on(beside):
                _casts.cast(first, torch.bfloat16).sum()
            with cuda.on(own):
                made = _casts.cast(second, torch.bfloat16)
                made.sum()
            own.wait_stream(beside)
    assert made.grad_fn.name() == "_MadeBackward"
    assert bool(cuda.races) != waits


def test_casts_of_parameters_that_are_gone_are_not_made():
    with _casts.together() as casts:
        for _ in range(3):
            weight = nn.Parameter(torch.ones(3))
            _casts.cast(weight, torch.bfloat16)
            casts.begin()
            assert _casts.cast(weight, torch.bfloat16).tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_captured_steps_cast_together(cuda, name, monkeypatch):
    """At each replay the weights as they are then.

    With frozen BatchNorm, as on the CPU the ops of training read wide weights.
    """
    net = Net().train()
    net.bn.eval()
    eager = rf.fuse(net)
    model = copy.deepcopy(eager)
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in (eager, model)]
    plain, step = (trained(m, o) for m, o in zip((eager, model), optimizers, strict=True))
    made = []
    make = _casts.Casts._make

    def noting(casts):
        made.append(len(casts._twins))
        make(casts)

    monkeypatch.setattr(_casts.Casts, "_make", noting)

    def under_autocast(run):
        def stepping(x, target):
            with torch.autocast("cpu", torch.bfloat16):
                return run(x, target)

        return stepping

    plain, step = map(under_autocast, (plain, step))
    captured = rf.capture_step(step, *batch(7), model=model, optimizer=optimizers[1])
    assert made == [0, 1, 1, 1, 1]  # noted by the first of them
    for seed in range(10, 14):
        expected, got = plain(*batch(seed))["loss"], captured(*batch(seed))["loss"]
        torch.testing.assert_close(got, expected.detach())
    assert_same(state(model, optimizers[1]), state(eager, optimizers[0]))
