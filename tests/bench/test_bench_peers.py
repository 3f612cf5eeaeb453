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
