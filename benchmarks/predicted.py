"""What GPUs are predicted to do, before anybody has measured: what ``NOTES.md`` begins with.

``python -m benchmarks.predicted`` prints it; ``--save`` writes it into the notes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from benchmarks import marked, traffic
from resnet_fused.backends.triton import tiles
from resnet_fused.backends.triton.cost import arch_of, cost
from resnet_fused.bench.options import UsageError
from resnet_fused.bench.results import save_text
from resnet_fused.bench.tables import Grid
from resnet_fused.inspection import convolutions
from resnet_fused.inspection.subjects import SUBJECTS
from resnet_fused.roofline import DEVICES, Device, Report, roofline_by_name
from resnet_fused.tuning.measure import calls_at_most

NOTES = Path(__file__).with_name("NOTES.md")
BEGIN, END = "<!-- predicted -->", "<!-- end of predicted -->"
MODELS, BATCHES = ("resnet34", "resnet50", "resnet152"), (256, 1)
DEVICE, CAPABILITY, DTYPE, PRECISION = "h200", 90, torch.bfloat16, "bf16"
COLUMNS = (
    "model", "batch", "layer by layer", "stem in one kernel", "and 3x3 with its 1x1",
    "arithmetic alone", "Triton's tiles", "MB an image",
)  # fmt: skip
STEPS = (
    "model", "batch", "MB an image: eager", "fused", "ends as one op", "img/s: eager", "fused",
    "ends as one op", "fused / eager", "ends as one op / eager",
)  # fmt: skip
#: Candidates that are no Triton config, by op: cuDNN's two ways and plain torch, or plain torch.
OTHERS = {"conv_bn_act": 3}
#: Seconds to compile a config: 0.51 is the mean of 380 for ResNet-50 at batch 256 on sm_90 (Triton
#: 3.7.1, one thread of a shared AMD EPYC; on sm_100 it was 1.8).
COMPILE_S = 0.5
#: Seconds of a call with the flush of L2 before it: more than any layer at batch 256 should take.
CALL_S = 1e-3


class Tuning(NamedTuple):
    """What `tune` does to a model at one batch size on a GPU."""

    #: Different ones, each tuned by itself.
    calls: int
    #: Triton's configs, each compiled.
    configs: int
    #: Calls of candidates, to check and to time them: at most so many.
    runs: int

    @property
    def seconds(self) -> float:
        """Time to compile and to run; what float64 answers take is left out."""
        return self.configs * COMPILE_S + self.runs * CALL_S


def tuning(name: str, batch: int) -> Tuning:
    """Return what tuning a model is: its convolutions, and what an engine could merge."""
    found = [
        (len(subject.candidates(problem, PRECISION, CAPABILITY)), OTHERS.get(op, 1))
        for op, subject in SUBJECTS.items()
        for problem in subject.of_model(name, batch, DTYPE)
    ]
    runs = sum(calls_at_most(configs + others) for configs, others in found)
    return Tuning(len(found), sum(configs for configs, _ in found), runs)


def section() -> str:
    """Return the table as Markdown, and what tuning takes."""
    device = DEVICES[DEVICE]
    rows = [_row(name, batch, device) for batch in BATCHES for name in MODELS]
    title = f"Images a second, {device.name}, {PRECISION}, 224x224"
    table = Grid(title, COLUMNS, rows, left=("model",)).markdown().strip()
    rows = [_row_of_training(name, max(BATCHES), device) for name in MODELS]
    title = f"Training steps, {device.name}, {PRECISION}, 224x224"
    steps = Grid(title, STEPS, rows, left=("model",)).markdown().strip()
    work = tuning("resnet50", 256)
    return (
        f"{table}\n\n{steps}\n\nTuning ResNet-50 at batch 256: {work.calls} different calls, "
        f"{work.configs} configs to compile and at most {work.runs:,} runs of candidates, about "
        f"{work.seconds:.0f} s."
    )


def _row(name: str, batch: int, device: Device) -> list[str]:
    report = roofline_by_name(name, (batch, 3, 224, 224), device, DTYPE)
    speeds = (
        report.layerwise.images_per_second,
        report.stem_joined.images_per_second,
        report.across.images_per_second,
        report.layerwise.images_per_second_of_arithmetic,
        batch / _seconds_of_tiles(name, batch, device, report),
    )
    megabytes = report.layerwise.nbytes_per_image / 1e6
    return [name, str(batch), *map(_rounded, speeds), f"{megabytes:.1f}"]


def _row_of_training(name: str, batch: int, device: Device) -> list[str]:
    steps = [
        traffic.training_step(name, batch, DTYPE, fused=fused, ends=ends)
        for fused, ends in ((False, False), (True, False), (True, True))
    ]
    megabytes = [sum(work.nbytes for work in step) / batch / 1e6 for step in steps]
    speeds = [batch / sum(w.seconds(device, DTYPE) for w in step) for step in steps]
    over = [f"{speed / speeds[0]:.2f}x" for speed in speeds[1:]]
    moved = [f"{each:.0f}" for each in megabytes]
    return [name, str(batch), *moved, *map(_rounded, speeds), *over]


def _seconds_of_tiles(name: str, batch: int, device: Device, report: Report) -> float:
    """Return the cost model's time for the convolutions, and the roofline's for what is left.

    The model counts clocks; here they pass at the rate at which its tensor cores reach the
    device's figure.
    """
    arch = arch_of(CAPABILITY)
    rate = device.flops[DTYPE] / (arch.processors * arch.tensor_flops)
    clocks = sum(
        count * cost(p, PRECISION, tiles.heuristic(p, PRECISION, CAPABILITY), CAPABILITY)
        for p, count in convolutions(name, batch, DTYPE).items()
    )
    left = sum(layer.time for layer in report.layerwise.layers if "conv" not in layer.op)
    return clocks / rate + left


def _rounded(speed: float) -> str:
    return f"{float(f'{speed:.3g}'):,.0f}"


def main(
    save: Annotated[bool, typer.Option("--save", help="Write the table into NOTES.md.")] = False,
) -> None:
    """Print the table of predictions; nothing is measured."""
    if not save:
        print(section())
        return
    text = NOTES.read_text(encoding="utf-8")
    try:
        save_text(marked.replaced(text, BEGIN, END, section(), str(NOTES)), NOTES)
    except UsageError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    typer.run(main)
