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
CONTRACT = HERE.parents[1] / "ops/test_contract.py"
TRAINING = HERE.parents[1] / "ops/test_training_ops.py"


def interpreted(*arguments: str | Path) -> int:
    """Run pytest with these arguments; return how many tests passed, none skipped."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *arguments]
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(CONTRACT.parent), *sys.path]),
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert "skipped" not in done.stdout
    return int(passed[1])


def test_every_path_of_the_kernels():
    assert interpreted(HERE / "interpreted.py") > 150


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
    assert interpreted(CONTRACT, "-k", f"triton and ({tests})") >= least
