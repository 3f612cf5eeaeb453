from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from resnet_fused import env


class Backend(NamedTuple):
    name: str
    available: bool
    reason: str
    advice: str


def test_the_conditions_are_json_and_whole() -> None:
    found = json.loads(json.dumps(env.collect()))
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert found["cpu"]
    assert found["packages"]["numpy"]
    assert found["cudnn"] == torch.backends.cudnn.version()
    assert {"jax", "jaxlib", "onnx", "onnxscript"} < set(env.PACKAGES)
    assert found["native"] == (found["native_isa"] is not None)
    assert str(found["native_isa"]) in env.diagnose()[0].state or not found["native"]


def test_versions_of_what_is_not_installed_are_none() -> None:
    assert env.version("no-such-distribution") is None
    assert env.version("resnet_fused")


def test_a_missing_tool_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = env.collect()
    assert found["compiler"] is None
    assert found["driver"] is None
    assert found["commit"] is None


def test_a_package_in_somebody_elses_checkout_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "env.py").write_text("")
    monkeypatch.setattr(env, "__file__", str(tmp_path / "env.py"))
    assert env.commit() is None


@pytest.mark.parametrize("counter", ["1200 us", None])
def test_a_gpu_says_how_long_it_was_held_down(
    counter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older driver does not know the counter, and answers no question that asks for it."""

    def output(*command: str) -> str | None:
        if env.POWER_CAPPED in command[1]:
            return counter
        return "1980 MHz, 3201 MHz, 1980 MHz, 700.00 W, 36"

    monkeypatch.setattr(env, "_output", output)
    found = env.clocks()
    assert found.get(env.POWER_CAPPED) == counter
    assert (found["clocks.sm"], found["temperature.gpu"]) == ("1980 MHz", "36")


def test_a_commit_with_changes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "env.py").write_text("")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "env.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    monkeypatch.setattr(env, "__file__", str(tmp_path / "env.py"))
    number = env.commit()
    assert number is not None
    assert len(number) == 12
    (tmp_path / "env.py").write_text("changed")
    assert env.commit() == f"{number}+changes"


def test_every_backend_is_a_finding_with_its_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [Backend("cuda", False, "no driver", "install one"), Backend("onednn", True, "", "")]
    monkeypatch.setattr("resnet_fused.backends", lambda: listed)
    monkeypatch.setattr(env, "native_error", lambda: "libgomp.so.1: cannot open")
    native, cuda, onednn, *_ = env.diagnose()
    assert native.state == "libgomp.so.1: cannot open"
    assert "make build" in native.advice
    assert (cuda.good, cuda.state, cuda.advice) == (False, "no driver", "install one")
    assert (onednn.good, onednn.state, onednn.advice) == (True, "available", "")


def test_the_facts_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = dict(env.facts())
    assert torch.__version__ in facts["torch"]
    assert all(text and "\n" not in text for text in facts.values())


def test_the_facts_say_how_many_calls_are_tuned_and_where(cache: Path) -> None:
    from resnet_fused.backends import _tuned_file

    device = env._devices()[0]
    file = _tuned_file.path(device)
    place = " --device cpu" if device.type == "cpu" else ""
    command = f"resnet-fused tune MODEL{place}"
    assert dict(env.facts())["tuned"] == f"no calls yet; `{command}` writes {file}"
    _tuned_file.merge(device, {("add_relu",): _tuned_file.Choice("cpu", "default", 1.0, None)})
    assert dict(env.facts())["tuned"] == f"1 calls in {file}"
    file.write_text("garbage")
    assert dict(env.facts())["tuned"].startswith(f"{file} cannot be used: it is not JSON")
    assert file.read_text() == "garbage"  # the doctor only looks


def test_what_the_environment_asks_for_in_vain_is_found(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resnet_fused.backends import _requested, cudnn

    def states() -> list[str]:
        return [f.state for f in env.diagnose() if f.name in ("asked for", "choices")]

    assert states() == []
    monkeypatch.setattr(_requested, "_name", "bogus")
    (cache / "file").write_text("")
    monkeypatch.setenv("RESNET_FUSED_CACHE_DIR", str(cache / "file" / "below"))
    asked, choices = states()
    assert asked.startswith("RESNET_FUSED_BACKEND: unknown backend 'bogus'")
    assert choices.startswith(f"{cache / 'file' / 'below'} cannot be written to")
    monkeypatch.setattr(cudnn, "available", lambda: "no GPU")
    monkeypatch.setattr(_requested, "_name", "cudnn")
    assert states()[0] == "RESNET_FUSED_BACKEND: cudnn is not available"
    assert ("backend", "cudnn") in env.facts()


def test_each_gpu_is_named_and_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    facts = env.facts()
    assert ("gpus", "GPU 0, GPU 1") in facts
    assert ["tuned-gpu-0-" in text for name, text in facts if name == "tuned"] == [True, False]
    assert env.collect()["tuned"] == {"cuda:0": 0, "cuda:1": 0}
