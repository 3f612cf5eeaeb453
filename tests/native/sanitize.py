"""Runs the native kernels' tests with the extension built for sanitizers.

For AddressSanitizer and UBSan the CPU kernels are built anew as ``_C``, with AMX's tiles computed
by hand, as sanitizers do not see what its instructions read; the CUDA kernels run on the host
(``on_host.py``). Tensors come from malloc, so a kernel that reads or writes beside one is reported,
and the run fails. For ThreadSanitizer only the CUDA kernels are built: each thread of a block is a
fibre that barriers alone order, so what two threads do to one value between barriers is reported.
"""

import os
import subprocess
import sys

import by_hand
import on_host

TESTS = [f"tests/test_native_bn{name}.py" for name in ("", "_arguments", "_backward", "_bits")]
TESTS += ["tests/test_native_max_pool.py", "tests/test_native_conv.py"]
TESTS += [
    f"tests/test_native_{name}.py" for name in ("conv_backward_weight", "convolve_once", "pack")
]
ON_HOST = [f"tests/backends/test_cuda_{name}.py" for name in ("on_host", "bn_pool", "stem")]
ON_HOST += ["tests/backends/test_hopper_gemm.py"]
#: Runs pytest with a sanitizer, and the extension at argv[2], if any, in place of the built one.
RUN = """
import sys
sys.path.insert(0, "tests/native")
import by_hand, on_host, pytest
on_host.SANITIZER, extension, *arguments = sys.argv[1:]
if extension:
    by_hand.load(extension)
sys.exit(pytest.main(["--capture=sys", *arguments]))  # a report goes to stderr as it is
"""
#: Of a sanitizer: its runtimes, and how it is told to end at the first report.
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    # Python and torch keep memory until the end.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:report_signal_unsafe=0",
}


def runtime(name: str) -> str:
    """Return the path of the compiler's sanitizer runtime, which must be loaded first."""
    command = [*on_host.compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(sanitizer: str, extension: str, arguments: list[str]) -> int:
    """Run pytest, and return its exit status."""
    preload = " ".join(map(runtime, RUNTIMES[sanitizer]))
    command = [sys.executable, "-c", RUN, sanitizer, extension, *arguments]
    if sanitizer == "thread":  # knows only some places of memory, which chance may pass by
        command = ["setarch", "--addr-no-randomize", *command]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": preload}
    return subprocess.run(command, cwd=on_host.ROOT, env=environment).returncode


def main(arguments: list[str]) -> int:
    """Build and run the tests under each; return the first exit status that is not zero."""
    extension = by_hand.build("sanitized", *on_host.SANITIZERS["address"])
    status = run("address", str(extension), arguments or [*TESTS, *ON_HOST])
    return status or run("thread", "", arguments or ON_HOST)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
