"""The examples run as they stand."""

import contextlib
import io
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
EXPECTED = {
    "fine_tune_frozen_bn": "step 4: loss",
    "freeze_for_serving": "batch 3: classes",
    "timm_and_transformers": "53 fused, 0 left alone",
    "torchvision_resnet": "fused 53 of 53 convolutions",
}


def test_each_has_an_expectation():
    assert [path.stem for path in EXAMPLES] == sorted(EXPECTED)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(path, torchvision, request):
    if "timm" in path.stem:
        request.getfixturevalue("timm"), request.getfixturevalue("transformers")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.random.fork_rng([]):
        runpy.run_path(str(path))
    assert EXPECTED[path.stem] in printed.getvalue()


def test_fine_tuning_lowers_the_loss(torchvision):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES[0].parent / "fine_tune_frozen_bn.py"))
    losses = [float(line.rpartition(" ")[2]) for line in printed.getvalue().splitlines()]
    assert losses[-1] < losses[0]
