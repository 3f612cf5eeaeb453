"""Who runs a call: the order, asking by name, and the reasons of the others."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from devices import device_of, moved
from torch import nn

import resnet_fused as rf
from resnet_fused.backends import ORDER, _derived, _reason, choose, cpu, onednn, requested
from resnet_fused.ops import OPS, TRAINING

X, WEIGHT = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3)
NAMES = [*ORDER, "reference"]


def test_backends_lists_all_in_order():
    listed = rf.backends()
    assert [b.name for b in listed] == NAMES
    for backend in listed:
        assert backend.available == (not backend.reason) == (not backend.advice)
    assert listed[-1].available


@pytest.mark.parametrize("name", ORDER)
def test_a_backend_has_what_the_registry_asks_for(name):
    module = ORDER[name]
    assert module.available() is None or module.available()
    assert module.ADVICE
    assert any(hasattr(module, op) for op in OPS)


@pytest.mark.parametrize("name", [n for n in ORDER if hasattr(ORDER[n], "bn_act")])
def test_a_backend_that_trains_has_every_op_of_training(name):
    """`trains` asks for one of them only.

    But those of a block's end as one op, which models call under "auto" alone.
    """
    module = ORDER[name]
    ends = {
        op for op in TRAINING if op.startswith(("pointwise", "channel_covariance", "relu_conv"))
    }
    missing = {op for op, o in TRAINING.items() if not o.mutates and not hasattr(module, op)}
    assert missing <= ends
    assert not missing or name != "triton"
    for table in (module.FASTER_IN_TRAINING, getattr(module, "FASTER_IN_A_GRAPH", {})):
        assert all(dtype.is_floating_point for dtype in table)


def test_use_backend_as_a_block_and_nested():
    with rf.use_backend("reference"):
        assert requested() == "reference"
        with rf.use_backend("auto"):
            assert requested() == "auto"
        assert requested() == "reference"
    assert requested() == "auto"


def test_use_backend_is_left_on_an_error():
    with pytest.raises(KeyError), rf.use_backend("reference"):
        raise KeyError
    assert requested() == "auto"


def test_use_backend_holds_for_other_threads():
    seen = []
    with rf.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(requested()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


ASK = "from resnet_fused.backends import requested, use_backend; print(requested()); "


@pytest.mark.parametrize(
    ("value", "more", "expected"),
    [
        ("reference", "", "reference\n"),
        ("reference", "use_backend('auto'); print(requested())", "reference\nauto\n"),
        ("nonsense", "", "RESNET_FUSED_BACKEND: unknown backend 'nonsense'; accepted: auto, "),
    ],
)
def test_the_environment_is_asked_last(value, more, expected):
    done = subprocess.run(
        [sys.executable, "-c", ASK + more],
        env={**os.environ, "RESNET_FUSED_BACKEND": value}, capture_output=True, text=True,
    )  # fmt: skip
    assert expected in (done.stderr if value == "nonsense" else done.stdout)


@pytest.mark.parametrize(
    ("name", "hint"), [("onednm", "onednn"), ("refernce", "reference"), ("atuo", "auto")]
)
def test_an_unknown_name_gets_the_nearest(name, hint):
    with pytest.raises(ValueError, match=f"unknown backend '{name}'.*{hint}.*accepted: auto, "):
        rf.use_backend(name)
    assert requested() == "auto"


@pytest.mark.parametrize("name", [None, 3, ""])
def test_a_name_that_is_none(name):
    with pytest.raises(ValueError, match="unknown backend"):
        rf.use_backend(name)


def test_a_backend_that_is_not_here(monkeypatch):
    name = next(iter(ORDER))
    monkeypatch.setattr(ORDER[name], "available", lambda: "it is Sunday")
    with pytest.raises(RuntimeError, match=f"'{name}' is not available: it is Sunday"):
        rf.use_backend(name)
    assert rf.backends()[0] == (name, False, "it is Sunday", ORDER[name].ADVICE)
    assert rf.explain("conv_bn_act", X, WEIGHT)[0] == (name, False, "it is Sunday")


def test_a_named_backend_runs_or_raises():
    x, weight = X.double(), WEIGHT.double()
    for name in [b.name for b in rf.backends() if b.available and b.name != "reference"]:
        with rf.use_backend(name), pytest.raises(RuntimeError, match=f"'{name}' was asked for"):
            rf.functional.conv_bn_act(x, weight)
    assert rf.explain("conv_bn_act", x, weight).chosen == "reference"


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_onednn_switched_off():
    with torch.backends.mkldnn.flags(enabled=False):
        reasons = {v.name: v.reason for v in rf.explain("conv_bn_act", X, WEIGHT)}
    assert "flags(enabled=False)" in reasons["onednn"]


@pytest.mark.parametrize("name", [b.name for b in rf.backends() if b.available])
def test_explain_names_the_one_that_runs(name):
    x, weight = moved((X, WEIGHT), device_of(name))
    with rf.use_backend(name):
        verdicts = rf.explain("conv_bn_act", x, weight)
    assert verdicts.chosen == name
    assert [v.name for v in verdicts] == NAMES
    assert all(v.chosen == (not v.reason) for v in verdicts)
    assert f"{name}  " in str(verdicts)
    assert "runs" in str(verdicts)


def test_explain_of_an_unknown_op():
    with pytest.raises(ValueError, match="unknown op 'conv'; accepted: conv_bn_act, "):
        rf.explain("conv", X, WEIGHT)


def test_auto_takes_the_first_that_supports_the_call():
    chosen = rf.explain("conv_bn_act", X, WEIGHT).chosen
    args = rf.functional.op_arguments("conv_bn_act", X, WEIGHT)
    function = choose("conv_bn_act", *args)
    assert function is (None if chosen == "reference" else ORDER[chosen].conv_bn_act)


# --- derived values ------------------------------------------------------------------------------


class Counted:
    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        return self.made


@pytest.mark.parametrize(
    ("channels", "groups", "dtype", "tiles", "expected"),
    [
        (32, 1, torch.float32, False, "cpu"),
        (64, 4, torch.float32, False, "cpu"),
        (64, 8, torch.float32, False, "onednn"),  # half of each register would be empty
        (16, 16, torch.float32, False, "onednn"),
        (64, 4, torch.bfloat16, False, "cpu"),
        (64, 4, torch.bfloat16, True, "onednn"),
        (64, 1, torch.bfloat16, True, "cpu"),
    ],
)
def test_auto_leaves_narrow_groups_to_onednn(channels, groups, dtype, tiles, expected, monkeypatch):
    monkeypatch.setattr(cpu._cpu_conv, "multiplies_tiles", lambda d: tiles and d == torch.bfloat16)
    x = torch.randn(1, channels, 8, 8, dtype=dtype)
    weight = torch.randn(channels, channels // groups, 3, 3, dtype=dtype)
    args = (x, weight, None, None, None, (1, 1), (1, 1), (1, 1), groups)
    for name in ("cpu", "onednn"):
        if reason := _reason(ORDER[name], "conv_bn_act", (*args, None)):
            pytest.skip(f"{name}: {reason}")
    assert rf.explain("conv_bn_act", *args).chosen == expected
    with rf.use_backend("cpu"):
        assert rf.explain("conv_bn_act", *args).chosen == "cpu"


@pytest.mark.parametrize("computes", [True, False])
def test_auto_leaves_float16_to_torch_where_onednn_computes_in_it(computes, monkeypatch):
    """But for what it has no right answer to: an output that meets padding alone."""
    if reason := _reason(
        ORDER["cpu"], "conv_bn_act", (torch.empty(0, 1, 1, 1), torch.empty(1, 1, 1, 1))
    ):
        pytest.skip(reason)
    monkeypatch.setattr(onednn, "computes_in", lambda dtype: computes)
    x, weight = torch.randn(1, 32, 8, 8).half(), torch.randn(32, 32, 3, 3).half()

    def chosen(padding, dilation):
        args = (None, None, None, (1, 1), padding, dilation, 1)
        return rf.explain("conv_bn_act", x, weight, *args).chosen

    assert chosen((1, 1), (1, 1)) == ("reference" if computes else "cpu")
    assert chosen((9, 9), (1, 1)) == "cpu"


def test_a_derived_value_is_kept_until_a_source_changes():
    make, first, second = Counted(), nn.Parameter(torch.ones(2)), torch.ones(2)

    def get(*sources, key="key"):
        return _derived.derived(sources, key, make)

    assert get(first, second, None) == get(first, second, None) == 1
    with torch.no_grad():
        first.mul_(2)
    assert get(first, second, None) == 2
    second.add_(1)
    assert get(first, second, None) == 3
    first.data = torch.zeros(2)
    assert get(first, second, None) == 4
    assert get(first, second.clone(), None) == 5
    assert get(first, None, None) == 6
    assert get(first, None, None, key="other") == 7
    assert get(first, None, None) == 6


def test_nothing_is_derived_from_tensors_without_versions():
    make = Counted()
    with torch.inference_mode():
        source = torch.ones(2)
    assert _derived.derived((source,), "key", make) == 1
    assert _derived.derived((source,), "key", make) == 2
    assert _derived.derived((None,), "key", make) == 3
