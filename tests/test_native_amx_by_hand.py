"""The AMX kernels where no processor has AMX: their tiles are computed in plain C++."""

import subprocess
import sys
from pathlib import Path

import pytest

_C = pytest.importorskip("resnet_fused._C")
NATIVE = Path(__file__).parent / "native"
TESTS = [
    f"tests/test_native_{n}.py" for n in ("conv", "conv_backward_weight", "convolve_once", "pack")
]
RUN = f"""
import sys
sys.path.insert(0, {str(NATIVE)!r})
import by_hand, pytest
by_hand.load(sys.argv[1])
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.skipif(
    _C.cpu_isa() != "avx512_bf16",
    reason="with AMX its kernels are tested as they are; without AVX-512 BF16 they cannot run",
)
def test_the_kernels_of_amx_by_hand(monkeypatch):
    pytest.importorskip("ninja")
    monkeypatch.syspath_prepend(str(NATIVE))
    import by_hand

    extension = by_hand.build("amx_by_hand")
    command = [sys.executable, "-c", RUN, str(extension), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", "amx or convolve_once", *TESTS],
        cwd=NATIVE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
