"""What CUTLASS makes of the Hopper convolution: corners, its word on shapes, machine code."""

import ctypes
import importlib.util
import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_build import ROOT
from test_build_cuda import cuobjdump, kernels

sys.path.append(str(ROOT / "csrc"))
import build_plan

# --- sizes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def describe(tmp_path_factory):
    """``describe`` of ``native/hopper_problem.cu``: sizes in, a list of numbers out."""
    pytest.importorskip("setuptools")
    tools = build_plan.find_tools(os.environ)
    for tool in tools:
        if isinstance(tool, str):
            pytest.skip(tool)
    plan = build_plan.decide({"TORCH_CUDA_ARCH_LIST": "9.0a"}, tools)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    source, library = ROOT / "tests/native/hopper_problem.cu", tmp_path_factory.mktemp("hopper")
    flags = [*script.NVCC_FLAGS, *script.flags(plan, source.with_stem("hopper_problem_sm90"))]
    command = [tools.nvcc.path, *build_plan.host_compiler(), *flags, "-shared"]
    command += [str(source), "-o", str(library / "hopper.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    function = ctypes.CDLL(str(library / "hopper.so")).describe

    def describe(*sizes: int) -> list[int]:
        out = (ctypes.c_int64 * 10)()
        function((ctypes.c_int64 * 14)(*sizes), out)
        return list(out)

    return describe


def test_sizes_and_corners_are_those_of_the_convolution(describe):
    """Stride, padding and dilation on their own side, and the output as torch has it."""
    sides = itertools.product([(9, 12), (7, 7)], [(1, 1), (3, 3), (2, 5)], [(1, 1), (3, 2)])
    for (image, kernel, stride), padding, dilation in itertools.product(
        sides, [(0, 0), (1, 2)], [(1, 1), (2, 1)]
    ):
        x, weight = torch.empty(2, 8, *image), torch.empty(16, 8, *kernel)
        y = F.conv2d(x, weight, None, stride, padding, dilation)
        out = describe(2, *image, 8, 16, *kernel, *stride, *padding, *dilation, 1)
        assert out[:4] == [2, *y.shape[2:], 16]
        upper = [p - d * (k - 1) for p, d, k in zip(padding, dilation, kernel, strict=True)]
        assert out[4:8] == [-padding[1], -padding[0], upper[1], upper[0]]
        assert out[8:] == [True, False]


def test_what_cutlass_refuses_we_have_words_for(describe):
    """At every limit it knows and one beyond; a stride is TMA's limit, which it does not ask."""

    def around(c=8, o=8, k=1, p=0, d=1, s=1, groups=1, side=300):
        """(what CUTLASS implements, whether we refuse), along either side."""
        for along in (0, 1):
            pairs = [(v, least) if along else (least, v) for v, least in ((k, 1), (s, 1), (p, 0))]
            (kh, kw), (sh, sw), (ph, pw) = pairs
            out = describe(1, side, side, c, o, kh, kw, sh, sw, ph, pw, d, d, groups)
            yield tuple(out[8:])

    taken = [{}, {"p": 127}, {"k": 2, "p": 128}, {"k": 129}, {"k": 2, "d": 128}]
    taken += [{"k": 255, "p": 126}, {"s": 8}]
    refused = [{"c": 12}, {"o": 12}, {"groups": 2}, {"p": 128}, {"k": 2, "p": 129}, {"k": 130}]
    refused += [{"k": 2, "d": 129}, {"k": 256, "p": 128}]
    for case in taken:
        assert set(around(**case)) == {(True, False)}, case
    for case in refused:
        assert set(around(**case)) == {(False, True)}, case
    assert set(around(s=9)) == {(True, True)}


# --- machine code --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hopper():
    """The built extension's kernels."""
    module = kernels().cuda
    if not hasattr(module, "conv_bn_act"):
        pytest.skip("built without CUTLASS's headers, or not for sm_90a")
    return module


@pytest.fixture(scope="module")
def functions(hopper) -> dict[str, str]:
    """The machine code of each kernel by CUTLASS, by its mangled name."""
    parts = cuobjdump("-sass", "-arch", "sm_90a").split("Function : ")[1:]
    return {part.split()[0]: part for part in parts if "cutlass" in part.split()[0]}


def test_there_is_one_of_each_tile_and_dtype(hopper, functions):
    assert len(functions) == 2 * len(hopper.conv_bn_act_kernels())


def test_they_multiply_by_wgmma_and_fetch_by_tma(functions):
    for name, code in functions.items():
        assert re.search(r"HGMMA\.64x(64|128|256)x16\.F32", code), name
        for instruction in ("UTMALDG", "UTMASTG"):
            assert re.search(rf"{instruction}\.4D\.IM2COL", code) or "Gemm" in name, name
            assert instruction in code, name


def test_products_are_not_waited_for_one_by_one(functions):
    """Where ptxas says C7510 it ends a group of wgmma (gsb0) behind each."""
    for name, code in functions.items():
        products = re.findall(r"HGMMA\..*", code)
        waited = [p for p in products if "gsb0" in p]
        assert 0 < len(waited) <= len(products) / 4, name


def test_their_relu_keeps_nan(functions):
    for name, code in functions.items():
        assert "FMNMX.NAN" in code, name
        assert not re.search(r"FMNMX(?!\.NAN)", code), name


def test_nothing_spills(functions):
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", cuobjdump("-res-usage"))
    stacks = {name: stack for name, _, stack in usage if name in functions}
    assert stacks == dict.fromkeys(functions, "0")


def test_without_a_driver_a_call_raises_in_its_words(hopper):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    x = torch.zeros(3, 1024, dtype=torch.float16)
    maps = [x[0].data_ptr(), x[1].data_ptr(), 0, 0, 0, x[2].data_ptr(), 0, 0]
    geometry = (1, 4, 4, 8, 8, 1, 1, 1, 1, 0, 0, 1, 1, 1)
    for name, *_ in hopper.conv_bn_act_kernels():
        with pytest.raises(RuntimeError, match=re.escape(hopper.fault())):
            hopper.conv_bn_act(*maps, "float16", name, *geometry, True, 0)
