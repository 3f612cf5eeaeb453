"""``python -m benchmarks bn``: its answers are checked, its table and file say what was timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import bn
from resnet_fused.backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))
SHAPE = (2, 24, 5, 5)


@pytest.mark.parametrize("what", bn.PASSES)
@pytest.mark.parametrize("dtype", bn.DTYPES, ids=str)
def test_all_who_run_a_pass_agree(what, dtype, monkeypatch):
    monkeypatch.setattr(bn, "_compiled", lambda run, *args: lambda: run(*args))
    bn.check(SHAPE, dtype, what)
    found = bn.calls(SHAPE, dtype, what)
    found.pop(bn.COPY, None)
    results = [bn.first(call()).float() for call in found.values()]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-2, atol=2e-2)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    right = bn.kernels.bn_apply
    monkeypatch.setattr(bn.kernels, "bn_apply", lambda *a, **k: right(*a, **k).add_(0.1))
    with pytest.raises(AssertionError, match="BN apply"):
        bn.check(SHAPE, torch.float32, bn.APPLY)


def test_table_and_file(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bn, "SHAPES", (SHAPE[1:],))
    monkeypatch.setattr(bn, "_compiled", lambda run, *args: lambda: run(*args))
    words = ["bn", "-b", "2", "--seconds", "0.01", "--threads", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(command.app, words)
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "bn.json").read_text())
    assert kept["conditions"]["threads"] == 1
    assert {tuple(row["shape"]) for row in kept["rows"]} == {SHAPE}
    assert len(kept["rows"]) == len(bn.PASSES) * len(bn.DTYPES)
    for row in kept["rows"]:
        assert set(row["ratios"]) == set(row["us"]) - {bn.KERNEL}
        ratio, _, _ = row["ratios"][bn.EAGER]
        assert f"{ratio:.2f}x" in result.stdout
