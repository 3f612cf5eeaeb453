"""Epochs of training as a user runs them: a CIFAR ResNet that learns scikit-learn's digits.

An epoch is all of it: the order of the images, batches gathered, forward, loss, backward, AdamW and
its schedule. All begin with the same weights and see the same batches. After the last epoch each is
tested on images that it has not seen; one that has not learnt loses its times.

On a CPU each trains in a process of its own, and they take turns epoch by epoch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from benchmarks import digits, training
from benchmarks.apart import Apart
from benchmarks.digits import Digits, Learner
from resnet_fused.bench import measure
from resnet_fused.bench.options import PRECISIONS, Settings
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import OK, Case, Row
from resnet_fused.flops import count
from resnet_fused.models import create_model

#: With these each convolution of the first stages is large enough to train fused on a CPU.
MODEL, BATCH, SIDE = "cifar_resnet20", 128, 16
#: Epochs that are timed, and those before them: compilers are at work in the first, and the timing
#: begins with another.
EPOCHS, UNTIMED = 11, 2
#: The share of held-out images that may be taken for others.
ALLOWED = 0.05


def epochs(settings: Settings) -> int:
    """Return how many epochs are timed."""
    return settings.rounds or EPOCHS


def run_case(case: Case, settings: Settings, method: measure.Method, watch: Watch) -> list[Row]:
    """Return a row per contender: its epochs' times, and the share of images it got wrong."""
    images = digits.load(SIDE)
    # A call takes so many images, and speeds are by its time.
    whole = replace(case, batch=len(images.learnt) // case.batch * case.batch)
    model = network(settings.seed)
    counted = count(model, (1, 3, SIDE, SIDE))
    accuracies: dict[str, Callable[[], float]] = {}

    def blank(name: str) -> Row:
        # Backward is two convolutions for each one of forward.
        return Row(whole, name, OK, 3 * counted.macs / 1e9, counted.params / 1e6)

    def entered(name: str, prepare: training.Prepare) -> tuple[Row, Callable[[], None]]:
        step: Callable[[], None]
        asked = (blank(name), prepare, model, images, case.batch, settings)
        if settings.device == "cpu":
            apart = Apart()
            processes.callback(apart.close)
            row, step = apart.enter(enter, *asked), apart
            accuracies[name] = functools.partial(apart.ask, "accuracy")
        else:
            row, learner = enter(*asked)
            accuracies[name], step = learner.accuracy, learner
        return row, step

    def tested(row: Row) -> Row:
        return measure.judged(row, 1 - accuracies[row.contender](), ALLOWED)

    with measure.precision(case.dtype), contextlib.ExitStack() as processes:
        rows = measure.run_entered(whole, method, entered, blank, watch, tested)
    return [replace(row, case=case) for row in rows]


def network(seed: int) -> nn.Module:
    """Return the network that all begin with."""
    torch.manual_seed(seed)
    return create_model(MODEL)


def enter(
    row: Row,
    prepare: training.Prepare,
    model: nn.Module,
    images: Digits,
    batch: int,
    settings: Settings,
) -> tuple[Row, Learner]:
    """Make a learner ready; it has learnt for an epoch, so that nothing is left to be compiled."""
    layout = training.layout_of(row.contender)
    twin = copy.deepcopy(model).to(device=settings.device, memory_format=layout)  # type: ignore[call-overload]
    learner = Learner(
        twin.train(), images.on(settings.device, layout), batch=batch,
        epochs=epochs(settings) + UNTIMED, seed=settings.seed, dtype=PRECISIONS[row.case.dtype],
        prepare=prepare,
    )  # fmt: skip
    learner()
    return row, learner
