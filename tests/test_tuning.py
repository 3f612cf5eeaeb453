"""Choice by measurement: what is found, checked, timed, chosen and remembered.

There is no GPU here. Backends and clocks are made up where the rule is tested, and the CPU's
backends are the candidates where the whole is.
"""

import contextlib
import json
import math
import sys
import threading
import time
import types

import pytest
import torch
from nets import ConvBnRelu, Ops, SmallNet, image
from torch import nn

import resnet_fused as rf
from resnet_fused.backends import (
    ORDER,
    REFERENCE,
    _tuned,
    _tuned_file,
    choose,
    cpu,
    cudnn,
    trains,
)
from resnet_fused.backends._requested import becoming_a_graph
from resnet_fused.backends._tuned_file import Choice
from resnet_fused.models import create_model
from resnet_fused.ops import INFERENCE, OPS, TRAINING
from resnet_fused.tuning import tune_calls
from resnet_fused.tuning.ahead import compile_ahead
from resnet_fused.tuning.calls import Call, draw, harvest, harvest_merged, with_parts
from resnet_fused.tuning.measure import (
    FINALISTS,
    ROUNDS,
    SHORT_SAMPLE,
    CudaClock,
    _Answers,
    calls_at_most,
    fastest,
    measure,
)

CPU = torch.device("cpu")
X = image(4, 3, 32, 32)


class Ticks:
    """A clock that gives each run its own time, or the next of its list, and notes who ran."""

    def __init__(self, **seconds):
        self.seconds = seconds
        self.ran = []

    def __call__(self, run):
        name = run()
        self.ran.append(name)
        value = self.seconds[name]
        return value.pop(0) if isinstance(value, list) else value


def runs(*names):
    return {(name, "default"): lambda name=name: name for name in names}


# --- timing --------------------------------------------------------------------------------------


def test_the_fastest_by_median_wins_and_the_slow_are_dropped_early():
    ticks = Ticks(a=1.2, b=1.0, slow=1.6)
    seconds, errors = fastest(runs("a", "b", "slow"), ticks)
    assert list(seconds.items()) == [(("b", "default"), 1.0), (("a", "default"), 1.2)]
    assert not errors
    assert ticks.ran.count("slow") == SHORT_SAMPLE
    assert ticks.ran.count("a") == SHORT_SAMPLE + ROUNDS


def test_one_lucky_call_does_not_win():
    lucky = [0.5] * SHORT_SAMPLE + [0.5] + [1.5] * (ROUNDS - 1)
    seconds, _ = fastest(runs("lucky", "steady"), Ticks(lucky=lucky, steady=0.7))
    assert next(iter(seconds)) == ("steady", "default")


def test_the_last_rounds_are_interleaved_each_beginning_with_another():
    ticks = Ticks(a=1.0, b=1.1, c=1.2)
    fastest(runs("a", "b", "c"), ticks)
    last = ticks.ran[3 * SHORT_SAMPLE :]
    assert ["".join(last[i : i + 3]) for i in (0, 3, 6, 9)] == ["abc", "bca", "cab", "abc"]


def test_the_number_of_calls_is_bounded():
    """Twenty equal candidates cost 96 calls, and two of each to check it."""
    names = [f"c{i}" for i in range(20)]
    ticks = Ticks(**dict.fromkeys(names, 1.0))
    fastest(runs(*names), ticks)
    assert len(ticks.ran) == 20 * SHORT_SAMPLE + FINALISTS * ROUNDS == 96
    assert calls_at_most(20) == 96 + 2 * 20


@pytest.mark.parametrize("at", [0, SHORT_SAMPLE - 1, SHORT_SAMPLE + 2])
def test_one_that_raises_is_dropped_and_named(at):
    """At its first call, within the short sample, and in the rounds."""
    calls = []

    def dies():
        calls.append(None)
        if len(calls) > at:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return "dies"

    ticks = Ticks(dies=0.5, a=1.0)
    seconds, errors = fastest({("dies", "big"): dies, **runs("a")}, ticks)
    # Beside the one that died the other was too slow to be a finalist; now it is the best.
    assert ("dies", "big") not in seconds
    assert errors == {("dies", "big"): "OutOfMemoryError: CUDA out of memory."}
    assert list(seconds) == [("a", "default")]


def test_nothing_to_time():
    assert fastest({}, Ticks()) == ({}, {})


def test_the_cuda_clock_flushes_then_times_one_call(monkeypatch):
    """The flush is queued before the start, so it is not timed and hides the launch."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def query(self):
            return False

        def elapsed_time(self, end):
            return 2.5

    class Buffer:
        def zero_(self):
            log.append("flush")

    sizes = []
    properties = types.SimpleNamespace(L2_cache_size=2**28)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda size, **kwargs: sizes.append(size) or Buffer())
    clock = CudaClock(torch.device("cuda", 0))
    log.clear()
    assert clock(lambda: log.append("run")) == 2.5e-3
    assert log == ["flush", "record", "run", "record", "wait"]
    assert sizes == [2**29]
    monkeypatch.setattr(Event, "elapsed_time", lambda start, end: 0.2)
    clock = CudaClock(torch.device("cuda", 0))
    log.clear()
    clock(lambda: log.append("run"))
    assert log == [*["flush"] * 3, "record", "run", "record", "wait"], "launched too late"


# --- right answers -------------------------------------------------------------------------------


def arguments(batch=3, act="relu", dtype=torch.float32):
    shapes = (batch, 4, 6, 6), (5, 4, 3, 3), (5,), (5,), (batch, 5, 6, 6)
    tensors = [torch.empty(s, dtype=dtype, device="meta") for s in shapes]
    return draw(Call("conv_bn_act", (*tensors, [1, 1], [1, 1], [1, 1], 1, act)), CPU)


reference = OPS["conv_bn_act"].reference


def off_by_a_percent(*args):
    return reference(*args) * 1.01


def last_image_wrong(*args):
    y = reference(*args)
    y[-1] += 1
    return y


def nan_dropped(*args):
    return reference(*args).nan_to_num(0.0)


def misshapen(*args):
    return reference(*args)[:, 1:]


def one_image_less(*args):
    return reference(*args)[1:]


def dying(*args):
    raise RuntimeError("launch failed: too much shared memory\nmore words")


def in_float64(*args):
    return reference(*[a.double() if isinstance(a, torch.Tensor) else a for a in args]).to(
        args[0].dtype
    )


@pytest.fixture
def backend(monkeypatch):
    """One made-up backend alone in ORDER; its candidates are what a test puts there."""
    module = types.ModuleType("made_up")
    module.ADVICE = "none"
    module.available = lambda: None
    module.supports = lambda op, *args: None
    module.ways = {"default": in_float64}
    module.candidates = lambda op, *args: module.ways
    module.conv_bn_act = in_float64
    monkeypatch.setitem(choose.__globals__, "ORDER", {"made_up": module})
    return module


def tick(run):
    """Any candidate is faster than the reference."""
    run()
    return 2.0 if run.func is reference else 1.0


@pytest.mark.parametrize(
    ("way", "fault"),
    [
        (off_by_a_percent, "wrong: error "),
        (last_image_wrong, "wrong: error "),
        (nan_dropped, "wrong: does not keep NaN"),
        (misshapen, "wrong: gives the shape (20, 4, 6, 6)"),
        (one_image_less, "wrong: gives the shape (19, 5, 6, 6)"),
        (dying, "RuntimeError: launch failed: too much shared memory"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_wrong_candidate_is_dropped_with_its_reason(way, fault, dtype, backend):
    """However fast it is. Of 20 images 8 are looked at, the first and the last among them."""
    if dtype == torch.float16 and way is off_by_a_percent:
        pytest.skip("within float16's rule")
    backend.ways = {"right": in_float64, "bad": way}
    outcome = measure("conv_bn_act", arguments(20, dtype=dtype), tick)
    assert outcome.faults.keys() == {("made_up", "bad")}
    assert outcome.faults["made_up", "bad"].startswith(fault)
    assert list(outcome.seconds) == [("made_up", "right")]
    assert outcome.tried == 3


def test_the_reference_is_a_candidate_and_may_win(backend):
    outcome = measure("conv_bn_act", arguments(), lambda run: run.func is not reference)
    assert next(iter(outcome.seconds)) == (REFERENCE, "default")


@pytest.mark.parametrize("op", INFERENCE)
def test_every_op_can_be_measured(op, cache):
    """On its own samples: the reference answers rightly, so there is always a choice."""
    for args in list(OPS[op].samples("cpu", torch.float32))[:6]:
        if all(a.numel() for a in args if isinstance(a, torch.Tensor)):
            outcome = measure(op, args, lambda run: 1.0)
            assert (REFERENCE, "default") not in outcome.faults, outcome.faults


@pytest.mark.parametrize("op", [n for n, op in TRAINING.items() if not op.mutates])
def test_every_op_of_training_can_be_measured(op, cache):
    """By what runs here: nothing that is right is dropped."""
    for dtype in (torch.float32, torch.bfloat16):
        for args in list(OPS[op].samples("cpu", dtype))[:6]:
            if all(a.numel() for a in args if isinstance(a, torch.Tensor)):
                outcome = measure(op, args, lambda run: 1.0)
                assert not outcome.faults, args


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_wrong_result_of_several_is_found(place, backend):
    """The map, its mean or its variance; a mean of nearly nothing by the size of its terms."""
    right = OPS["conv_bn_stats"].reference

    def wrong(*args):
        results = list(right(*args))
        results[place] = results[place] + 0.1
        return tuple(results)

    backend.conv_bn_stats, backend.ways = right, {"right": right, "wrong": wrong}
    args = (torch.randn(4, 8, 9, 9), torch.randn(8, 8, 3, 3), [1, 1], [1, 1], [1, 1], 1)
    outcome = measure("conv_bn_stats", args, lambda run: 1.0)
    assert list(outcome.faults) == [("made_up", "wrong")]
    assert outcome.faults["made_up", "wrong"].startswith("wrong: error")


def test_wrong_bits_are_found(backend):
    """They are those of the candidate's own values, which may round to zero or not."""
    right = OPS["bn_act"].reference

    def wrong(*args):
        y, bits = right(*args)
        return y, bits ^ 1

    backend.bn_act, backend.ways = right, {"right": right, "wrong": wrong}
    x, one = torch.randn(4, 8, 9, 9).bfloat16(), torch.ones(8)
    outcome = measure("bn_act", (x, one, one, None, None, x, 0.1, "relu"), lambda run: 1.0)
    assert outcome.faults == {("made_up", "wrong"): "wrong: the bits are not those of the values"}


# --- a model's calls -----------------------------------------------------------------------------


def small_net():
    """Three convolutions, two of them the same call."""
    return nn.Sequential(ConvBnRelu(3, 8), ConvBnRelu(8, 8), ConvBnRelu(8, 8)).eval()


def reflecting(net):
    """A way of padding that is torch's alone."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "reflect"
    return net


@pytest.mark.parametrize("fused", [False, True])
def test_harvest_finds_every_call_once_with_its_count(fused):
    model = create_model("resnet50").eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(2, 3, 64, 64)
    calls = harvest(rf.fuse(model) if fused else model, x)
    assert sum(call.count for call in calls) == 53
    assert len(calls) == 24
    assert str(calls[0]) == "2x3x64x64 7x7 to 64 stride 2 relu"
    assert {"2x64x16x16 1x1 to 256 add relu", "2x64x16x16 1x1 to 256"} <= set(map(str, calls))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert rf.fusion_report(model).fused == []


def test_harvest_keeps_layout_and_dtype():
    x = torch.randn(1, 3, 8, 8).bfloat16()
    for layout in (torch.contiguous_format, torch.channels_last):
        first = harvest(small_net().bfloat16(), x.contiguous(memory_format=layout))[0]
        (drawn, *_), strides = draw(first, CPU), x.contiguous(memory_format=layout).stride()
        assert (drawn.stride(), drawn.dtype, drawn.shape) == (strides, torch.bfloat16, x.shape)


def test_draw_follows_any_strides():
    """Gaps and an expanded batch are kept; the values are the same for each draw."""
    for like in (
        torch.empty(2, 3, 9, 9)[:, :, ::2, 1::3],
        torch.empty(1, 3, 4, 4).expand(2, -1, -1, -1),
    ):
        call = Call("avg_pool_linear", (like.to("meta"), None, [1, 2]))
        first, second = (draw(call, CPU) for _ in range(2))
        assert first[0].stride() == like.to("meta").stride()
        assert torch.equal(first[0], second[0])
        assert first[1:] == (None, [1, 2])


def test_harvest_under_autocast_is_what_the_ops_get():
    """The choice is found by the very call that autocast makes."""
    model, x, seen = small_net(), torch.randn(1, 3, 8, 8), []
    with torch.autocast("cpu", torch.bfloat16):
        calls = harvest(model, x)
    keys = {_tuned.signature(call.op, draw(call, CPU)) for call in calls}

    def spy(op, *args):
        seen.append(_tuned.signature(op, args))

    patched = pytest.MonkeyPatch()
    patched.setattr("resnet_fused.ops._register.choose", spy)
    with patched.context(), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rf.fuse(model)(x)
    patched.undo()
    assert set(seen) == keys
    assert all(call.args[0].dtype == torch.bfloat16 for call in calls)


@pytest.mark.parametrize(
    ("autocast", "weights"),
    [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)],
)
def test_harvest_in_training_mode_is_what_a_step_calls(autocast, weights, monkeypatch):
    """Forward and backward, but what moves statistics.

    No backend is chosen here, so that ops which are chains run as such.
    """
    model, x, seen = SmallNet().train(), torch.randn(2, 3, 16, 16), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(weights)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with mixed:
        calls = with_parts(harvest(model, x))
    keys = {_tuned.signature(call.op, draw(call, CPU)) for call in calls}
    assert len(keys) == len(calls)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())

    def spy(op, *args):
        seen.append(_tuned.signature(op, args))

    monkeypatch.setattr("resnet_fused.ops._register.choose", spy)
    fused = rf.fuse(model)
    with mixed:
        loss = fused(x).sum()
    loss.backward()
    assert {key for key in seen if key[0] != "bn_update_stats"} == keys
    found = {"bn_act_conv_backward", "conv_backward_weight"}
    found |= {"bn_act_max_pool_backward", "max_pool_backward"}
    assert found <= {call.op for call in calls}


def test_parts_are_tuned_before_the_whole():
    """And counted for all that they are a part of, unless the model calls them itself."""
    calls = harvest(SmallNet().train(), torch.randn(2, 3, 16, 16))
    alone = {_tuned.signature(call.op, call.args): call.count for call in calls}
    tuned = with_parts(calls)
    places = {_tuned.signature(call.op, call.args): i for i, call in enumerate(tuned)}
    assert len(places) == len(tuned) > len(calls)
    wholes = [call for call in calls if OPS[call.op].decomposition]
    assert len(wholes) > 3
    for whole in wholes:
        parts = with_parts([whole])[:-1]
        three = whole.op in ("bn_act_conv_backward", "bn_act_max_pool_backward")
        assert len(parts) == (3 if three else 2)
        for part in parts:
            key = _tuned.signature(part.op, part.args)
            place = places[key]
            assert place < places[_tuned.signature(whole.op, whole.args)]
            assert tuned[place].count == alone.get(key, tuned[place].count) >= 1
            assert key in alone or tuned[place].count >= whole.count


def test_what_reads_places_can_be_measured():
    """Not any byte is a place: of a window at an edge, one of the map."""
    calls = with_parts(harvest(SmallNet().train(), torch.randn(2, 3, 18, 26)))
    found = [call for call in calls if call.argument("index") is not None]
    assert [call.op for call in found] == ["max_pool_backward", "bn_act_max_pool_backward"]
    for call in found:
        outcome = measure(call.op, draw(call, CPU), lambda run: 1.0)
        assert (REFERENCE, "default") in outcome.seconds
        assert not outcome.faults


def test_harvest_in_training_mode_leaves_frozen_parts_out():
    model = SmallNet().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("fc" in name)
    assert not [call for call in harvest(model, X) if "backward" in call.op]
    forward = harvest(model.requires_grad_(False), X)
    assert {"conv_bn_stats", "bn_act_conv_bn_stats"} <= {call.op for call in forward}


def test_what_was_tuned_in_training_mode_trains_fused(cache, monkeypatch):
    """Where nobody knows of a dtype that a fused step is faster in it, as on every GPU so far."""
    monkeypatch.setattr(cpu, "FASTER_IN_TRAINING", {})
    model = SmallNet().train()
    fused = rf.fuse(model)

    def training_ops() -> set[str]:
        with Ops() as ops:
            fused(X).sum().backward()
        return ops.found.keys() & TRAINING.keys()

    assert not training_ops()
    report = tune_calls(harvest(model, X), CPU, clock=lambda run: 1.0)
    assert report.ok
    assert {"conv_bn_stats", "bn_act_conv_backward"} <= training_ops()
    large = {torch.float32: 10**12}
    monkeypatch.setattr(cpu, "FASTER_IN_A_GRAPH", large, raising=False)
    sys.modules["resnet_fused.backends"]._trains.clear()
    with becoming_a_graph():  # where none so large is known to be faster
        assert {"conv_bn_stats", "bn_act_conv_backward"} <= training_ops()
    assert not trains(CPU, torch.float64, 10**9)
    assert trains(CPU, torch.float64, math.inf)  # SyncBatchNorm's, in any dtype


@pytest.mark.parametrize(
    ("model", "x", "error", "message"),
    [
        (lambda: "net", torch.randn(1, 3, 8, 8), TypeError, "model must be an nn.Module, got str"),
        (small_net, torch.ones(1, 3, 8, 8, dtype=torch.int64), TypeError, "got torch.int64"),
        (small_net, None, TypeError, "got NoneType"),
        (small_net, torch.randn(1, 5, 8, 8), ValueError, "failed on an example_input of shape"),
        (lambda: reflecting(small_net()), torch.randn(1, 3, 8, 8), ValueError, "no fused call"),
        (lambda: nn.ReLU(), torch.randn(1, 3, 8, 8), ValueError, "has no Conv2d"),
        (
            lambda: rf.freeze(small_net(), torch.randn(1, 3, 8, 8)),
            torch.randn(1, 3, 8, 8),
            ValueError,
            "is frozen: tune the original",
        ),
    ],
)
def test_bad_input(model, x, error, message):
    with pytest.raises(error, match=message):
        rf.tune(model(), x)


# --- the choice ----------------------------------------------------------------------------------


def held():
    return _tuned_file.read(_tuned_file.path(CPU), _tuned_file.conditions(CPU))


def test_the_fastest_backend_runs_from_then_on(cache):
    """On the CPU's own backends with a clock that prefers each in turn."""
    model, x = small_net(), torch.randn(2, 3, 8, 8)
    calls = harvest(model, x)
    args = draw(calls[1], CPU)
    usual = rf.explain("conv_bn_act", *args).chosen
    names = [b.name for b in rf.backends() if b.available]
    functions = {n: reference if n == REFERENCE else ORDER[n].conv_bn_act for n in names}
    for name, function in functions.items():
        prefers = lambda run, function=function: 1.0 if run.func is function else 1.4  # noqa: E731
        report = tune_calls(calls, CPU, force=True, clock=prefers)
        assert {row.choice.backend for row in report.rows} == {name}
        assert report.rows[0].choice == (name, "default", 1e6, pytest.approx(1.4))
        assert choose("conv_bn_act", *args) is (None if name == REFERENCE else function)
        explained = rf.explain("conv_bn_act", *args)
        assert explained.chosen == name
        assert all(v.chosen == (not v.reason) for v in explained)
        with rf.use_backend(usual):
            assert choose("conv_bn_act", *args) is functions[usual]
    assert rf.explain("conv_bn_act", *draw(harvest(model, x[:1])[1], CPU)).chosen == usual


def test_a_candidate_of_a_backend_is_what_runs(cache, backend):
    """The very function the backend listed, as long as it is listed and the call is supported."""
    big = lambda *args: in_float64(*args)  # noqa: E731
    backend.ways = {"default": in_float64, "big tile": big}
    calls = harvest(small_net(), torch.randn(2, 3, 8, 8))
    tune_calls(calls, CPU, clock=lambda run: 1.0 if run.func is big else 1.4)
    args = draw(calls[0], CPU)
    assert choose("conv_bn_act", *args) is big
    backend.ways = {}
    assert choose("conv_bn_act", *args) is big, "the candidates were listed again"
    backend.supports = lambda op, *args: "not today"
    assert choose("conv_bn_act", *args) is None


@pytest.mark.parametrize("name", [("made_up", "gone"), ("no such backend", "default")])
def test_a_choice_that_no_longer_exists_leaves_the_order(name, cache, backend):
    args = arguments()
    key = _tuned.signature("conv_bn_act", args)
    _tuned.remember(CPU, {key: Choice(*name, 1.0, None)})
    assert choose("conv_bn_act", *args) is in_float64
    assert rf.explain("conv_bn_act", *args).chosen == "made_up"


def test_what_is_known_is_not_measured_again_unless_forced(cache, backend):
    calls = harvest(small_net(), torch.randn(2, 3, 8, 8))
    first = tune_calls(calls, CPU, clock=tick)
    assert first.ok
    assert first.cache == _tuned_file.path(CPU)
    assert len(held()) == len(first.rows) == 2
    _tuned.forget()

    def never(run):
        pytest.fail("measured again")

    again = tune_calls(calls, CPU, clock=never)
    assert [row.choice for row in again.rows] == [row.choice for row in first.rows]
    assert all(row.known for row in again.rows)
    assert not any(row.known for row in tune_calls(calls, CPU, force=True, clock=tick).rows)


def test_what_was_shipped_is_measured_all_the_same(cache, backend, monkeypatch):
    """Its candidates may be fewer than there are now."""
    calls = harvest(small_net(), torch.randn(2, 3, 8, 8))
    key = _tuned.signature(calls[0].op, draw(calls[0], CPU))
    shipped = {key: Choice("reference", "default", 1.0, None)}
    monkeypatch.setattr(_tuned_file, "shipped", lambda device: shipped)
    assert not any(row.known for row in tune_calls(calls, CPU, clock=tick).rows)


def test_all_calls_are_compiled_before_one_is_measured(monkeypatch):
    """Those that are not known, by their Triton candidates; what fails is left to be measured."""
    calls, ran, told = harvest(small_net(), torch.randn(2, 3, 8, 8)), [], []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def tile(*args):
        ran.append(args[0].shape)
        raise RuntimeError("does not compile")

    found = {("triton", "a"): tile, ("triton", "b"): tile, ("cpu", "default"): pytest.fail}
    monkeypatch.setattr("resnet_fused.tuning.ahead.candidates", lambda op, *args: found)
    compile_ahead(calls, CPU, (), lambda: told.append(None))
    assert len(told) == len(calls)
    assert sorted(ran) == sorted(call.args[0].shape for call in calls for _ in "ab")
    known = {_tuned.signature(call.op, draw(call, CPU)) for call in calls}
    compile_ahead(calls, CPU, known, lambda: told.append(None))
    assert (len(told), len(ran)) == (2 * len(calls), 2 * len(calls))


def test_an_interrupt_compiles_no_more(monkeypatch):
    """But what is being compiled when it comes."""
    calls = harvest(small_net(), torch.randn(2, 3, 8, 8))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    begun, interrupted = [], threading.Event()

    def compilation(*args):
        begun.append(args)
        if len(begun) > 3:  # the second call's, as the first has three
            assert interrupted.wait(60)
            time.sleep(0.2)

    def interrupt():
        interrupted.set()
        raise KeyboardInterrupt

    found = {("triton", str(i)): compilation for i in range(3)}
    monkeypatch.setattr("resnet_fused.tuning.ahead.candidates", lambda op, *args: found)
    with pytest.raises(KeyboardInterrupt):
        compile_ahead([*calls, *calls], CPU, (), interrupt)
    assert 3 <= len(begun) <= 4


def test_an_interrupted_run_keeps_what_it_has(cache, backend):
    calls = harvest(small_net(), torch.randn(2, 3, 8, 8))

    def interrupt(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_calls(calls, CPU, clock=tick, on_row=interrupt)
    assert len(held()) == 1


def test_a_call_that_nobody_answers_rightly_has_no_choice(cache, backend, monkeypatch):
    monkeypatch.setattr(_Answers, "fault", lambda self, run: "wrong: all of them")
    calls = harvest(small_net(), torch.randn(2, 3, 8, 8))
    report = tune_calls(calls, CPU, clock=tick)
    assert not report.ok
    assert held() == {}
    assert "none was right" in str(report)
    assert choose("conv_bn_act", *draw(calls[0], CPU)) is in_float64


@pytest.mark.parametrize("where", ["draw", "to_float64"])
def test_a_call_whose_check_needs_too_much_memory_is_that_row_s_fault(where, cache, monkeypatch):
    """The larger ones of the calls: their own tensors, or what they are held against."""
    module = sys.modules["resnet_fused.tuning" + (".measure" if where == "to_float64" else "")]
    real = getattr(module, where)

    def short_of_memory(args, *rest):
        if (args.args if where == "draw" else args)[0].shape[1] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return real(args, *rest)

    monkeypatch.setattr(module, where, short_of_memory)
    calls = harvest(small_net(), torch.randn(2, 3, 8, 8))
    report = tune_calls(calls, CPU, clock=lambda run: 1.0)
    assert [row.choice is None for row in report.rows] == [True, False]
    assert not report.ok
    assert not report.rows[0].known
    said = "all in 1 of 2 calls: 2x3x8x8 3x3 to 8 relu: OutOfMemoryError: CUDA out of memory."
    assert said in str(report)
    assert len(held()) == 1


def test_merged_calls_are_found_without_memory_for_them(monkeypatch):
    def short_of_memory(args, device):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model, x = create_model("resnet18").eval(), torch.randn(1, 3, 32, 32)
    before = harvest_merged(model, x, CPU)
    monkeypatch.setattr(sys.modules["resnet_fused.tuning.calls"], "draw", short_of_memory)
    assert set(map(str, before)) <= set(map(str, harvest_merged(model, x, CPU)))


def test_without_a_cache_file_the_choices_hold_in_the_process(cache, backend, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(cache / "file"))
    backend.ways = {"other": lambda *args: in_float64(*args)}
    calls = harvest(small_net(), torch.randn(2, 3, 8, 8))
    with pytest.warns(RuntimeWarning) as caught:
        report = tune_calls(calls, CPU, clock=tick)
    words = [str(w.message) for w in caught]
    assert sum("cannot be written to" in w for w in words) == 1
    assert report.cache is None
    assert "kept in this process only" in str(report)
    assert choose("conv_bn_act", *draw(calls[0], CPU)) is backend.ways["other"]


def test_the_report_is_a_table(cache, backend):
    backend.ways = {"right": in_float64, "bad": dying}
    report = tune_calls(harvest(small_net(), torch.randn(2, 3, 8, 8)), CPU, clock=tick)
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert lines[0].split() == ["call", "times", "winner", "us", "next", "of", "dropped"]
    assert lines[1] == "2x3x8x8 3x3 to 8 relu 1 made_up/right 1000000.0 - 3 1"
    assert lines[2] == "2x8x8x8 3x3 to 8 relu 2 made_up/right 1000000.0 - 3 1"
    assert lines[3].startswith("dropped: made_up/bad in 2 of 2 calls: RuntimeError: launch failed")
    assert lines[-1] == f"kept in {report.cache}"
    assert "known" in str(
        tune_calls(harvest(small_net(), torch.randn(2, 3, 8, 8)), CPU, clock=tick)
    )


def test_tune_end_to_end_on_the_cpu(cache):
    """Really timed; whatever was chosen, fused and frozen models are right, the model untouched."""
    model, x = small_net(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    report = rf.tune(model, x)
    assert report.ok
    assert all(row.choice.microseconds > 0 for row in report.rows)
    for name in (b.name for b in rf.backends() if b.available):
        table = {key: Choice(name, "default", 1.0, None) for key in _tuned._tables[CPU]}
        _tuned.remember(CPU, table)
        torch.testing.assert_close(rf.fuse(model)(x), expected)
        torch.testing.assert_close(rf.freeze(model, x)(x), expected)
    assert type(model) is nn.Sequential
    assert json.loads(report.cache.read_text())["choices"]


# --- who reads the cache -------------------------------------------------------------------------


def test_on_the_cpu_choices_hold_only_where_tune_was_called(cache):
    """A process that did not keeps its order; one that does measures nothing again."""
    calls = harvest(small_net(), torch.randn(2, 3, 8, 8))
    args = draw(calls[0], CPU)
    usual = choose("conv_bn_act", *args)
    assert usual is not None
    tune_calls(calls, CPU, clock=lambda run: 1.0 if run.func is reference else 2.0)
    assert choose("conv_bn_act", *args) is None
    _tuned.forget()  # what a new process knows
    assert choose("conv_bn_act", *args) is usual
    tune_calls(calls, CPU, clock=lambda run: pytest.fail("measured again"))
    assert choose("conv_bn_act", *args) is None


def fake_cuda(args):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return tuple(
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda:0")
            if isinstance(a, torch.Tensor)
            else a
            for a in args
        )


def test_on_a_gpu_the_file_is_read_at_the_first_call_and_once(cache, monkeypatch):
    args = fake_cuda(arguments())
    key = _tuned.signature("conv_bn_act", args)
    reads = []

    def shipped(device):
        reads.append(device)
        return {key: Choice("cudnn", "fused", 1.0, None)}

    monkeypatch.setattr(_tuned_file, "shipped", shipped)
    monkeypatch.setattr(_tuned_file, "measured", lambda device: {})
    monkeypatch.setattr(cudnn, "available", lambda: None)
    for _ in range(2):
        assert choose("conv_bn_act", *args) is cudnn.fused_conv_bn_act
    assert choose("conv_bn_act", *arguments()) is not cudnn.fused_conv_bn_act
    assert reads == [torch.device("cuda", 0)]
    x = arguments()[0].contiguous(memory_format=torch.channels_last)
    others = fake_cuda((x, *arguments()[1:]))
    assert choose("conv_bn_act", *others) is cudnn.conv_bn_act, "another layout is another call"


def test_tf32_is_allowed_for_convolutions_alone(monkeypatch):
    module = sys.modules["resnet_fused.tuning.measure"]
    monkeypatch.setattr(module, "factors_dtype", lambda x: torch.float16)
    assert _Answers("conv_bn_act", arguments())._factors == torch.float16
    x = torch.randn(2, 4, 3, 3)
    assert _Answers("add_relu", (x, x))._factors == torch.float32


def test_whether_tf32_is_allowed_is_part_of_a_gpu_call(monkeypatch):
    found = types.SimpleNamespace(fp32_precision="tf32")
    monkeypatch.setattr(torch.backends.cudnn, "conv", found)
    args = fake_cuda(arguments())
    key = _tuned.signature("conv_bn_act", args)
    found.fp32_precision = "ieee"
    assert _tuned.signature("conv_bn_act", args) != key
    half = fake_cuda(arguments(dtype=torch.float16))
    key = _tuned.signature("conv_bn_act", half)
    found.fp32_precision = "tf32"
    assert _tuned.signature("conv_bn_act", half) == key


def test_importing_and_calling_tunes_nothing(cache, monkeypatch):
    monkeypatch.setattr("resnet_fused.tuning.measure", lambda *args: pytest.fail("measured"))
    rf.fuse(small_net())(torch.randn(2, 3, 8, 8))
    assert list(cache.iterdir()) == []
