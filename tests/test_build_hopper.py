"""The machine code that CUTLASS makes of the 1x1 convolution of Hopper."""

import re

import pytest
import torch
from test_build_cuda import cuobjdump, kernels


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
        assert re.search(r"HGMMA\.64x128x16\.F32", code), name
        for instruction in ("UTMALDG", "UTMASTG"):
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
    for name in hopper.conv_bn_act_kernels():
        with pytest.raises(RuntimeError, match=re.escape(hopper.fault())):
            hopper.conv_bn_act(*maps, "float16", name, 16, 8, 8, True, 0)
