"""What a run of the suite measures: its settings, and the cases they come to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import bn, convolutions, epoch, subjects, training
from benchmarks.cold import STARTS
from benchmarks.graphs import can_capture, captured
from resnet_fused.bench import measure, timing
from resnet_fused.bench.contenders import Build
from resnet_fused.bench.options import BATCHES, Settings, UsageError, default_dtypes, one_of
from resnet_fused.bench.peers import NO_PEERS, PEERS, absence, usable_peers
from resnet_fused.bench.results import (
    BLOCK,
    COLD,
    CONVOLUTION,
    EPOCH,
    INFERENCE,
    LEVELS,
    OP,
    PASS,
    TRAINING,
    Case,
)
from resnet_fused.bench.timing import FED, HOT

#: Peers that take part unless others are asked for. At the levels of single layers only those
#: that need no compilation of their own: there are some forty layers.
DEFAULT_PEERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "cpu": {
        **dict.fromkeys((OP, BLOCK), ("eager-nchw",)),
        **dict.fromkeys((INFERENCE, COLD), ("inductor", "onnxruntime", "openvino", "eager-nchw")),
        TRAINING: ("inductor-default", "eager-nchw"),
        EPOCH: (),
    },
    "cuda": {
        **dict.fromkeys((OP, BLOCK), ("cudnn", "eager-nchw")),
        **dict.fromkeys((INFERENCE, COLD), ("inductor", "cudnn", "eager-nchw")),
        TRAINING: ("inductor-default",),
        EPOCH: (),
    },
}
#: Seconds of timing per contender and case, unless others are asked for; of epochs, which are
#: counted, what they should take. A GPU makes the rounds that decide in fewer.
SECONDS: Mapping[str, Mapping[str, float]] = {
    "cpu": {
        OP: 0.5, BLOCK: 0.5, INFERENCE: 3.0, COLD: 0.0, TRAINING: 5.0, EPOCH: 6.0, PASS: 0.5,
        CONVOLUTION: 0.5,
    },
    "cuda": {OP: 0.3, BLOCK: 0.3, INFERENCE: 1.0, COLD: 0.0, TRAINING: 2.0, EPOCH: 6.0},
}  # fmt: skip
#: Unless others are asked for. In a model a layer's input has just been written, as far as a cache
#: holds it, and its weights have been pushed out by those of the other layers.
CACHES: Mapping[str, str] = {
    **dict.fromkeys(LEVELS, HOT), **dict.fromkeys((OP, BLOCK, CONVOLUTION), FED),
}  # fmt: skip


#: What `all` measures.
ALL = (OP, BLOCK, INFERENCE, COLD, TRAINING, EPOCH)
#: On a GPU `models`, `training` and the default suite, `all`, are each planned to end within
#: so many seconds, unless asked for something else; :func:`usual` says what they measure.
DEFAULT_SUITE_S = 600.0
#: Seconds that are planned for building and checking a contender in a case, for each compilation by
#: Inductor (in training forward and backward are one each), for a cold start, and for the peaks.
#: Allowances from single readings on an H200 with 16 cores, where eager torch tries cuDNN's kernels
#: for ten seconds before its first step, and Triton compiles for as long; Inductor's are a guess.
BUILD_S: Mapping[str, float] = {
    OP: 1.5, BLOCK: 1.5, INFERENCE: 5.0, TRAINING: 12.0, EPOCH: 3.0, PASS: 1.5, CONVOLUTION: 1.5,
}  # fmt: skip
COMPILE_S, START_S, PEAKS_S = 45.0, 12.0, 15.0


@dataclass(frozen=True)
class Usual:
    """What a command measures unless it is asked for something else; None: as any command does."""

    levels: tuple[str, ...]
    peers: Mapping[str, tuple[str, ...]]
    models: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    #: Of ops and blocks.
    layer_batches: tuple[int, ...] | None = None


def usual(levels: tuple[str, ...], device: str) -> Usual:
    """Return what a command for these levels measures on a device unless asked otherwise."""
    if device != "cuda":
        return Usual(levels, DEFAULT_PEERS[device])
    # Another dtype takes START_S and COMPILE_S for each model again.
    within = tuple(level for level in levels if level != COLD) or levels
    every = Usual(within, DEFAULT_PEERS[device], dtypes=default_dtypes(device)[-1:])
    if levels != ALL:
        return every
    return replace(
        every,
        peers={**every.peers, **dict.fromkeys((OP, BLOCK), ("cudnn",))},
        models=("resnet50",),
        batches=BATCHES[device],
        layer_batches=BATCHES[device][-1:],
    )


@dataclass(frozen=True)
class Suite:
    """Everything a run needs to know, each value already checked."""

    settings: Settings
    levels: tuple[str, ...]
    #: By level.
    peers: Mapping[str, tuple[str, ...]]
    image_size: int
    #: What a call finds in the caches, by level.
    caches: Mapping[str, str]
    #: Whether every contender runs as a CUDA graph, but for epochs, and training in float16; in a
    #: cold start `frozen` alone, which records its own. False: none does, `frozen` neither.
    graphs: bool
    #: Seconds that the rounds of a case may take per contender, by level.
    seconds: Mapping[str, float]
    #: Seconds after which a case is given up.
    limit: float
    #: Seconds after which no other case is begun; None for all of them.
    budget: float | None = None
    #: Batch sizes of ops and blocks, where not those of the settings.
    layer_batches: tuple[int, ...] | None = None

    def contenders(self, case: Case) -> dict[str, Callable[..., Any]]:
        """Return who takes part in a case, the reference first."""
        if case.level in (TRAINING, EPOCH):
            return dict(training.contenders(self.peers[case.level]))
        if case.level == PASS:
            return dict(bn.contenders(case.layer))
        if case.level == CONVOLUTION:
            return dict(convolutions.CONTENDERS)
        builds = measure.contenders(self.peers[case.level])
        return {name: self.prepared(case, build) for name, build in builds.items()}

    def prepared(self, case: Case, build: Build) -> Build:
        """Return a contender as the suite runs it: captured, where graphs were asked for."""
        return captured(build) if self.graphs and can_capture(case) else build

    @property
    def starts(self) -> int:
        """Return how often each contender of a cold start is started."""
        return self.settings.rounds or STARTS

    def limit_of(self, case: Case) -> float:
        """Return the seconds after which a case is given up: of a cold start, all turns of it."""
        return self.limit * (self.starts if case.level == COLD else 1)

    def rounds(self, case: Case) -> timing.Rounds:
        """Return how many rounds a case has: those asked for, or what fits into its seconds."""
        asked = epoch.epochs(self.settings) if case.level == EPOCH else self.settings.rounds
        if asked:
            return timing.Rounds(asked, asked)
        return timing.Rounds(seconds=self.seconds[case.level] * len(self.contenders(case)))


def plan(suite: Suite) -> list[Case]:
    """Return all cases, from the smallest parts to whole models."""
    return [case for level in suite.levels for case in _of_level(level, suite)]


def planned_seconds(suite: Suite) -> float:
    """Return what the cases should take at most: their timing, and the allowances of the rest."""
    return PEAKS_S + sum(planned(suite, case) for case in plan(suite))


def planned(suite: Suite, case: Case) -> float:
    """Return the seconds that a case should take."""
    names = list(suite.contenders(case))
    compiling = COMPILE_S * sum(name.startswith("inductor") for name in names)
    if case.level == COLD:
        return suite.starts * (START_S * len(names) + compiling)
    passes = 2 if case.level in (TRAINING, EPOCH) else 1
    each = suite.seconds[case.level] + BUILD_S[case.level]
    return each * len(names) + passes * compiling


def peers_by_level(
    option: str, asked: list[str], device: str, usually: Usual | None = None
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Return the peers of each level, and why those that might have been there are not.

    `["all"]`, and `[]` for those that a command usually has or else the default ones, take what is
    installed; a peer asked for by its own name must be, and must run something of the command's.

    Raises:
        UsageError: a peer that is unknown or, asked for by name, cannot take part.
    """
    if asked == ["none"]:
        return dict.fromkeys(DEFAULT_PEERS[device], ()), {}
    if asked and asked != ["all"]:
        for name in asked:
            if name in NO_PEERS:
                break  # refused with its reason
            one_of(option, name, [*PEERS, "all", "none"])
            if name not in PEERS:
                raise UsageError(f"{option}: {name!r} stands alone, without other names")
            if device not in PEERS[name].devices:
                raise UsageError(f"{option}: {name} {_why_not(name, device)}")
            if usually and {*usually.levels} <= {TRAINING, EPOCH} and name not in training.PEERS:
                able = ", ".join(training.PEERS)
                raise UsageError(f"{option}: {name} runs inference only; accepted: {able}")
        usable = dict.fromkeys(DEFAULT_PEERS[device], usable_peers(option, asked))
        return usable, _inference_only(asked, usually)
    every = dict.fromkeys(DEFAULT_PEERS[device], tuple(PEERS))
    default = usually.peers if usually else DEFAULT_PEERS[device]
    wanted = every if asked else default
    missing = {name: why for name in PEERS if (why := _why_not(name, device))}
    if device == "cuda":
        missing |= NO_PEERS
    usable = {
        level: tuple(name for name in names if name not in missing)
        for level, names in wanted.items()
    }
    everybody = [name for name in PEERS if asked and name not in missing]
    return usable, missing | _inference_only(everybody, usually)


def _inference_only(names: Sequence[str], usually: Usual | None) -> dict[str, str]:
    """Return which of the names the training of a command goes without, and why."""
    if usually is None or not {TRAINING, EPOCH} & {*usually.levels}:
        return {}
    return {name: "in training: runs inference only" for name in names
            if name not in training.PEERS}  # fmt: skip


def _why_not(name: str, device: str) -> str | None:
    if device not in PEERS[name].devices:
        return f"runs on {', '.join(PEERS[name].devices)} only"
    return absence(name)


def _of_level(level: str, suite: Suite) -> list[Case]:
    asked = suite.settings
    batches = asked.batches
    if level == COLD:
        batches = batches[:1]
    if level == TRAINING:  # one image has no statistics to speak of
        batches = tuple(size for size in batches if size > 1) or batches
    if level == EPOCH:
        return [Case(epoch.MODEL, dtype, epoch.BATCH, level) for dtype in asked.dtypes]
    found = _layers(level, suite)
    if found is None:
        return [
            Case(model, dtype, batch, level)
            for model in asked.models
            for dtype in asked.dtypes
            for batch in batches
        ]
    if level in (OP, BLOCK):
        batches = suite.layer_batches or batches
    return [
        Case("", dtype, batch, level, layer)
        for dtype in asked.dtypes
        for batch in batches
        for layer in found
    ]


def _layers(level: str, suite: Suite) -> Collection[str] | None:
    """Return the names of what is measured of a level, None where it is whole models."""
    if level == PASS:
        return bn.layers()
    if level == CONVOLUTION:
        return convolutions.layers(suite.settings.models)
    if level in (OP, BLOCK):
        return subjects.layers(level, suite.settings.models, suite.image_size)
    return None
