"""Training convolutions alone: answers are held against float64, sums weighed by their uses."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import convolutions, documents, levels, report, suite
from benchmarks.convolutions import Geometry, Layer
from benchmarks.suite import Suite
from resnet_fused.backends import _device, cpu
from resnet_fused.bench import measure, timing
from resnet_fused.bench.options import Settings
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import CONVOLUTION, OK, SKIPPED, WRONG, Case, Record, Row
from resnet_fused.flops import count
from resnet_fused.models import create_model

needs_kernels = pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))
ONE = Geometry((32, 14, 14), (64, 32, 1, 1), (1, 1), (0, 0), (1, 1), 1)
STRIDED = Geometry((32, 14, 14), (48, 32, 3, 3), (2, 2), (1, 1), (1, 1), 1)


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_device, "last_cache_bytes", lambda: 2**12)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(geometry: Geometry, what: str, dtype: str) -> list[Row]:
    case = Case("", dtype, 4, CONVOLUTION, convolutions._name(geometry, what))
    rounds = timing.Rounds(2, 2)
    method = measure.Method(convolutions.CONTENDERS, lambda: rounds, timing.elapsed_cpu, timing.FED)
    layer = Layer(what, geometry, {"resnet50": 3})
    return convolutions.run_case(case, layer, method, Watch())


@needs_kernels
@pytest.mark.parametrize("what", convolutions.PASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_are_right(what: str, dtype: str) -> None:
    eager, kernel = run(ONE, what, dtype)
    declined = bool(cpu.declines(torch.empty(0, dtype=getattr(torch, dtype))))
    assert (eager.verdict, kernel.verdict) == (OK, SKIPPED if declined else OK), kernel.note
    assert len(eager.seconds) == 2
    assert eager.uses == {"resnet50": 3}
    assert eager.gmacs == 14 * 14 * 32 * 64 / 1e9


@needs_kernels
def test_what_is_left_to_torch_is_said_and_not_timed() -> None:
    _, forward = run(STRIDED, convolutions.FORWARD, "float32")
    assert (forward.verdict, forward.note) == (SKIPPED, "left to torch's own")
    assert forward.seconds == []
    _, weight = run(STRIDED, convolutions.WEIGHT, "float32")
    assert weight.verdict == OK


@needs_kernels
@pytest.mark.parametrize("what", convolutions.PASSES)
def test_a_wrong_kernel_is_not_timed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> torch.Tensor:
        return 1.1 * convolutions.by_torch(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(convolutions, "CONTENDERS", {**convolutions.CONTENDERS, "kernel": wrong})
    eager, kernel = run(ONE, what, "float32")
    assert eager.seconds
    assert (kernel.verdict, kernel.seconds) == (WRONG, [])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_what_is_freed_stays_with_the_process() -> None:
    """Or oneDNN's outputs, which torch allocates anew, would be faulted in while they are timed."""
    convolutions._keep_freed_memory()
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < 2**24 * 4 // 4096 // 10, faults


@pytest.mark.parametrize("model", ["resnet34", "resnet50"])
def test_the_convolutions_with_their_uses_are_all_of_the_model(model: str) -> None:
    with torch.device("meta"):
        whole = count(create_model(model))
    found = convolutions.layers((model,))
    macs = dict.fromkeys(convolutions.PASSES, 0)
    for layer in found.values():
        macs[layer.what] += layer.uses[model] * layer.geometry.macs
    by_name = {row.name: row.macs for row in whole.layers}
    assert macs[convolutions.FORWARD] == whole.macs - by_name["fc"]
    assert macs[convolutions.WEIGHT] == macs[convolutions.FORWARD]
    # Nobody asks for the gradient of the images.
    assert macs[convolutions.DATA] == macs[convolutions.FORWARD] - by_name["conv1"]


def test_convolutions_of_several_models_are_measured_once() -> None:
    one, both = (convolutions.layers(models) for models in
                 (("resnet50",), ("resnet50", "resnet152")))  # fmt: skip
    assert list(one) == list(both)
    assert both["1024x14x14 1x1 to 256 forward"].uses == {"resnet50": 5, "resnet152": 35}


def test_the_suite_runs_them_on_one_thread(settings: Settings, tmp_path: Path) -> None:
    asked = Suite(
        settings, (CONVOLUTION,), {}, 224, suite.CACHES, False, suite.SECONDS["cpu"], 60.0
    )
    case = suite.plan(asked)[0]
    assert case.layer == "3x224x224 7x7 to 64 stride 2 forward"
    rows = levels.run_case(asked, case, ("eager",), None, tmp_path, watch=Watch())
    assert [row.verdict for row in rows] == [OK]


def row(layer: str, name: str, seconds: float, uses: int) -> Row:
    case = Case("", "float32", 16, CONVOLUTION, layer)
    if not seconds:
        return Row(case, name, SKIPPED, 1, 1, note="left to torch's own", uses={"resnet50": uses})
    made = Row(case, name, OK, 1, 1, uses={"resnet50": uses})
    return measure.with_speed(made, {name: [seconds] * 3})


def test_a_models_sum_is_over_the_shapes_that_the_kernel_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {
        "64x56x56 1x1 to 64 forward": (0.010, 0.005, 1),
        "64x56x56 1x1 to 256 forward": (0.040, 0.040, 4),
        "64x56x56 1x1 to 99 forward": (0.040, 0.0, 9),
        "64x56x56 1x1 to 64 data gradient": (0.010, 0.008, 1),
        "128x56x56 3x3 to 128 stride 2 forward": (0.010, 0.0, 1),
    }
    rows = [
        row(layer, name, seconds, uses)
        for layer, (eager, kernel, uses) in times.items()
        for name, seconds in (("eager", eager), ("kernel", kernel))
    ]
    conditions = {"device": "Some CPU", "device_kind": "cpu", "threads": 1, "torch": "2",
                  "resnet_fused": "0", "command": "c", "seed": 0}  # fmt: skip
    record = Record(conditions, rows)
    by_layer, sums = report.grids(record)
    assert len(by_layer.rows) == len(times)
    assert [line[3:] for line in sums.rows] == [
        ["1x1", "forward", "2 of 3", "170.0", "165.0", "1.03x", "1.00-2.00"],
        ["1x1", "data gradient", "1 of 1", "10.0", "8.0", "1.25x", "1.25-1.25"],
    ]
    monkeypatch.setattr(documents, "RESULTS", tmp_path)
    documents.keep(record, "small")
    text = documents.section(CONVOLUTION)
    assert "| resnet50 | fp32 | 16 | 1x1 | forward | 2 of 3 |" in text
    assert "not measured yet" not in text


def test_a_layers_kind_is_read_off_its_name() -> None:
    assert convolutions.part_of("256x56x56 1x1 to 512 stride 2 data gradient") == (
        "1x1 stride 2", "data gradient",
    )  # fmt: skip
    assert convolutions.part_of("64x56x56 3x3 to 64 groups 4 forward")[0] == "3x3 groups 4"
