"""A network small enough to run the whole job on, and records to show and compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fused.bench import measure
from resnet_fused.bench.options import Settings
from resnet_fused.bench.results import FAILED, OK, SKIPPED, WRONG, Case, Record, Row

CONDITIONS = {
    "device": "Some CPU",
    "device_kind": "cpu",
    "cpu": "Some CPU",
    "threads": 2,
    "torch": "2.13.0",
    "resnet_fused": "0.1.0",
    "commit": "abc",
    "seed": 0,
    "date": "2026-01-02T03:04:05+00:00",
    "command": "resnet-fused bench",
}


def tiny_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model name mean the tiny network, and take one call for a sample."""
    monkeypatch.setattr("resnet_fused.bench.timing.SHORTEST_SAMPLE_S", 0.0)
    monkeypatch.setattr("resnet_fused.models.create_model", lambda name, **kwargs: tiny_network())


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        models=("resnet50",),
        dtypes=("float32",),
        batches=(1, 3),
        device="cpu",
        threads=torch.get_num_threads(),
        backend="auto",
        rounds=2,
        seed=0,
        images=None,
        out=tmp_path,
        peers=(),
    )


def make_row(contender: str, seconds: list[float] | None = None, **fields: object) -> Row:
    """A row of resnet50 at fp32, batch 8; without seconds it is not timed."""
    case = Case("resnet50", fields.pop("dtype", "float32"), fields.pop("batch", 8))
    row = Row(case, contender, fields.pop("verdict", OK), 4.089, 25.557, 1e-6, 1e-5, **fields)
    if not seconds:
        return row
    return measure.with_speed(row, {"eager": [0.4] * len(seconds), contender: seconds})


@pytest.fixture
def row() -> Callable[..., Row]:
    return make_row


@pytest.fixture
def record() -> Record:
    """Every kind of row: timed, wrong, failed, skipped, with a peer."""
    return Record(
        dict(CONDITIONS),
        [
            make_row("eager", [0.4, 0.4, 0.4], peak_mib=100.0),
            make_row("fused", [0.3, 0.31, 0.32]),
            make_row("frozen", [0.2, 0.2, 0.25]),
            make_row("onnxruntime", [0.3, 0.26, 0.3]),
            make_row("openvino", [0.5, 0.5, 0.5]),
            make_row("eager", [0.2, 0.2, 0.2], dtype="bfloat16"),
            make_row("fused", verdict=FAILED, note="RuntimeError: no", dtype="bfloat16"),
            make_row("frozen", verdict=WRONG, note="error 1, allowed 0.1", dtype="bfloat16"),
            make_row("onnxruntime", verdict=SKIPPED, note="runs float32 only", dtype="bfloat16"),
            make_row("openvino", [0.1, 0.1, 0.1], dtype="bfloat16"),
        ],
    )
