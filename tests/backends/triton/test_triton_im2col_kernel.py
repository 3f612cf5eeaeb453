"""The Gluon convolution: its own source on the host, and what it compiles to for sm_90.

In processes with the Triton that `make test` puts beside the pinned one, or with the installed one
where that has im2col descriptors.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import gluon_on_host
import pytest
import torch
from compiling import NEWER_TRITON, compiled, compilers

from resnet_fused.backends.triton import im2col
from resnet_fused.backends.triton.cost import shared_bytes
from resnet_fused.backends.triton.shapes import Config, Problem
from resnet_fused.inspection import convolutions

sys.path.append(str(Path(__file__).parents[2] / "ops"))  # formulas
from paths import IM2COL_PATHS, arguments, each_half, each_im2col_path

triton = pytest.importorskip("triton")
PACKAGES = NEWER_TRITON if NEWER_TRITON.exists() else None
if im2col.missing() and PACKAGES is None:
    pytest.skip(f"{im2col.missing()}, and {NEWER_TRITON} is not there", allow_module_level=True)

ODD = [
    (Problem(64, 14, 14, 8, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1), torch.float16),
    (Problem(8, 28, 28, 40, 264, (5, 5), (1, 1), (2, 2), (1, 1), 1), torch.bfloat16),
    (Problem(1, 7, 7, 512, 512, (3, 3), (1, 1), (1, 1), (1, 1), 1, True), torch.float16),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def pool(cache):
    with compilers(cache, PACKAGES) as pool:
        yield pool


def of_path(path: str) -> tuple:
    shape, config = IM2COL_PATHS[path]
    x, weight, *_, residual, stride, padding, dilation, groups, _ = arguments(*shape)
    geometry = (stride, padding, dilation, groups)
    problem = Problem.of(x.shape, weight.shape, *geometry, residual is not None)
    return problem, torch.float16, Config.parse(config)


def cases() -> list[tuple]:
    """Every candidate for ResNet-50's convolutions, ResNet-34's with a residual, and odd ones."""
    found = [p for p in convolutions("resnet34", 256, torch.bfloat16) if p.residual]
    found += convolutions("resnet50", 256, torch.bfloat16)
    every = (*((p, torch.bfloat16) for p in found), *ODD)
    candidates = [(p, dtype, c) for p, dtype in every for c in im2col.candidates(p, "bf16", 90)]
    return [*candidates, *map(of_path, IM2COL_PATHS)]


@pytest.fixture(scope="module")
def kernels(pool) -> list[tuple]:
    running = [(p, c, pool.submit(compiled, p, dtype, c, 90)) for p, dtype, c in cases()]
    return [(p, c, *f.result()) for p, c, f in running]


@pytest.fixture(scope="module")
def cubins(kernels, cache) -> list[Path]:
    """The kernels in the compiler's cache."""
    return sorted(cache.rglob("conv_im2col_fwd_kernel.cubin"))


@pytest.mark.parametrize("eager", [True, False], ids=["early loads", "late loads"])
@each_half
@each_im2col_path
def test_its_source_is_right_on_the_host(pool, path, dtype, eager):
    pool.submit(gluon_on_host.check, path, dtype, 2, eager).result()


def test_nothing_spills_and_everything_fits(kernels):
    assert len(kernels) > 30
    for p, config, made in kernels:
        name = f"{p} {config}: {made}"
        assert made.kernel == "conv_im2col_fwd_kernel", name
        assert made.spilled == 0, name
        assert made.registers <= 255, name
        assert made.shared <= shared_bytes(p, "bf16", config, 90), name


def test_products_are_wgmma_and_operands_come_by_tma(kernels):
    for p, config, made in kernels:
        assert made.instruction == "wgmma", f"{p} {config}: {made}"
        assert made.loads["im2col"] > 0, f"{p} {config}: {made}"
        assert made.loads["tma"] >= made.loads["im2col"] + p.residual
        # Scale and shift alone are loaded by threads.
        assert set(made.loads) == {"im2col", "tma", "load 4"}, f"{p} {config}: {made}"


def test_the_machine_code_gathers_windows_and_products_stay_under_way(cubins):
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass"]
    for cubin in cubins[::8]:
        shown = subprocess.run([*command, cubin], capture_output=True, text=True, check=True)
        assert "UTMALDG.4D.IM2COL" in shown.stdout
        # Where the compiler has to wait for each product (its C7510), each ends a group.
        products = re.findall(r"HGMMA[^;]*", shown.stdout)
        assert sum("gsb0" in product for product in products) == 1


def test_warps_wait_for_each_other_before_a_slot_is_filled_again(cubins):
    assert len(cubins) > 20
    for cubin in cubins:
        ptx = cubin.with_suffix(".ptx").read_text()
        (between,) = re.findall(r"wgmma\.wait_group\.sync\.aligned 1;(.*?)expect_tx", ptx, re.S)
        assert "bar.sync" in between


def names(x, weight) -> list[str]:
    from resnet_fused.backends.triton import run

    return list(run.conv_candidates(x, weight, None, None, None, (1, 1), (1, 1), (1, 1), 1, "relu"))


def test_the_tuner_measures_them_after_the_others(pool):
    x = torch.empty(2, 64, 14, 14, dtype=torch.bfloat16)
    found = pool.submit(names, x, torch.empty(64, 64, 3, 3, dtype=torch.bfloat16)).result()
    gathered = [name.endswith("-im2col") for name in found]
    assert gathered == sorted(gathered)
    assert sum(gathered) == im2col.MOST_CANDIDATES


def test_inspect_shows_them(tmp_path):
    path = os.pathsep.join([str(PACKAGES), *sys.path] if PACKAGES else sys.path)
    env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path), "COLUMNS": "140"}
    env.pop("TRITON_INTERPRET", None)
    words = ["inspect", "--shape", "1,64,4,4,64,3,1", "--arch", "90", "--dtype", "bf16", "--all"]
    shown = subprocess.run(
        [sys.executable, "-m", "resnet_fused", *words], capture_output=True, text=True, env=env
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    rows = [line for line in shown.stdout.splitlines() if "-im2col" in line]
    assert len(rows) >= 1
    assert all("wgmma" in row and "im2col, load 4, tma" in row for row in rows)
    assert "0 of" in shown.stdout
