"""An extension that is broken or was built from other sources: no crash, and words that help."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from test_build import ROOT

from resnet_fused.backends import native

sys.path.append(str(ROOT / "csrc"))
import build_plan

#: Of what the functions are called and take. With another, `native.INTERFACE` and the number in
#: csrc/bindings.cpp are one more.
SIGNATURES = {15: "cad446f3d7a1e73a"}

STUB = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", 0, -1, 0, 0, 0, 0, 0};
PyMODINIT_FUNC PyInit__C(void) {
  PyObject* m = PyModule_Create(&definition);
  %s
  return m;
}
"""
RAISES = 'PyErr_SetString(PyExc_RuntimeError, "no such luck"); return 0;'
OLDER = 'PyModule_AddIntConstant(m, "interface", 0);'


def run(package: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=package, env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the package in it, but for its extension."""
    (tmp_path / "resnet_fused").mkdir()
    for path in Path(native.__file__).parents[1].iterdir():
        if not path.name.startswith("_C"):
            (tmp_path / "resnet_fused" / path.name).symlink_to(path)
    return tmp_path


CALL = (
    "import torch, resnet_fused as rf\n"
    "from resnet_fused.backends import native\n"
    "assert rf.functional.add_relu(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3)).sum() == 36\n"
    "print(native.load_error())\n"
)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (RAISES, "its import raised RuntimeError: no such luck; rebuild it"),
        (OLDER, "it was built from other sources (interface 0, needed {}): rebuild it"),
        ("", "it was built from other sources (interface None, needed {}): rebuild it"),
    ],
)
def test_an_extension_that_does_not_fit(package, body, words):
    if fault := build_plan.cxx_fault():
        pytest.skip(fault)
    (package / "stub.cpp").write_text(STUB % body)
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX"))
    place = package / "resnet_fused" / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    command = [*compiler, "-shared", "-fPIC", *build_plan.includes(), "stub.cpp", "-o", str(place)]
    subprocess.run(command, cwd=package, check=True)
    assert run(package, "-c", CALL).strip() == words.format(native.INTERFACE)
    said = re.sub(r"\s+", " ", run(package, "-m", "resnet_fused", "doctor"))
    assert words.format(native.INTERFACE) in said


def test_an_extension_that_is_no_library(package):
    place = package / "resnet_fused" / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    place.write_bytes(b"nothing" * 99)
    assert "invalid ELF header" in run(package, "-c", CALL)
    assert "rebuild it with" in run(package, "-m", "resnet_fused", "doctor")


def test_the_interface_is_numbered_anew_with_its_signatures():
    extension = native.extension()
    if extension is None:
        pytest.skip(f"not built: {native.load_error()}")
    functions = filter(callable, (getattr(extension, name) for name in sorted(dir(extension))))
    lines = [function.__doc__.splitlines()[0] for function in functions if function.__doc__]
    lines = [line for line in lines if "->" in line]
    taken = [line.partition("(")[0] + str(re.findall(r"(\w+): ", line)) for line in lines]
    digest = hashlib.sha256("\n".join(taken).encode()).hexdigest()[:16]
    assert {native.INTERFACE: digest} == SIGNATURES
