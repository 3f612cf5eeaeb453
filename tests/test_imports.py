"""Importing the package is free: nothing is compiled, started, looked for or changed."""

import json
import subprocess
import sys

import pytest

PROBE = """
import json, os, sys
before = dict(os.environ)
import torch, torch.utils.flop_counter  # torch's own counter loads Triton where there is one
threads = torch.get_num_threads()
loaded = set(sys.modules)
import {module}
print(json.dumps({{
    "new": sorted(set(sys.modules) - loaded),
    "environment": before == dict(os.environ),
    "cuda": torch.cuda.is_initialized(),
    "threads": threads == torch.get_num_threads(),
    "compiled": "torch._inductor" in set(sys.modules) - loaded,
}}))
"""

#: Optional packages, and those that only the command line needs.
NOT_NEEDED = {
    *("torchvision", "timm", "transformers", "matplotlib", "sklearn", "PIL"),
    *("typer", "rich", "triton", "onnx", "onnxruntime", "openvino", "hypothesis", "pytest"),
}


@pytest.mark.parametrize(
    "module",
    ["resnet_fused", *(f"resnet_fused.{m}" for m in ("models", "testing", "flops", "roofline"))],
)
def test_import_is_free(module):
    probe = PROBE.format(module=module)
    command = [sys.executable, "-W", "error::DeprecationWarning:resnet_fused", "-c", probe]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    found = json.loads(run.stdout)
    assert not NOT_NEEDED & {name.split(".")[0] for name in found["new"]}
    assert found["environment"], "the environment was changed"
    assert not found["cuda"], "CUDA was initialised"
    assert found["threads"], "the number of threads was changed"
    assert not found["compiled"], "the compiler was loaded"


def test_public_names_are_there():
    import resnet_fused as rf

    assert rf.__version__
    assert all(hasattr(rf, name) for name in rf.__all__)
    assert rf.__all__ == sorted(rf.__all__)
