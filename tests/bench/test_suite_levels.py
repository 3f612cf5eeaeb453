"""The cases of the suite: what is harvested, and one small case of each level for real."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import cold, levels, subjects, suite, training
from benchmarks.peaks import Peaks
from benchmarks.suite import Suite
from resnet_fused.backends import _requested
from resnet_fused.bench import contenders, networks
from resnet_fused.bench.options import Settings, UsageError
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import (
    BLOCK,
    COLD,
    FAILED,
    INFERENCE,
    LEVELS,
    OK,
    OP,
    OUT_OF_MEMORY,
    PASS,
    TRAINING,
    Case,
    Record,
    save,
)
from resnet_fused.flops import count
from resnet_fused.models import create_model

PEAKS = Peaks(dict.fromkeys(("float32", "bfloat16"), 1e11), 1e10)


NAME = "cifar_resnet20"


@pytest.fixture
def small(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Suite]:
    """The smallest ResNet, on one thread: two wait for one another where the machine is busy."""
    monkeypatch.setattr("resnet_fused.bench.timing.SHORTEST_SAMPLE_S", 0.0)
    before = torch.get_num_threads()
    yield Suite(
        settings=replace(settings, models=(NAME,), batches=(1, 2), threads=1),
        levels=tuple(level for level in LEVELS if level != PASS),
        peers=dict.fromkeys(LEVELS, ("eager-nchw",)),
        image_size=32,
        caches=suite.CACHES,
        graphs=False,
        seconds=suite.SECONDS["cpu"],
        limit=60.0,
    )
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
@pytest.mark.parametrize("level", [OP, BLOCK])
def test_the_layers_with_their_uses_are_the_whole_model(level: str, name: str) -> None:
    """All multiply-adds are in the ops; the blocks lack the stem's and the head's."""
    with torch.device("meta"):
        whole = count(create_model(name))
    total = 0
    for layer in subjects.layers(level, (name,), 224).values():
        with torch.device("meta"):
            module = layer.build()
        for part in module.modules():
            if isinstance(part, subjects.Group):
                part.fit(1)
        total += layer.uses[name] * count(module, (1, *layer.input_shape)).macs
    around = {"conv1", "fc"} if level == BLOCK else set()
    assert total == sum(row.macs for row in whole.layers if row.name not in around)


def test_layers_of_several_models_are_measured_once() -> None:
    one, both = (subjects.layers(OP, names, 224) for names in
                 (("resnet50",), ("resnet50", "resnet152")))  # fmt: skip
    assert list(one) == list(both)
    assert both["256x14x14 3x3 to 256 relu"].uses == {"resnet50": 5, "resnet152": 35}
    assert "3x224x224 7x7 to 64 stride 2 relu max pool" in one
    assert one["256x14x14 3x3 to 256 relu"].uses == {"resnet50": 5}


def test_a_model_without_fused_calls_is_refused() -> None:
    with pytest.raises(UsageError, match="makes no fused call"):
        subjects.layers(OP, ("vgg16",), 64)


def test_the_plan_goes_from_ops_to_training(small: Suite) -> None:
    cases = suite.plan(small)
    assert list(dict.fromkeys(case.level for case in cases)) == list(small.levels)
    assert {case.batch for case in cases if case.level == TRAINING} == {2}
    assert {case.batch for case in cases if case.level == COLD} == {1}
    assert {case.batch for case in cases if case.level == OP} == {1, 2}


def test_default_peers_are_those_installed_and_the_others_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(suite, "absence", lambda name: "is away" if name == "openvino" else None)
    peers, absent = suite.peers_by_level("--peers", [], "cpu")
    assert peers[INFERENCE] == ("inductor", "onnxruntime", "eager-nchw")
    assert absent == {"openvino": "is away", "cudnn": "runs on cuda only"}
    _, absent = suite.peers_by_level("--peers", [], "cuda")
    assert {"apex", "cudnn-frontend"} < set(absent)
    usual = suite.usual(suite.ALL, "cpu")
    _, absent = suite.peers_by_level("--peers", ["inductor", "eager-nchw"], "cpu", usual)
    assert absent == {"inductor": "in training: runs inference only"}
    every, _ = suite.peers_by_level("--peers", ["all"], "cpu")
    assert set(every[OP]) >= {"inductor-max-autotune", "onnxruntime"}
    assert set(suite.peers_by_level("--peers", ["none"], "cpu")[0].values()) == {()}
    with pytest.raises(UsageError, match="stands alone"):
        suite.peers_by_level("--peers", ["all", "inductor"], "cpu")


@pytest.mark.parametrize("words", ["3x3 to 64 add relu", "linear to 10"])
def test_an_op_is_right_in_all_and_has_a_bound(small: Suite, words: str, tmp_path: Path) -> None:
    layer = next(n for n in subjects.layers(OP, (NAME,), 32) if words in n)
    case = Case("", "float32", 3, OP, layer)
    names = tuple(small.contenders(case))
    rows = levels.run_case(small, case, names, PEAKS.to_dict(), tmp_path, watch=Watch())
    assert [row.verdict for row in rows] == [OK] * 4
    row = rows[0]
    assert row.uses[NAME] >= 1
    assert row.nbytes is not None
    assert row.bound_s == pytest.approx(max(2e9 * row.gmacs * 3 / 1e11, row.nbytes / 1e10))
    assert len(row.seconds) == 2


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("level", [OP, INFERENCE, COLD])
def test_graphs_or_not_is_said_to_the_engine_too(
    small: Suite, graphs: bool, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU `frozen` records graphs of its own, whoever captures the others."""
    said = []
    monkeypatch.setattr("resnet_fused.freeze", lambda *args, graphs: said.append(graphs))
    layer = next(iter(subjects.layers(OP, (NAME,), 32))) if level == OP else ""
    case = Case("" if layer else NAME, "float32", 1, level, layer)
    setup = levels.prepare(replace(small, graphs=graphs), case, tmp_path).setup
    contenders.frozen(setup)
    assert said == [graphs]


def test_an_engine_of_an_op_reads_its_residual_as_a_layer_has_written_it(
    small: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = []
    monkeypatch.setattr("resnet_fused.freeze", lambda model, *_, **__: frozen.append(model))
    layer = next(n for n in subjects.layers(OP, (NAME,), 32) if "3x3 to 64 add relu" in n)
    prepared = levels.prepare(small, Case("", "float32", 2, OP, layer), tmp_path)
    prepared.contenders["frozen"](prepared.setup)
    (group,) = frozen
    assert group.residual.is_contiguous(memory_format=torch.channels_last)
    assert not prepared.network.model.residual.is_contiguous(memory_format=torch.channels_last)


def test_a_model_is_right_and_has_a_bound(small: Suite, tmp_path: Path) -> None:
    case = Case(NAME, "float32", 2)
    rows = levels.run_case(small, case, ("eager", "frozen"), PEAKS.to_dict(), tmp_path,
                           watch=Watch())  # fmt: skip
    assert [(row.contender, row.verdict) for row in rows] == [("eager", OK), ("frozen", OK)]
    assert rows[0].bound_s is not None


def test_training_is_held_to_the_gradient_and_keeps_less(small: Suite, tmp_path: Path) -> None:
    case = Case(NAME, "float32", 2, TRAINING)
    # By name, as maps this small are left to torch.
    asked = replace(small, settings=replace(small.settings, backend="reference"))
    rows = levels.run_case(asked, case, ("eager", "fused"), None, tmp_path, watch=Watch())
    eager, fused = rows
    assert [eager.verdict, fused.verdict] == [OK, OK], (eager.note, fused.note)
    assert eager.saved_mib is not None
    assert fused.saved_mib is not None
    assert fused.saved_mib < eager.saved_mib
    assert fused.img_s is not None


@pytest.mark.parametrize("graphs", [True, False])
def test_what_is_captured_is_checked_by_the_kernels_of_a_graph(
    graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    captured: list[bool] = []
    exact = torch.ones(3)

    def note(given: object = None) -> Any:
        asked.append(_requested.for_a_graph())
        return given

    class Noting(SimpleNamespace):
        def __call__(self) -> None:
            note()

    trainer = Noting(
        saved_mib=lambda: note(1.0), gradient=lambda: note(exact),
        capture=lambda: captured.append(_requested.for_a_graph()),
    )  # fmt: skip
    meter = training.memory.meter_for("cpu")
    monkeypatch.setattr(training.memory, "meter_for", lambda device: meter)
    monkeypatch.setattr(training, "_trainer", lambda *args: trainer)
    network = SimpleNamespace(model=None, checked=torch.zeros(2, 1), macs=1, params=1)
    setup = SimpleNamespace(device="cuda", graphs=graphs, example=None)
    case = Case(NAME, "bfloat16", 2, TRAINING)
    prepare = training.OWN["fused"]
    row, _ = training.enter("fused", prepare, network, case, setup, exact, 0.0)  # type: ignore[arg-type]
    assert row.verdict == OK
    assert asked == [graphs] * 4, "two steps, what they keep, the gradient"
    assert captured == ([False] if graphs else [])


@pytest.mark.parametrize("name", training.OWN)
def test_counting_what_is_kept_keeps_nothing(name: str) -> None:
    """A graph that lives on would hold its maps, and autograd's nodes on their stream."""
    alive: list[weakref.ref[Tensor]] = []

    class Noted(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)  # saved for backward by the op that made it
            alive.append(weakref.ref(y))
            return y

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Noted(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(8, 10))  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    trainer = training.Trainer(model, x, torch.tensor([2, 7]), torch.float32, training.OWN[name])
    assert trainer.saved_mib() > 0
    assert alive
    assert all(ref() is None for ref in alive)


def test_a_float16_gradient_that_overflows_is_computed_again_with_less_scale() -> None:
    """1000 times the loss: at GradScaler's first factor float16 overflows."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
    x, target = torch.randn(2, 3, 2, 2), torch.tensor([2, 7])

    def louder(network: torch.nn.Module) -> object:
        return lambda x: 1000 * network(x)

    low, exact = (
        training.Trainer(model, x, target, dtype, louder).gradient()
        for dtype in (torch.float16, torch.float32)
    )
    assert low.isfinite().all()
    assert float((low - exact).norm() / exact.norm()) < 0.05


def not_a_number(model: torch.nn.Module) -> object:
    return lambda x: torch.nan * model(x)


def turned(model: torch.nn.Module) -> object:
    return lambda x: -model(x)


def ending(model: torch.nn.Module) -> object:
    os._exit(3)


def test_each_trains_in_a_process_of_its_own(
    small: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that one that ends it costs no other its rows."""
    monkeypatch.setattr(training, "OWN", {**training.OWN, "fused": ending})
    case = Case(NAME, "float32", 2, TRAINING)
    eager, fused = levels.run_case(small, case, ("eager", "fused"), None, tmp_path, watch=Watch())
    assert eager.verdict == OK
    assert (fused.verdict, fused.note) == (FAILED, "RuntimeError: ended with exit code 3")


def test_a_gradient_that_is_not_finite_is_recorded(
    small: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "OWN", {"eager": not_a_number})
    case = Case(NAME, "float32", 2, TRAINING)
    (row,) = levels.run_case(small, case, ("eager",), None, tmp_path, watch=Watch())
    assert row.verdict == "WRONG"
    save(Record({}, [row]), tmp_path / "suite.json")


def test_a_wrong_gradient_has_no_speed(
    small: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "OWN", {**training.OWN, "fused": turned})
    case = Case(NAME, "float32", 2, TRAINING)
    _, fused = levels.run_case(small, case, ("eager", "fused"), None, tmp_path, watch=Watch())
    assert fused.verdict == "WRONG"
    assert fused.img_s is None


def test_a_cold_start_tells_its_stages(small: Suite, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """With the new process's work done in this one: the first import of torch is not repeated."""
    commands: list[list[str]] = []
    folders: list[list[Path]] = []
    backends = []
    monkeypatch.setenv("RESNET_FUSED_BACKEND", "reference")

    class Finished:
        returncode, stderr = 0, ""

        def __init__(self, command: list[str], env: dict[str, str], **options: object) -> None:
            commands.append(command)
            backends.append(env["RESNET_FUSED_BACKEND"])
            folders.append(list(Path(command[-1]).iterdir()))
            self.stdout = "a word from a library\n" + json.dumps(cold._start(*command[3:]))

    monkeypatch.setattr(cold.subprocess, "run", Finished)
    case = Case(NAME, "float32", 1, COLD)
    rows = levels.run_case(small, case, ("eager", "frozen"), None, tmp_path, watch=Watch())
    assert [command[1:3] for command in commands] == [["-m", "benchmarks.cold"]] * 4
    assert folders == [[]] * 4
    assert backends == ["auto"] * 4  # what was asked for, not what the environment says
    assert len({command[-1] for command in commands}) == 4
    for row in rows:
        assert row.verdict == OK
        assert list(row.stages) == list(cold.STAGES)
        assert len(row.seconds) == 2
        assert row.img_s is not None


def test_each_cold_start_exports_for_itself(small: Suite, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Or the second of two contenders that read ONNX files would find the first one's."""
    scratches: list[Path] = []

    def exporting(setup: contenders.Setup) -> contenders.Runner:
        assert not list(setup.scratch.iterdir())
        scratches.append(setup.scratch)
        (setup.scratch / "model.onnx").write_text("")
        return contenders.eager(setup)

    class Finished:
        returncode, stderr = 0, ""

        def __init__(self, command: list[str], **options: object) -> None:
            self.stdout = json.dumps(cold._start(*command[3:]))

    monkeypatch.setattr(cold.subprocess, "run", Finished)
    monkeypatch.setattr("resnet_fused.bench.measure.OWN",
                        {"eager": contenders.eager, "a": exporting, "b": exporting})  # fmt: skip
    case = Case(NAME, "float32", 1, COLD)
    rows = levels.run_case(small, case, ("a", "b"), None, tmp_path, watch=Watch())
    assert [row.verdict for row in rows] == [OK, OK], rows
    assert len(set(scratches)) == 4


@pytest.mark.parametrize(
    ("last", "verdict"),
    [
        ("ImportError: no torch", FAILED),
        ("RuntimeError: [x] DefaultCPUAllocator: can't allocate memory: you tried", OUT_OF_MEMORY),
        ("torch.OutOfMemoryError: CUDA out of memory.", OUT_OF_MEMORY),
    ],
)
def test_a_cold_start_that_fails_says_why(
    last: str, verdict: str, small: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        returncode, stdout, stderr = 1, "", f"Traceback\n{last}"

    monkeypatch.setattr(cold.subprocess, "run", lambda *args, **options: Broken())
    case = Case(NAME, "float32", 1, COLD)
    (row,) = levels.run_case(small, case, ("eager",), None, tmp_path, watch=Watch())
    assert (row.verdict, row.note) == (verdict, last)


def test_the_exact_gradient_is_that_of_the_repeated_images(small: Suite) -> None:
    network = networks.build(NAME, torch.randn(4, 3, 32, 32), seed=0)
    repeated, alone = training._exact(network, 4), training._exact(network, 2)
    assert float((repeated - alone).norm() / alone.norm()) < 1e-10
    assert math.isfinite(float(alone.norm()))


def test_pytest_benchmarks_draw_where_the_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import test_ops

    names = ("cpu", "onednn", "cuda", "triton", "cudnn", "reference")
    assert {test_ops.device_of(name) for name in names} == {"cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = [test_ops.device_of(name) for name in names]
    assert found == ["cpu", "cpu", "cuda", "cuda", "cuda", "cuda"]
