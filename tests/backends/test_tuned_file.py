"""The cache file of measured choices: shared between processes, whole, and never written over."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from resnet_fused.backends import ORDER, REFERENCE, _tuned, _tuned_file
from resnet_fused.backends._tuned_file import Choice, Unusable
from resnet_fused.backends.triton.shapes import Config
from resnet_fused.bench import tune
from resnet_fused.models import create_model
from resnet_fused.nn import pointwise
from resnet_fused.ops import OPS
from resnet_fused.tuning.calls import harvest, with_parts

CPU = torch.device("cpu")
X = (torch.bfloat16, torch.Size((1, 3, 4, 4)))
KEY = ("conv_bn_act", None, (48, 1, 12, 3), X, None, (1, 1), 2, 0.5, "relu")
CHOICE = Choice("cpu", "default", 12.5, 1.25)


def held():
    return _tuned_file.read(_tuned_file.path(CPU), _tuned_file.conditions(CPU))


def in_force():
    return {**_tuned_file.shipped(CPU), **_tuned_file.measured(CPU)}


def in_process(code, *args, **kwargs):
    alike = f"torch.set_num_threads({torch.get_num_threads()})"  # part of the file's name
    lines = ("import sys, torch", alike, "from resnet_fused.backends import _tuned_file as f", code)
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines), *args], **kwargs)


# --- where it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "base", "expected"),
    [
        ("/tmp/here", "/base", "/tmp/here"),
        ("~/here", "/base", "/home/me/here"),
        (None, "/base", "/base/resnet_fused"),
        (None, "relative", "/home/me/.cache/resnet_fused"),
        (None, None, "/home/me/.cache/resnet_fused"),
        ("", "", "/home/me/.cache/resnet_fused"),
    ],
)
def test_directory(asked, base, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in (("RESNET_FUSED_CACHE_DIR", asked), ("XDG_CACHE_HOME", base)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert str(_tuned_file.directory()) == expected


def test_other_conditions_are_another_file(cache, monkeypatch):
    found = _tuned_file.conditions(CPU)
    assert {"device", "torch", "triton", "cudnn", "capability", "resnet_fused"} <= found.keys()
    names = {_tuned_file.path(CPU)}
    for name in found:
        changed = {**found, name: "another"}
        monkeypatch.setattr(_tuned_file, "conditions", lambda device, changed=changed: changed)
        names.add(_tuned_file.path(CPU))
    assert len(names) == 1 + len(found)
    assert all(n.parent == cache and n.name.startswith("tuned-") for n in names)


# --- what is in it -------------------------------------------------------------------------------


def test_round_trip(cache):
    other = (*KEY[:-1], None)
    assert in_force() == {}
    assert _tuned_file.merge(CPU, {KEY: CHOICE}) == _tuned_file.path(CPU)
    _tuned_file.merge(CPU, {other: Choice("reference", "default", 3.0, None)})
    assert held() == {KEY: CHOICE, other: Choice("reference", "default", 3.0, None)}
    _tuned_file.merge(CPU, {KEY: CHOICE._replace(backend="onednn")})
    assert in_force()[KEY].backend == "onednn"
    assert len(held()) == 2
    content = json.loads(_tuned_file.path(CPU).read_text())
    assert content["conditions"] == _tuned_file.conditions(CPU)


def test_a_shipped_table_stands_behind_what_was_measured(cache, monkeypatch):
    shipped = cache / "shipped"
    monkeypatch.setattr(_tuned_file, "SHIPPED", shipped)
    shipped.mkdir()
    device = _tuned_file.conditions(CPU)["device"]
    table = {KEY: CHOICE, ("add_relu",): CHOICE}
    text = _tuned_file._text({"device": device, "torch": "another"}, table)
    (shipped / f"{_tuned_file._slug(device)}.json").write_text(text)
    assert in_force() == table
    measured = CHOICE._replace(backend="onednn")
    _tuned_file.merge(CPU, {KEY: measured})
    assert in_force() == {KEY: measured, ("add_relu",): CHOICE}
    assert held() == {KEY: measured}


def test_shipped_choices_of_a_library_are_for_its_version(cache, monkeypatch):
    """Another cuDNN may drop NaN where this one keeps it, another Triton may not compile a tile."""
    monkeypatch.setattr(_tuned_file, "SHIPPED", cache)
    here = {**_tuned_file.conditions(CPU), "triton": "3.6.0", "cudnn": 91900}
    monkeypatch.setattr(_tuned_file, "conditions", lambda device: here)
    backends = ("triton", "cudnn", "cuda", "reference")
    table = {(name,): Choice(name, "default", 1.0, None) for name in backends}
    for change, left in (
        ({}, {*backends}),
        ({"cudnn": 90000}, {"triton", "cuda", "reference"}),
        ({"triton": "3.9.0"}, {"cudnn", "cuda", "reference"}),
        ({"torch": "2.99.0"}, {*backends}),
    ):
        text = _tuned_file._text({**here, **change}, table)
        (cache / f"{_tuned_file._slug(here['device'])}.json").write_text(text)
        assert {key[0] for key in _tuned_file.shipped(CPU)} == left
        assert _tuned_file.measured(CPU) == {}


@pytest.mark.parametrize("file", sorted(_tuned_file.SHIPPED.glob("*.json")), ids=lambda f: f.stem)
def test_what_is_shipped_can_still_be_run(file):
    """It is read under its device's name, and names candidates that there are."""
    device = json.loads(file.read_text())["conditions"]["device"]
    assert file.stem == _tuned_file._slug(device)
    choices = _tuned_file.read(file, {"device": device})
    assert choices
    for choice in choices.values():
        assert choice.backend in (*ORDER, REFERENCE)
        if choice.backend == "triton" and choice.candidate != "default":
            assert str(Config.parse(choice.candidate)) == choice.candidate
        if choice.backend == "cuda":
            assert re.fullmatch(r"default|band\d+|gemm(-add)?", choice.candidate)


def test_shipped_tiles_are_among_those_that_are_looked_up():
    """A choice whose candidate is gone is none, and the call falls to the next backend."""
    pytest.importorskip("triton")
    choices = _tuned_file.read(_tuned_file.SHIPPED / "nvidia-h200.json", {"device": "NVIDIA H200"})
    seen = 0
    for (op, _, _, *parts), choice in choices.items():
        if choice.backend == "triton":
            args = [_on_meta(part) for part in parts]
            assert choice.candidate in ORDER["triton"].candidates(op, *args), (op, *parts)
            seen += 1
    assert seen > 25


def _on_meta(part):
    tensor = isinstance(part, tuple) and part and isinstance(part[0], torch.dtype)
    return torch.empty(part[1], dtype=part[0], device="meta") if tensor else part


def test_a_call_is_known_again_whatever_its_dtypes(monkeypatch, tmp_path):
    """Bits are bytes, indices as well; a choice that is not found again is measured again."""
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(tmp_path))
    dtypes = (torch.uint8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64)
    keys = [("bn_act_backward", None, (1,), X, (d, torch.Size((2, 4)))) for d in dtypes]
    _tuned_file.merge(CPU, dict.fromkeys(keys, CHOICE))
    assert held() == dict.fromkeys(keys, CHOICE)


@pytest.mark.parametrize(
    ("model", "distinct"), [("resnet34", 15), ("resnet50", 24), ("resnet152", 24)]
)
def test_an_h200_has_choices_for_the_convolutions_at_batch_256(model, distinct):
    shipped = _tuned_file.read(_tuned_file.SHIPPED / "nvidia-h200.json", {"device": "NVIDIA H200"})
    with torch.device("meta"):
        network = create_model(model).eval().bfloat16().to(memory_format=torch.channels_last)
        x = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16)
    calls = harvest(network, x.contiguous(memory_format=torch.channels_last))
    convolutions = [call for call in calls if call.op == "conv_bn_act"]
    assert len(convolutions) == distinct
    assert all(_tuned.signature(call.op, call.args) in shipped for call in convolutions)


@pytest.mark.parametrize("model", ["resnet34", "resnet50", "resnet152"])
def test_an_h200_has_choices_for_a_training_step_at_batch_256(model, monkeypatch):
    """For what it calls, and for what each of its chains is made of.

    Block ends as one op, and the stem by what its pool took, aside: nobody has measured them there.
    """
    monkeypatch.setattr(pointwise, "on_meta", contextlib.nullcontext)
    shipped = _tuned_file.read(_tuned_file.SHIPPED / "nvidia-h200.json", {"device": "NVIDIA H200"})
    calls = tune._calls_of_a_step(model, (256, 3, 224, 224), torch.bfloat16, CPU)
    assert {"conv_bn_stats", "conv_backward_data", "bn_act_backward"} <= {c.op for c in calls}
    stem = with_parts([call for call in calls if call.op == "bn_act_max_pool_backward"])
    unmeasured = {_tuned.signature(call.op, call.args) for call in stem}
    assert len(unmeasured) == 4
    for call in calls:
        if _tuned.signature(call.op, call.args) in unmeasured:
            continue
        choice = shipped.get(_tuned.signature(call.op, _on_a_gpu(call.args)))
        assert choice is not None, call
        assert choice.backend != REFERENCE or OPS[call.op].decomposition, call


def _on_a_gpu(args):
    """Autocast casts weights there, and their gradients leave in the same dtype."""
    narrow = {torch.float32: torch.bfloat16}
    return [
        a.to(torch.bfloat16)
        if isinstance(a, torch.Tensor) and a.dim() == 4 and a.is_floating_point()
        else narrow.get(a, a) if isinstance(a, torch.dtype) else a
        for a in args
    ]  # fmt: skip


def test_a_shipped_training_step_says_which_kernels_and_not_that_it_is_faster(monkeypatch):
    """Outside of a graph it waits for Python: those who ask for one have it, nobody else."""
    device, key = torch.device("cuda", 0), ("conv_bn_stats", *KEY[1:])
    _tuned.forget()
    monkeypatch.setattr(_tuned_file, "shipped", lambda device: {key: CHOICE})
    for own, expected in (({}, False), ({key: CHOICE}, True)):
        monkeypatch.setattr(_tuned_file, "measured", lambda device, own=own: own)
        assert _tuned.trains(device, torch.bfloat16) is expected
        assert _tuned._tables[device].keys() == {key}
        _tuned.forget()


def test_what_was_measured_here_goes_before_what_was_shipped(monkeypatch):
    device, key, other = torch.device("cuda", 0), KEY, ("add_relu", *KEY[1:])
    own = CHOICE._replace(backend="onednn")
    _tuned.forget()
    monkeypatch.setattr(_tuned_file, "shipped", lambda device: {key: CHOICE, other: CHOICE})
    monkeypatch.setattr(_tuned_file, "measured", lambda device: {key: own})
    assert not _tuned.trains(device, torch.bfloat16)
    assert {k: e.choice for k, e in _tuned._tables[device].items()} == {key: own, other: CHOICE}
    _tuned.forget()


@pytest.mark.parametrize("text", ["garbage", "[" * 200_000, None])
def test_a_damaged_shipped_table_is_one_warning_and_stays(text, cache, monkeypatch):
    monkeypatch.setattr(_tuned_file, "SHIPPED", cache / "shipped")
    device = _tuned_file.conditions(CPU)["device"]
    file = cache / "shipped" / f"{_tuned_file._slug(device)}.json"
    _tuned_file.merge(CPU, {KEY: CHOICE})
    if text is None:
        file.mkdir(parents=True)
    else:
        file.parent.mkdir()
        file.write_text(text)
    with pytest.warns(RuntimeWarning, match="nothing that was shipped is in force") as caught:
        assert in_force() == in_force() == {KEY: CHOICE}
    assert len(caught) == 1
    assert file.exists()


# --- several processes ---------------------------------------------------------------------------

WRITES = """
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[2])):
    call = ("conv_bn_act", sys.argv[1], i)
    f.merge(torch.device("cpu"), {call: f.Choice("cpu", "default", float(i), None)})
"""


def test_two_processes_at_once_lose_nothing(cache):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [in_process(WRITES, name, "40", **pipes) for name in ("a", "b")]
    assert [w.stdout.readline() for w in writers] == ["ready\n"] * 2
    for writer in writers:  # both have loaded all there is to load
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=120)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert held().keys() == {("conv_bn_act", name, i) for name in "ab" for i in range(40)}
    left = {p.name for p in cache.iterdir()}
    name = _tuned_file.path(CPU).name
    assert left <= {name, f"{name}.lock"}


KILLED = """
import os, signal
def half(file, text):
    file.write_text(text[: len(text) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
f._write = half
f.merge(torch.device("cpu"), {("add_relu",): f.Choice("cpu", "default", 1.0, None)})
"""


def test_a_writer_killed_half_way_leaves_the_old_file_and_no_lock(cache, monkeypatch):
    monkeypatch.setattr(_tuned_file, "PATIENCE_S", 5.0)
    _tuned_file.merge(CPU, {KEY: CHOICE})
    assert in_process(KILLED).wait(60) == -signal.SIGKILL
    assert held() == {KEY: CHOICE}
    assert _tuned_file.merge(CPU, {("add_relu",): CHOICE}) is not None
    assert len(held()) == 2


# --- what is wrong with it -----------------------------------------------------------------------


def spoiled(change):
    text = _tuned_file._text(_tuned_file.conditions(CPU), {KEY: CHOICE})
    if callable(change):
        return change(text)
    return json.dumps({**json.loads(text), **change})


SPOILED = {
    "truncated": lambda text: text[:-30],
    "empty": lambda text: "",
    "garbage": lambda text: "\x00\x01 not a table",
    "a list": lambda text: "[1, 2]",
    "newer": {"schema": _tuned_file.SCHEMA + 1},
    "foreign": {"conditions": {"device": "another"}},
    "other versions": lambda text: text.replace(torch.__version__, "1.0"),
    "a short row": {"choices": [[["add_relu"], "cpu"]]},
    "no names": {"choices": [[["add_relu"], 1, 2, 3.0, None]]},
    "no signature": {"choices": [[{"op": "add_relu"}, "cpu", "default", 3.0, None]]},
    "no choices": {"choices": None},
    "nested too deeply": lambda text: "[" * 200_000,
    "nested too deeply, to its end": lambda text: text.replace(
        '"choices": [', f'"choices": [{"[" * 100_000}{"]" * 100_000},'
    ),
    "no time": {"choices": [[["add_relu"], "cpu", "default", 10**400, None]]},
}


@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.parametrize(
    "by",
    [_tuned_file.measured, lambda device: _tuned_file.merge(device, {KEY: CHOICE})],
    ids=["read", "merge"],
)
def test_an_unusable_file_is_set_aside_with_one_warning(name, by, cache):
    file, text = _tuned_file.path(CPU), spoiled(SPOILED[name])
    file.write_text(text)
    with pytest.raises(Unusable):
        held()
    with pytest.warns(RuntimeWarning, match=r"is not used: .*renamed to .*bad-1") as caught:
        by(CPU)
    assert len(caught) == 1
    assert held() == ({} if by is _tuned_file.measured else {KEY: CHOICE})
    _tuned_file.merge(CPU, {KEY: CHOICE})
    assert in_force() == {KEY: CHOICE}
    assert file.with_name(f"{file.name}.bad-1").read_text() == text


def test_the_second_unusable_file_gets_the_next_number(cache):
    file = _tuned_file.path(CPU)
    for number in (1, 2):
        file.write_text(f"garbage {number}")
        with pytest.warns(RuntimeWarning, match=f"bad-{number}"):
            in_force()
    kept = [file.with_name(f"{file.name}.bad-{number}").read_text() for number in (1, 2)]
    assert kept == ["garbage 1", "garbage 2"]


def once(action, match):
    with pytest.warns(RuntimeWarning, match=match) as caught:
        results = [action(), action()]
    assert not any(results)
    assert len(caught) == 1


def test_a_directory_that_cannot_be_is_one_warning(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(cache / "file" / "sub"))
    once(lambda: _tuned_file.merge(CPU, {KEY: CHOICE}), "cannot be written to: .*in this process")
    once(lambda: in_force(), "cannot be read: Not a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_directory(cache):
    cache.chmod(0o555)
    try:
        once(lambda: _tuned_file.merge(CPU, {KEY: CHOICE}), "cannot be written to")
    finally:
        cache.chmod(0o755)


@pytest.mark.parametrize("step", ["write_atomically", "_locked"])
def test_a_write_that_is_refused_is_one_warning(step, cache, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_tuned_file, step, refuse)
    once(lambda: _tuned_file.merge(CPU, {KEY: CHOICE}), "cannot be written to: Permission denied")


def test_a_lock_that_is_never_free_is_one_warning(cache, monkeypatch):
    monkeypatch.setattr(_tuned_file, "PATIENCE_S", 0.05)
    with _tuned_file._locked(_tuned_file.path(CPU)):
        once(lambda: _tuned_file.merge(CPU, {KEY: CHOICE}), "cannot be written to: .*lock")


def test_an_unusable_file_that_cannot_be_moved_is_left(cache, monkeypatch):
    monkeypatch.setattr(_tuned_file, "PATIENCE_S", 0.05)
    _tuned_file.path(CPU).write_text("garbage")
    with _tuned_file._locked(_tuned_file.path(CPU)):
        once(lambda: in_force(), "is not used: it is not JSON")
    assert _tuned_file.path(CPU).read_text() == "garbage"


def test_a_good_file_gives_no_warning(cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _tuned_file.merge(CPU, {KEY: CHOICE})
        assert in_force() == {KEY: CHOICE}
