"""Cold starts: what the first image costs, from the import on, in a process of its own.

``python -m benchmarks.cold FILE CONTENDER FOLDER``, with an empty folder for exported files, is
that process; nothing but the standard library is imported before its clock runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.suite import Suite
    from resnet_fused.bench.contenders import Setup
    from resnet_fused.bench.networks import Network
    from resnet_fused.bench.progress import Watch
    from resnet_fused.bench.results import Case, Row

STAGES = ("import", "build", "first image")
#: Starts per contender, unless rounds were asked for: each takes seconds, a compiled one minutes.
#: Of fewer in two records even quite apart ones may be chance (`timing.CHANCE`).
STARTS = 4


def run_case(
    network: Network, case: Case, setup: Setup, names: tuple[str, ...], suite: Suite, watch: Watch
) -> list[Row]:
    """Return a row per contender; its seconds are the sum of the stages, import to first image.

    Loading the weights is left out: it is the same for all.
    """
    import torch

    from resnet_fused.bench.timing import rotated

    file = setup.scratch / "cold.pt"
    model = network.model.cpu()  # an engine may have moved it to a GPU
    torch.save((replace(network, model=model), replace(setup, model=model), case), file)
    rows: dict[str, list[Row]] = {name: [] for name in names}
    for turn in range(suite.starts):
        for name in rotated(names, turn):
            watch.doing(f"{case}: start {turn + 1} of {name}", contender=name)
            rows[name].append(_started(file, name, network, case, suite.settings.backend))
    return _with_spread(rows)


def _started(file: Path, name: str, network: Network, case: Case, backend: str) -> Row:
    """Start a process for a contender and return the row of this one start."""
    from resnet_fused.bench import measure
    from resnet_fused.bench.results import OK, SKIPPED, Row

    row = Row(case, name, OK, network.macs / 1e9, network.params / 1e6)
    with tempfile.TemporaryDirectory() as empty:
        # Compilers keep what they made for the next process, and exported files lie about for the
        # next contender; here each one is the first.
        changed = {"TORCHINDUCTOR_CACHE_DIR": empty, "TRITON_CACHE_DIR": empty}
        changed["RESNET_FUSED_BACKEND"] = backend
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.cold", str(file), name, empty],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **changed},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return replace(measure.failed(row, RuntimeError(last)), note=last)
    told = json.loads(done.stdout.splitlines()[-1])
    if told["declined"]:
        return replace(row, verdict=SKIPPED, note=told["declined"])
    row = replace(row, stages=told["stages"], seconds=[sum(told["stages"].values())])
    return measure.judged(row, told["error"], told["allowed"])


def _with_spread(starts: dict[str, list[Row]]) -> list[Row]:
    """Return a row per contender over its starts: the median of each stage, and all sums."""
    from resnet_fused.bench.measure import with_speed
    from resnet_fused.bench.results import OK
    from resnet_fused.bench.timing import spread

    rows, seconds = [], {}
    for name, of_one in starts.items():
        fault = next((row for row in of_one if row.verdict != OK), None)
        if fault:
            rows.append(replace(fault, seconds=[], stages={}))
            continue
        stages = {stage: spread([r.stages[stage] for r in of_one]).median for stage in STAGES}
        rows.append(replace(of_one[0], stages=stages))
        seconds[name] = [row.seconds[0] for row in of_one]
    return [with_speed(row, seconds) for row in rows]


def _start(file: str, name: str, scratch: str) -> dict[str, object]:
    """Be the process that starts: import, build, run once, then see whether it was right."""
    begin = time.perf_counter()
    import torch

    import resnet_fused  # noqa: F401

    imported = time.perf_counter()
    from resnet_fused.bench import accuracy, measure
    from resnet_fused.bench.contenders import REFERENCE
    from resnet_fused.bench.peers import PEERS

    network, setup, case = torch.load(file, weights_only=False)
    setup = replace(setup, scratch=Path(scratch))
    torch.set_num_threads(setup.threads)
    declined = PEERS[name].declines(setup.dtype, setup.device) if name in PEERS else None
    if declined:
        return {"declined": declined}
    builds = measure.contenders(tuple(PEERS))
    with measure.precision(case.dtype), torch.inference_mode():
        loaded = time.perf_counter()
        with torch.inference_mode(False):
            runner = builds[name](setup)
        built = time.perf_counter()
        output = runner.read(runner.run(runner.prepare(setup.example))).cpu()
        ended = time.perf_counter()
        errors = []
        for build in (builds[name], builds[REFERENCE]):
            with torch.inference_mode(False):
                again = runner if build is builds[name] else build(setup)
            check = accuracy.check_batch(network.checked, case.batch)
            answer = again.read(again.run(again.prepare(check)))
            errors.append(accuracy.relative_error(answer, network.answers))
    assert len(output) == case.batch
    stages = (imported - begin, built - loaded, ended - built)
    return {
        "declined": None,
        "stages": dict(zip(STAGES, stages, strict=True)),
        "error": errors[0],
        "allowed": accuracy.allowed_error(errors[1], setup.dtype, network.reduced),
    }


if __name__ == "__main__":
    print(json.dumps(_start(*sys.argv[1:])))
