"""One case of any level, measured in this process: the functions that the worker calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import resnet_fused as rf
from benchmarks import bn, cold, convolutions, epoch, subjects, training
from benchmarks.peaks import Peaks
from benchmarks.suite import Suite
from resnet_fused.bench import measure, networks, photos, timing
from resnet_fused.bench.contenders import Setup
from resnet_fused.bench.networks import CALIBRATION_BATCH, CALIBRATION_PASSES, Network
from resnet_fused.bench.options import PRECISIONS
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import (
    BLOCK,
    COLD,
    CONVOLUTION,
    EPOCH,
    OP,
    PASS,
    TRAINING,
    Case,
    Row,
)


class Prepared(NamedTuple):
    """What a case runs: the network with its known answers, and who runs it."""

    network: Network
    setup: Setup
    contenders: dict[str, Callable[..., Any]]
    uses: dict[str, int]


def run_case(
    suite: Suite,
    case: Case,
    names: tuple[str, ...],
    peaks: dict[str, Any] | None,
    scratch: Path,
    *,
    watch: Watch,
) -> list[Row]:
    """Return the rows of the named contenders in a case, with the bound that the peaks give."""
    torch.set_num_threads(suite.settings.threads)
    with rf.use_backend(suite.settings.backend):
        if case.level in _ALONE:
            builds = suite.contenders(case)
            method = _method(suite, case, {name: builds[name] for name in names})
            return _ALONE[case.level](suite, case, method, peaks, watch)
        watch.doing(f"{case}: weights, float64 answers")
        network, setup, contenders, uses = prepare(suite, case, scratch)
        if case.level == COLD:
            return cold.run_case(network, case, setup, names, suite, watch)
        method = _method(suite, case, {name: contenders[name] for name in names})
        if case.level == TRAINING:
            return training.run_case(network, case, setup, method, watch)
        rows = measure.run_case(network, case, setup, method, watch)
        bounded = _bounded(rows, network, setup, peaks)
        return [replace(row, uses=uses) for row in bounded]


def _pass(
    suite: Suite, case: Case, method: measure.Method, peaks: dict[str, Any] | None, watch: Watch
) -> list[Row]:
    return bn.run_case(case, method, peaks["bandwidth"] if peaks else None, watch)


def _convolution(
    suite: Suite, case: Case, method: measure.Method, peaks: dict[str, Any] | None, watch: Watch
) -> list[Row]:
    layer = convolutions.layers(suite.settings.models)[case.layer]
    return convolutions.run_case(case, layer, method, watch)


def _epoch(
    suite: Suite, case: Case, method: measure.Method, peaks: dict[str, Any] | None, watch: Watch
) -> list[Row]:
    return epoch.run_case(case, suite.settings, method, watch)


#: By level, who runs what needs no model of those asked for.
_ALONE = {PASS: _pass, CONVOLUTION: _convolution, EPOCH: _epoch}


def prepare(suite: Suite, case: Case, scratch: Path) -> Prepared:
    """Return what a case needs before anything of it is measured."""
    asked, contenders, uses = suite.settings, suite.contenders(case), {}
    if case.level in (OP, BLOCK):
        layer = subjects.layers(case.level, asked.models, suite.image_size)[case.layer]
        network, example = subjects.network(case.layer, layer, case.batch, asked.seed)
        own = layer.contenders.items()
        contenders |= {n: suite.prepared(case, b) for n, b in own if n in contenders}
        uses = layer.uses
    else:
        network, pictures = model(suite, case.model)
        example = pictures[: case.batch]
    setup = Setup(
        name=network.name,
        model=network.model,
        example=example,
        dtype=PRECISIONS[case.dtype],
        device=asked.device,
        threads=asked.threads,
        scratch=scratch,
        graphs=suite.graphs,
    )
    return Prepared(network, setup, contenders, uses)


def model(suite: Suite, name: str) -> tuple[Network, Tensor]:
    """Return a calibrated model, kept from case to case, and photographs for any batch."""
    asked = suite.settings
    count = max(*asked.batches, CALIBRATION_BATCH * CALIBRATION_PASSES)
    pictures = _pictures(asked.images, count, suite.image_size, asked.seed)
    return _network(name, pictures, asked.seed), pictures


@functools.lru_cache(maxsize=1)
def _pictures(images: Path | None, count: int, size: int, seed: int) -> Tensor:
    loaded, _ = photos.load(images, count)
    return photos.batch(loaded, count, seed=seed, crop=size)


@functools.lru_cache(maxsize=1)
def _network(name: str, pictures: Tensor, seed: int) -> Network:
    return networks.build(name, pictures, seed=seed)


def _method(suite: Suite, case: Case, builds: Mapping[str, Callable[..., Any]]) -> measure.Method:
    caches = suite.caches[case.level]
    clock = timing.clock_for(suite.settings.device, emptied=caches != timing.HOT)
    rounds = functools.partial(suite.rounds, case)
    return measure.Method(builds, rounds, clock, caches)


def _bounded(
    rows: list[Row], network: Network, setup: Setup, peaks: dict[str, Any] | None
) -> list[Row]:
    if peaks is None or not rows:
        return rows
    found = Peaks(**peaks).schedule(network.model, tuple(setup.example.shape), rows[0].case.dtype)
    nbytes = sum(layer.nbytes for layer in found.layers)
    return [replace(row, nbytes=nbytes, bound_s=found.time) for row in rows]
