"""The job itself: the plan of cases, the networks they need, and their share of the time."""

from __future__ import annotations

import functools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fused import env
from resnet_fused.bench import measure, networks, photos, timing
from resnet_fused.bench.conditions import CLOCKS_AFTER
from resnet_fused.bench.contenders import Setup
from resnet_fused.bench.networks import CALIBRATION_BATCH, CALIBRATION_PASSES, Network
from resnet_fused.bench.options import PRECISIONS, Settings
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import OK, Case, Record, Row

#: Seconds that all cases together may take per contender, building and checking included. The
#: cases share what is left, so that what the small ones do not need goes to the large ones.
BUDGET_S = 40.0


def plan(settings: Settings) -> list[Case]:
    """Return all cases, those of a model together so that it is built once."""
    return [
        Case(model, dtype, batch)
        for model in settings.models
        for dtype in settings.dtypes
        for batch in settings.batches
    ]


def run(settings: Settings, conditions: dict[str, Any], watch: Watch) -> Record:
    """Run every case and return the record.

    The process is left as it was, but for torch's number of threads.
    """
    import resnet_fused as rf

    torch.set_num_threads(settings.threads)
    pictures, names = _pictures(settings)
    cases = plan(settings)
    watch.begin(len(cases))
    rows: list[Row] = []
    network: Network | None = None
    builds = measure.contenders(settings.peers)
    with tempfile.TemporaryDirectory() as scratch, rf.use_backend(settings.backend):
        ends = time.perf_counter() + BUDGET_S * len(builds)
        for index, case in enumerate(cases):
            if network is None or network.name != case.model:
                watch.doing(f"{case.model}: calibrating, float64 answers")
                network = networks.build(case.model, pictures, seed=settings.seed)
            setup = _setup(network, case, settings, pictures, Path(scratch))
            begin = time.perf_counter()
            share_ends = begin + (ends - begin) / (len(cases) - index)
            method = measure.Method(
                contenders=builds,
                rounds=functools.partial(rounds_for, settings.rounds, share_ends),
                clock=timing.clock_for(settings.device),
            )
            done = _measured(network, case, setup, method, watch)
            rows += done
            watch.case_done(case, done)
    after = {CLOCKS_AFTER: env.clocks()}
    return Record({**conditions, **after, "photographs": names}, rows)


def _measured(
    network: Network, case: Case, setup: Setup, method: measure.Method, watch: Watch
) -> list[Row]:
    """Return the case's rows; where the GPU was lost, which is for good here, all have failed."""
    try:
        return measure.run_case(network, case, setup, method, watch)
    except Exception as error:
        if not measure.device_lost(error):
            raise
        blank = Row(case, "", OK, network.macs / 1e9, network.params / 1e6)
        return [measure.failed(replace(blank, contender=n), error) for n in method.contenders]


def rounds_for(asked: int | None, ends: float) -> timing.Rounds:
    """Return exactly the rounds asked for, or else as many as end by `ends` on the wall clock."""
    if asked is not None:
        return timing.Rounds(asked, asked)
    return timing.Rounds(seconds=ends - time.perf_counter())


def _pictures(settings: Settings) -> tuple[Tensor, list[str]]:
    count = max(*settings.batches, CALIBRATION_BATCH * CALIBRATION_PASSES)
    loaded, names = photos.load(settings.images, count)
    return photos.batch(loaded, count, seed=settings.seed), names


def _setup(
    network: Network, case: Case, settings: Settings, pictures: Tensor, scratch: Path
) -> Setup:
    return Setup(
        name=network.name,
        model=network.model,
        example=pictures[: case.batch],
        dtype=PRECISIONS[case.dtype],
        device=settings.device,
        threads=settings.threads,
        scratch=scratch,
    )
