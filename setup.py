"""Builds the optional native extension; pyproject.toml holds all the rest.

RESNET_FUSED_CUDA=auto|0|1 (default auto): the CUDA kernels too where there is a usable nvcc; never;
or one error that says what is missing. TORCH_CUDA_ARCH_LIST, CUDA_HOME, CUTLASS_PATH, CXX and
MAX_JOBS mean what they mean elsewhere. Neither torch, a GPU nor the network is asked for anything.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.absolute()
sys.path.insert(0, str(ROOT / "csrc"))

import build_plan  # noqa: E402
from build_plan import Plan  # noqa: E402

#: Where a tile's inner loop lies in its line of the cache was worth up to 8 % of ResNet-50 (Zen 3).
CXX_FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-g0",
             "-falign-loops=64", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # fmt: skip
#: CUTLASS calls constexpr functions of the standard library on the device.
CUTLASS_FLAGS = ["--expt-relaxed-constexpr"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def sources(plan: Plan, root: Path = ROOT) -> list[Path]:
    """Return what the plan compiles. A name that ends in _sm90 says: by CUTLASS, for Hopper."""
    found = [p for p in sorted(root.glob("csrc/**/*")) if p.suffix in (".cpp", ".cu")]
    if not plan.nvcc:
        found = [p for p in found if p.parent.name != "cuda"]
    if not plan.hopper:
        found = [p for p in found if not p.stem.endswith("_sm90")]
    return found


def ninja_file(
    plan: Plan, cxx: list[str], includes: list[str], linker: list[str], target: Path, root: Path
) -> str:
    """Return the build as ninja reads it: one edge per source, its headers known by a depfile."""
    rules = {"cxx": [*cxx, *CXX_FLAGS, *includes, "-MMD", "-MF"]}
    if plan.nvcc:
        nvcc = [plan.nvcc.path, *build_plan.host_compiler()]
        rules["nvcc"] = [*nvcc, *NVCC_FLAGS, "-MD", "-MF"]
        linker = [*nvcc, *build_plan.NVCC_LINK, *(word for word in linker if word.startswith("-"))]
    lines = []
    for name, command in rules.items():
        lines += [f"rule {name}", "  deps = gcc", "  depfile = $out.d"]
        lines += [f"  command = {shlex.join(command)} $out.d $flags -c $in -o $out"]
    lines += ["rule link", f"  command = {shlex.join(linker)} $in -fopenmp -o $out"]
    objects = []
    for source in sources(plan, root):
        objects.append(f"{source.relative_to(root)}.o")
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        lines.append(f"build {objects[-1]}: {rule} {escaped(source)}")
        lines.append(f"  flags = {shlex.join(flags(plan, source))}")
    lines.append(f"build {escaped(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def flags(plan: Plan, source: Path) -> list[str]:
    """Return the arguments of one source alone."""
    if source.suffix == ".cu":
        if not source.stem.endswith("_sm90"):
            return build_plan.gencode(plan.archs)
        return [*build_plan.gencode(plan.hopper), *CUTLASS_FLAGS, f"-I{plan.cutlass}/include"]
    if source.stem == "kernels_amx":
        return ["-DRF_AMX"] if build_plan.knows_amx() else []
    # The CPU kernels know nothing of this: they need not be compiled again for it.
    if not plan.nvcc or source.parent.name == "cpu":
        return []
    return [f'-DRF_CUDA_ARCHS="{" ".join(plan.archs)}"', *(["-DRF_SM90"] if plan.hopper else [])]


def escaped(path: Path) -> str:
    """Return a path as ninja reads it."""
    return re.sub(r"([$: ])", r"$\1", str(path.absolute()))


class BuildExt(build_ext):
    """Builds the extension with ninja; what was left out is said in one line."""

    def run(self) -> None:
        """Try the CUDA compiler, then build."""
        self.plan = PLAN
        if PLAN.nvcc and (fault := build_plan.nvcc_fault(PLAN.nvcc)):
            self.plan = build_plan.without_cuda(os.environ, fault)
        super().run()
        amx = "" if build_plan.knows_amx() else "; no AMX kernels: the assembler knows no AMX"
        print(f"resnet_fused: {self.plan}{amx}", flush=True)

    def build_extension(self, ext: Extension) -> None:
        """Write the ninja file and run it; only what changed is compiled."""
        import ninja

        folder = Path(self.build_temp).absolute()
        if self.force:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        compiler, linker = self.compiler.compiler_so_cxx, self.compiler.linker_so_cxx
        includes = build_plan.lasting_includes(folder)
        text = ninja_file(self.plan, compiler, includes, linker, target, ROOT)
        (folder / "build.ninja").write_text(text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), "--quiet", *jobs]
        if subprocess.run(command).returncode:
            raise SystemExit("resnet_fused: the native extension does not compile; see above")


if __name__ == "__main__":
    PLAN = build_plan.decide(os.environ, build_plan.find_tools(os.environ))
    if fault := build_plan.cxx_fault():
        build_plan.without_cuda(os.environ, fault)  # an error if CUDA was asked for
        print(f"resnet_fused: pure Python, no native kernels: {fault}")
        setup()
    else:
        # What it is made of is for the plan to say, and what a source distribution holds for
        # MANIFEST.in, which is read without a compiler too.
        extension = Extension("resnet_fused._C", [])
        setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
