"""Runs the native kernels' tests with the extension built for AddressSanitizer and UBSan.

The CPU kernels are built anew as ``_C``, with AMX's tiles computed by hand, as sanitizers do not
see what its instructions read; the CUDA kernels run on the host (``on_host.py``). Tensors come from
malloc, so a kernel that reads or writes beside one is reported, and the run fails.
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
TESTS += [
    "tests/backends/test_cuda_on_host.py",
    "tests/backends/test_cuda_bn_pool.py",
    "tests/backends/test_hopper_gemm.py",
]
TESTS += ["tests/backends/test_cuda_stem.py"]
#: Runs pytest with the extension at argv[1] in place of the built one.
RUN = """
import sys
sys.path.insert(0, "tests/native")
import by_hand, on_host, pytest
by_hand.load(sys.argv[1])
on_host.EXTRA = tuple(on_host.SANITIZE)
sys.exit(pytest.main(["--capture=sys", *sys.argv[2:]]))  # a report goes to stderr as it is
"""


def runtime(name: str) -> str:
    """Return the path of the compiler's sanitizer runtime, which must be loaded first."""
    command = [*on_host.compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str]) -> int:
    """Build, run the tests, and return pytest's exit status."""
    extension = by_hand.build("sanitized", *on_host.SANITIZE)
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # Python and torch keep memory until the end.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    command = [sys.executable, "-c", RUN, str(extension), *(arguments or TESTS)]
    return subprocess.run(command, cwd=on_host.ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
