"""Runs the kernels in Triton's interpreter, which has to be asked for before torch is loaded."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")

if triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("Triton 3.6's interpreter needs NumPy before 2.4", allow_module_level=True)

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
CONTRACT = TESTS / "ops/test_contract.py"
TRAINING = TESTS / "ops/test_training_ops.py"


def interpreted(*arguments: str | Path) -> int:
    """Run pytest with these arguments; return how many tests passed, none skipped."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    command += ["-p", "checked_memory", *map(str, arguments)]
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(CONTRACT.parent), str(HERE), *sys.path]),
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert "skipped" not in done.stdout
    return int(passed[1])


@pytest.mark.parametrize(("tests", "least"), [("interpreted", 150), ("interpreted_pair", 35)])
def test_every_path_of_the_kernels(tests, least):
    assert interpreted(HERE / f"{tests}.py") > least


def test_the_stem_and_the_head():
    assert interpreted(HERE / "interpreted_ends.py") > 40


def test_the_ops_of_training():
    """All of interpreted_training.py, and what the ops' own tests hold every backend to."""
    chosen = "interpreted_training or triton and (chain and bfloat16 or far_from_zero)"
    assert interpreted(HERE / "interpreted_training.py", TRAINING, "-k", chosen) > 45


@pytest.mark.parametrize(
    ("tests", "least"),
    [
        ("runs_some or (test_result and bfloat16)", 6),
        ("test_layouts and float16 and not bfloat16 and not one_argument", 15),
    ],
)
def test_the_contract_of_the_ops(tests, least):
    # The stem's samples take half a minute here: interpreted_ends.py has smaller ones.
    assert interpreted(CONTRACT, "-k", f"triton and not max_pool and ({tests})") >= least
