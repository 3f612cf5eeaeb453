"""The build with CUDA: what is decided from what is here, and what the compiled kernels hold."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_build import ROOT, setup

from resnet_fused.backends import cuda, native

sys.path.append(str(ROOT / "csrc"))
import build_plan
from build_plan import Nvcc, Tools, decide

KNOWN = "75 80 86 89 90 90a 100 100a 100f 103 120 121"
NEW = Nvcc("/opt/cuda/bin/nvcc", (13, 0), frozenset(KNOWN.split()))
NO_NVCC = "no nvcc anywhere"
CUTLASS = Path("/opt/cutlass")
NO_CUTLASS = "no headers anywhere"


def plan(nvcc=NEW, cutlass=CUTLASS, **environment):
    return decide(environment, Tools(nvcc, cutlass))


# --- the decision --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{}, {"RESNET_FUSED_CUDA": "auto"}, {"RESNET_FUSED_CUDA": "1"}])
@pytest.mark.parametrize("cutlass", [CUTLASS, NO_CUTLASS])
def test_with_nvcc_the_kernels_are_built(mode, cutlass):
    found = plan(cutlass=cutlass, **mode)
    assert found.archs == ("80", "90a", "100+PTX")
    assert found.hopper == (("90a",) if cutlass == CUTLASS else ())
    assert str(found).startswith(
        "built resnet_fused._C with the CPU kernels and the CUDA kernels for "
        "sm_80, sm_90a, sm_100+PTX (nvcc 13.0)"
    )
    note = f"no Hopper 1x1 convolution: {NO_CUTLASS}"
    assert (note in str(found)) == (cutlass == NO_CUTLASS)
    assert ("the Hopper 1x1 convolution among them" in str(found)) == (cutlass == CUTLASS)


@pytest.mark.parametrize("cutlass", [CUTLASS, NO_CUTLASS])
def test_without_nvcc(cutlass):
    found = plan(NO_NVCC, cutlass)
    assert found.nvcc is None
    assert not found.hopper
    built = "built resnet_fused._C with the CPU kernels"
    assert str(found) == f"{built}; no CUDA kernels: {NO_NVCC}"
    with pytest.raises(SystemExit, match=rf"^RESNET_FUSED_CUDA=1: {NO_NVCC}$"):
        plan(NO_NVCC, cutlass, RESNET_FUSED_CUDA="1")


@pytest.mark.parametrize("nvcc", [NEW, NO_NVCC])
def test_switched_off(nvcc):
    found = plan(nvcc, RESNET_FUSED_CUDA="0", TORCH_CUDA_ARCH_LIST="nonsense")
    assert (found.nvcc, found.archs) == (None, ())
    assert "no CUDA kernels: RESNET_FUSED_CUDA=0" in str(found)


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("8.0;9.0a;10.0+PTX", ("80", "90a", "100+PTX")),
        ("8.0 8.6 8.6", ("80", "86")),
        (" 8.9+PTX; ", ("89+PTX",)),
        ("7.5 8.0 12.0+PTX", ("80", "120+PTX")),
        ("10.0f", ("100f",)),
        ("Ampere", ("80", "86+PTX")),
        ("Ada;Hopper 9.0a", ("89+PTX", "90+PTX", "90a")),
        ("Turing Blackwell", ("100", "103", "120", "121+PTX")),
        ("Ampere+Tegra Ada", ("89+PTX",)),  # what nvcc does not know of a name is left out
    ],
)
def test_architectures(text, archs):
    assert plan(TORCH_CUDA_ARCH_LIST=text).archs == archs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hopper", "'hopper' is not an architecture; expected numbers such as '8.0;9.0a;10.0"),
        ("native", "'native' would ask a GPU, which a build here never does; write its compute"),
        (" ", "' ' names no architecture; unset it to build for '8.0;9.0a;10.0+PTX'"),
        (";", "';' names no architecture"),
        ("8.0a", "nvcc 13.0 does not know '8.0a'"),
        ("8.0 8.6f", "nvcc 13.0 does not know '8.6f'"),
        ("9.0f", "does not know '9.0f'; it knows 8.0 8.6 8.9 9.0 9.0a 10.0 10.0a 10.0f 10.3"),
        ("Volta", "no kernels for 7.0+PTX, as they need 8.0; add one from 8.0 on"),
        ("8.0,9.0", "'8.0,9.0' is not an architecture"),
        ("8.0 sm_90", "'sm_90' is not an architecture"),
        ("8.0;9.0b", "'9.0b' is not an architecture"),
        ("8.0 14.0", "nvcc 13.0 does not know '14.0'; it knows 8.0 8.6 8.9 9.0 9.0a"),
        ("7.0 7.5", "no kernels for 7.5, as they need 8.0; add one from 8.0 on"),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "1"])
def test_wrong_architectures(text, words, mode):
    with pytest.raises(SystemExit, match=r"^TORCH_CUDA_ARCH_LIST") as raised:
        plan(RESNET_FUSED_CUDA=mode, TORCH_CUDA_ARCH_LIST=text)
    assert words in str(raised.value)


def test_the_hopper_1x1_convolution_needs_its_architecture():
    found = plan(TORCH_CUDA_ARCH_LIST="8.0 9.0")
    assert not found.hopper
    assert str(found).endswith("; no Hopper 1x1 convolution: 9.0a is not among them")


def test_an_older_nvcc_leaves_out_what_it_does_not_know():
    found = plan(Nvcc("nvcc", (12, 4), frozenset({"80", "90", "90a"})))
    assert found.archs == ("80", "90a")
    assert "no kernels for 10.0+PTX, which nvcc 12.4 does not know" in str(found)


def test_gencode():
    assert build_plan.gencode(("90a", "100+PTX")) == [
        "-gencode", "arch=compute_90a,code=sm_90a",
        "-gencode", "arch=compute_100,code=[sm_100,compute_100]",
    ]  # fmt: skip


# --- what is found -------------------------------------------------------------------------------


def fake_nvcc(folder: Path, version: str, fault: str = "") -> dict[str, str]:
    """The environment in which an nvcc of this version is found, which compiles nothing."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "nvcc"
    program.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        f'--version) echo "Cuda compilation tools, release {version}, V{version}.0";;\n'
        "--list-gpu-arch) echo compute_80; echo compute_90;;\n"
        "--help) echo \"Allowed values: 'compute_80','compute_90','compute_90a','sm_90a'.\";;\n"
        f'*) echo "{fault}" >&2; exit 1;;\nesac\n'
    )
    program.chmod(0o755)
    return {"CUDA_HOME": str(folder)}


def test_an_nvcc_that_is_too_old(tmp_path):
    found = fake_nvcc(tmp_path, "11.8")
    done = setup("--version", RESNET_FUSED_CUDA="1", **found)
    assert done.returncode != 0
    assert done.stderr.strip() == (
        f"RESNET_FUSED_CUDA=1: nvcc 11.8 at {tmp_path}/bin/nvcc is too old; "
        "install 12.0 or later, or set CUDA_HOME to it"
    )
    assert setup("--version", RESNET_FUSED_CUDA="auto", **found).returncode == 0


def test_a_wrong_architecture_is_refused_by_setup(tmp_path):
    done = setup("--version", TORCH_CUDA_ARCH_LIST="volta", **fake_nvcc(tmp_path, "13.0"))
    assert done.returncode != 0
    assert done.stderr.startswith("TORCH_CUDA_ARCH_LIST: 'volta' is not an architecture")


def test_cuda_asked_for_without_a_compiler(tmp_path):
    """Not the pure Python package, which would only look like success."""
    found = fake_nvcc(tmp_path, "13.0")
    done = setup(
        "--version", RESNET_FUSED_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0", CXX="false", **found
    )
    assert done.returncode != 0
    assert done.stderr.startswith("RESNET_FUSED_CUDA=1: false cannot compile C++17 with OpenMP")


def test_nvcc_is_looked_for_on_the_path(tmp_path):
    (tmp_path / "empty").mkdir()
    found = build_plan.find_nvcc({"PATH": str(tmp_path / "empty")})
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        assert found == "no nvcc in CUDA_HOME/bin, on PATH or in /usr/local/cuda/bin"
    fake_nvcc(tmp_path, "12.6")
    found = build_plan.find_nvcc({"PATH": str(tmp_path / "bin")})
    assert found == Nvcc(str(tmp_path / "bin" / "nvcc"), (12, 6), frozenset({"80", "90", "90a"}))


def test_an_nvcc_that_cannot_compile(tmp_path):
    """A missing header, or a C++ compiler too new for it: its own words, and what to change."""
    words = "probe.cu:1:10: fatal error: cuda_bf16.h: No such file or directory"
    fault = build_plan.nvcc_fault(build_plan.find_nvcc(fake_nvcc(tmp_path, "12.6", words)))
    assert fault is not None
    assert words in fault
    assert "set CXX to a C++ compiler it accepts" in fault


def test_an_nvcc_that_cannot_link(tmp_path):
    """Without the static runtime all sources compile, and the last command fails."""
    words = "/usr/bin/ld: cannot find -lcudart_static: No such file or directory"
    found = fake_nvcc(tmp_path, "13.0", f"{words}\ncollect2: error: ld returned 1 exit status")
    program = tmp_path / "bin" / "nvcc"
    compiles = '*) case " $* " in *" -c "*) exit 0;; esac;'
    program.write_text(program.read_text().replace("*) echo", f"{compiles} echo", 1))
    assert f"({words})" in str(build_plan.nvcc_fault(build_plan.find_nvcc(found)))


def test_this_nvcc_knows_what_it_lists_and_links():
    nvcc = build_plan.find_nvcc(os.environ)
    if isinstance(nvcc, str):
        pytest.skip(nvcc)
    assert build_plan.nvcc_fault(nvcc) is None
    assert {"80", "90", "90a"} <= nvcc.archs
    assert not {"80a", "86f", "90f"} & nvcc.archs


@pytest.mark.parametrize(("version", "good"), [((4, 2), True), ((5, 0), True), ((3, 9), False)])
def test_cutlass_is_found_by_its_header(tmp_path, version, good):
    assert build_plan.find_cutlass({"CUTLASS_PATH": str(tmp_path)}) != tmp_path
    (tmp_path / "include/cutlass").mkdir(parents=True)
    major, minor = version
    text = f"#define CUTLASS_MAJOR {major}\n#define CUTLASS_MINOR {minor}\n"
    (tmp_path / "include/cutlass/version.h").write_text(text)
    expected = (
        f"CUTLASS {major}.{minor} in {tmp_path} is too old; install nvidia-cutlass 4.2 or later"
    )
    found = build_plan.find_cutlass({"CUTLASS_PATH": str(tmp_path)})
    assert found == (tmp_path if good else expected)


def test_cutlass_is_found_where_an_isolated_build_does_not_see_it(tmp_path, monkeypatch):
    """Among the packages of the interpreter that is installed into, hidden from its imports."""
    header = tmp_path / "cutlass_library/source/include/cutlass/version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n")
    monkeypatch.setattr(build_plan.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(build_plan.importlib.util, "find_spec", lambda name: None)
    assert build_plan.find_cutlass({}) == tmp_path / "cutlass_library/source"


# --- what is compiled ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    """setup.py as a module; it builds nothing so."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sources_of_a_plan(script, tmp_path):
    files = "cpu/a.cpp cpu/a.h cuda/b.cu cuda/b.cpp cuda/c_sm90.cu cuda/c_sm90.cpp d.cpp"
    for name in files.split():
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()

    def names(found):
        return [p.name for p in script.sources(found, tmp_path)]

    assert names(plan(NO_NVCC)) == ["a.cpp", "d.cpp"]
    assert names(plan(cutlass=NO_CUTLASS)) == ["a.cpp", "b.cpp", "b.cu", "d.cpp"]
    assert names(plan(TORCH_CUDA_ARCH_LIST="8.0")) == ["a.cpp", "b.cpp", "b.cu", "d.cpp"]
    assert names(plan()) == ["a.cpp", "b.cpp", "b.cu", "c_sm90.cpp", "c_sm90.cu", "d.cpp"]
    text = script.ninja_file(plan(), ["c++"], [], ["c++"], tmp_path / "out.so", tmp_path)
    hopper = text.partition("c_sm90.cu\n")[2].splitlines()[0]
    assert "code=sm_90a" in hopper
    assert "sm_80" not in hopper
    assert "-I/opt/cutlass/include" in hopper
    assert "--expt-relaxed-constexpr" in hopper
    assert text.count("-DRF_SM90") == 3  # every binding but the CPU's
    assert "-cudart static" in text
    assert text.count("depfile = $out.d") == 2


@pytest.mark.parametrize("knows", [True, False])
def test_kernels_for_amx_where_the_assembler_knows_it(knows, script, tmp_path, monkeypatch):
    """Binutils before 2.36 do not; the rest is built all the same."""
    cxx = tmp_path / "c++"
    cxx.write_text(f"#!/bin/sh\nexit {int(not knows)}\n")
    cxx.chmod(0o755)
    monkeypatch.setenv("CXX", str(cxx))
    build_plan.knows_amx.cache_clear()
    try:
        assert build_plan.knows_amx() is knows
        linker = compiler = ["c++"]
        text = script.ninja_file(plan(NO_NVCC), compiler, [], linker, tmp_path / "_C.so", ROOT)
    finally:
        build_plan.knows_amx.cache_clear()
    assert text.count("-DRF_AMX") == knows


def test_a_kernel_compiles(tmp_path):
    nvcc = build_plan.find_nvcc(os.environ)
    if isinstance(nvcc, str):
        pytest.skip(nvcc)
    source = ROOT / "csrc/cuda/bn_vectors.cu"
    command = [nvcc.path, *build_plan.host_compiler(), "-std=c++17", *build_plan.gencode(("80",))]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(tmp_path / "out.o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr + done.stdout


# --- the extension -------------------------------------------------------------------------------

needs_extension = pytest.mark.skipif(native.extension() is None, reason="not built")


@needs_extension
def test_the_extension_imports_without_torch():
    probe = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {native.loaded().__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.cpu_isa()\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def kernels():
    extension = native.extension()
    if extension is None or not hasattr(extension, "cuda"):
        pytest.skip("the extension was built without CUDA kernels")
    return extension


def cuobjdump(*arguments: str) -> str:
    spec = importlib.util.find_spec("triton")
    shipped = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else Path()
    tool = shutil.which("cuobjdump") or (shipped if shipped.is_file() else None)
    if tool is None:
        pytest.skip("no cuobjdump")
    command = [str(tool), *arguments, kernels().__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_no_kernel_spills():
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", cuobjdump("-res-usage"))
    archs = kernels().cuda.archs.split()
    assert len(usage) >= 80 * len(archs)
    assert not [name for name, _, stack in usage if int(stack)]


def skip_without_sm90a() -> None:
    if "90a" not in kernels().cuda.archs.split():
        pytest.skip("not built for sm_90a")


def test_sums_leave_registers_for_all_their_blocks_at_once():
    """Of most maps three on each of an H100's multiprocessors; statistics leave room for four.

    Through the pool two, whose threads have more than twice as much in flight.
    """
    skip_without_sm90a()
    usage = re.findall(r"Function (\S+):\s+REG:(\d+)", cuobjdump("-res-usage", "-arch", "sm_90a"))
    for kernel, blocks in (
        ("bn_stats_parts", 4),
        ("bn_reduce_parts", 3),
        ("bn_max_pool", 2),
    ):
        found = [int(registers) for name, registers in usage if kernel in name]
        assert found
        assert max(found) * 256 * blocks <= 65536, (kernel, found)


def test_the_loop_of_the_statistics_is_short():
    """With 12 instructions a value, an H200 read at half of its memory's speed."""
    skip_without_sm90a()
    parts = cuobjdump("-sass", "-arch", "sm_90a").split("Function : ")
    (code,) = [p for p in parts if re.match(r"\S*bn_stats_parts\S*Bf16ELi8", p)]
    found = [(int(at, 16), word) for at, word in re.findall(r"/\*(\w{4,5})\*/\s+([^;]*);", code)]
    loops = []
    for at, word in found:
        back = re.search(r"BRA (?:!?U?P\d, )?0x(\w+)", word)
        if back and int(back[1], 16) < at:
            loops.append([w for a, w in found if int(back[1], 16) <= a <= at])
    (loop,) = [body for body in loops if any("LDG" in w for w in body)]
    assert sum("LDG" in w for w in loop) == 4
    assert len(loop) <= 6 * 32


def test_maps_are_read_and_written_16_bytes_at_a_time():
    """In every kernel over whole accesses, on the oldest and the newest architecture."""
    archs = kernels().cuda.archs.split()
    for arch in {archs[0], archs[-1]}:
        code = cuobjdump("-sass", "-arch", f"sm_{arch.partition('+')[0]}")
        seen = 0
        for function in code.split("Function : ")[1:]:
            name = function.split()[0]
            # The mangled template arguments: an element type and the width of its accesses.
            if not re.search(r"(F32ELi4|4Bf16ELi8|3F16ELi8)", name):
                continue
            seen += 1
            # A pool's places; what passed ReLU is read by the byte, and nothing else there.
            narrow = r"LDG\.E\.U16 " if "MaskE2" in name else r"LDG\.E\.(U16|U8) "
            assert not re.search(narrow, function) or "max_pool" in name, name
            # Of a block's own scale and shift each thread makes one channel's, of four vectors.
            makes = "bn_act_kernel" in name or ("MaskE3" in name and "max_pool" not in name)
            words = len(re.findall(r"LDG\.E ", function))
            assert words == (4 if makes else 0) or "max_pool" in name, name
            assert re.search(r"LDG\.E\.128", function), name
            if "_parts_kernel" not in name:  # they write sums, in double
                assert re.search(r"STG\.E\.128", function), name
                assert not re.search(r"STG\.E\.U16 ", function), name
        assert seen >= 30


def test_without_a_driver_calls_raise_in_its_words():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    extension = kernels()
    fault = extension.cuda.fault()
    assert fault
    x = torch.zeros(64)
    with pytest.raises(RuntimeError, match=f"add_relu: launch failed: {re.escape(fault)}"):
        extension.cuda.add_relu(x.data_ptr(), x.data_ptr(), x.data_ptr(), "float32", 64, 0)


@pytest.mark.parametrize(
    ("arch", "runs", "not_on"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("100+PTX", [(10, 0), (10, 3), (12, 0)], [(9, 0)]),
        ("86+PTX", [(8, 6), (8, 9), (9, 0)], [(8, 0)]),
    ],
)
def test_what_code_runs_on(arch, runs, not_on):
    assert all(cuda.runs_on(arch, capability) for capability in runs)
    assert not any(cuda.runs_on(arch, capability) for capability in not_on)
