from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fused.bench import measure, peers
from resnet_fused.bench.contenders import Setup
from resnet_fused.bench.networks import Network
from resnet_fused.bench.options import UsageError
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import Case
from resnet_fused.bench.timing import Rounds, elapsed_cpu


def test_a_missing_peer_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_found", lambda module: module != "openvino")
    assert peers.usable_peers("--peers", ["inductor", "onnxruntime"]) == ("inductor", "onnxruntime")
    with pytest.raises(UsageError, match=r"openvino needs openvino, not .*\[bench-peers\]"):
        peers.usable_peers("--peers", ["openvino"])


def test_an_unknown_peer_gets_the_nearest_names() -> None:
    with pytest.raises(UsageError, match=r"did you mean onnxruntime\?.*inductor, onnx"):
        peers.usable_peers("--peers", ["onnxruntme"])


def test_peers_decline_what_they_do_not_run() -> None:
    onnx = peers.PEERS["onnxruntime"]
    assert onnx.declines(torch.float32, "cpu") is None
    assert onnx.declines(torch.bfloat16, "cpu") == "runs float32 only"
    assert onnx.declines(torch.float32, "cuda") == "runs on cpu only"


@pytest.mark.parametrize("frozen", [True, False])
def test_inductor_compiles_once_and_as_it_says(
    frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One compiled anew while it is timed, or with weights not frozen, would flatter the others."""
    import torch._inductor.config as config

    compiled: dict[object, bool] = {}

    def compile_(model: nn.Module, **kwargs: object) -> nn.Module:
        def first_sight(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            kind = args[0].is_inference(), args[0].shape, args[0].stride()
            compiled.setdefault(kind, config.freezing)

        model.register_forward_pre_hook(first_sight)
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    build = peers.inductor(freezing=frozen)
    pictures = torch.randn(3, 3, 8, 8)
    case = Case("m", "float32", 1)
    network = Network("m", nn.Conv2d(3, 4, 3), 1, 1, 27, pictures[:2], torch.ones(2, 4, 6, 6))
    setup = Setup("m", network.model, pictures[:1], torch.float32, "cpu", 1, tmp_path)
    method = measure.Method({"eager": build}, lambda: Rounds(1, 1), elapsed_cpu)
    measure.run_case(network, case, setup, method, Watch())
    assert list(compiled.values()) == [frozen]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "jax"])
def test_exported_peers_agree_with_torch(name: str, tmp_path: Path) -> None:
    peer = peers.PEERS[name]
    for module in peer.needs:
        pytest.importorskip(module)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    threads = len(os.sched_getaffinity(0)) if name == "jax" else 1
    runner = peer.build(Setup("m", model, x, torch.float32, "cpu", threads, tmp_path))
    answer = runner.read(runner.run(runner.prepare(x)))
    torch.testing.assert_close(answer, model(x).detach())


def on_the_cpu(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> list[str]:
    """Let cuDNN's calls be torch's own on the CPU, each as long as is said; return their names."""
    from resnet_fused.backends import cudnn

    calls: list[str] = []

    def plain(*args: object) -> torch.Tensor:
        calls.append("plain")
        return torch.conv2d(*args)

    def relu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *geometry: object):  # type: ignore[no-untyped-def]
        calls.append("relu")
        return torch.conv2d(x, weight, bias, *geometry).relu()

    def add_relu(x, weight, z, alpha, bias, *geometry):  # type: ignore[no-untyped-def]
        calls.append("add relu")
        return (torch.conv2d(x, weight, bias, *geometry) + alpha * z).relu()

    def clock(run, number, feed=None):  # type: ignore[no-untyped-def]
        run()
        return seconds[calls[-1]]

    monkeypatch.setattr(cudnn, "available", lambda: None)
    monkeypatch.setattr(cudnn, "supports", lambda op, *args: None)
    monkeypatch.setattr(cudnn.F, "conv2d", plain)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    monkeypatch.setattr("resnet_fused.bench.timing.clock_for", lambda device: clock)
    return calls


@pytest.mark.parametrize(("fused_s", "stem"), [(1.0, "relu"), (17.0, "plain")])
def test_cudnn_runs_its_fused_calls_and_the_stem_as_it_is_quicker(
    fused_s: float, stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resnet_fused.backends import cudnn, requested
    from resnet_fused.models import create_model

    before = cudnn.conv_bn_act
    calls = on_the_cpu(monkeypatch, {"relu": fused_s, "plain": 2.0})
    model = create_model("resnet18").eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = model(x)
        runner = peers.PEERS["cudnn"].build(Setup("m", model, x, torch.float32, "cpu", 1, tmp_path))
        calls.clear()
        answer = runner.run(runner.prepare(x))
        assert calls.count("add relu") == 8  # one per block
        assert calls[0] == stem
        assert calls[1:].count("relu") == 8
        assert calls[1:].count("plain") == 3  # shortcuts, which no ReLU follows
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)
    assert cudnn.conv_bn_act is before
    assert requested() == "auto"
