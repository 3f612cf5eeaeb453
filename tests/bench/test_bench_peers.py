from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fused.bench import peers
from resnet_fused.bench.contenders import Setup
from resnet_fused.bench.options import UsageError


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


def test_every_compilation_of_inductor_is_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfrozen one is slower, and would flatter whatever it is compared with."""
    import torch._inductor.config as config

    seen: list[bool] = []

    def compile_(model: nn.Module, **kwargs: object) -> nn.Module:
        model.register_forward_hook(lambda *args: seen.append(config.freezing))
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    x = torch.randn(1, 3, 8, 8)
    with config.patch(freezing=False):
        runner = peers.inductor(
            Setup("m", nn.Conv2d(3, 4, 3), x, torch.float32, "cpu", 1, tmp_path)
        )
        runner.run(runner.prepare(x))
    assert seen == [True]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_exported_peers_agree_with_torch(name: str, tmp_path: Path) -> None:
    peer = peers.PEERS[name]
    for module in peer.needs:
        pytest.importorskip(module)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    runner = peer.build(Setup("m", model, x, torch.float32, "cpu", 1, tmp_path))
    answer = runner.read(runner.run(runner.prepare(x)))
    torch.testing.assert_close(answer, model(x).detach())
