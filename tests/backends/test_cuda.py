"""The cuda backend's reasons: why it is not available, and which calls it does not take."""

from types import SimpleNamespace

import pytest
import torch

import resnet_fused as rf
from resnet_fused import env
from resnet_fused.backends import cuda, native

MAP = torch.zeros(1, 8, 4, 4)


@pytest.fixture
def machine(monkeypatch):
    """A machine with an H100 and an extension for it; tests take things away."""
    extension = SimpleNamespace(
        cuda=SimpleNamespace(archs="80 90a 100+PTX", fault=lambda: None), cpu_isa=lambda: "none"
    )
    monkeypatch.setattr(native, "_load", lambda: (extension, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")
    cuda.available.cache_clear()
    cuda._declines_device.cache_clear()
    yield extension
    cuda.available.cache_clear()
    cuda._declines_device.cache_clear()


def test_a_machine_that_has_all(machine):
    assert cuda.available() is None


def test_the_loader_s_own_words(machine, monkeypatch):
    words = "libgomp.so.1: cannot open shared object file"
    monkeypatch.setattr(native, "_load", lambda: (None, words))
    assert cuda.available() == f"the extension is not loaded: {words}"
    with pytest.raises(RuntimeError, match=f"'cuda' is not available: .*{words}"):
        rf.use_backend("cuda")
    verdicts = {v.name: v.reason for v in rf.explain("add_relu", MAP, MAP)}
    assert words in verdicts["cuda"]
    findings = {f.name: f for f in env.diagnose()}
    assert words in findings["cuda"].state
    assert "RESNET_FUSED_CUDA=1" in findings["cuda"].advice


def test_an_extension_without_cuda(machine):
    del machine.cuda
    assert cuda.available() == "the extension was built without CUDA kernels"


def test_no_gpu(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.available() == "there is no CUDA GPU that torch can use"
    with pytest.raises(RuntimeError, match="'cuda' is not available: there is no CUDA GPU"):
        rf.use_backend("cuda")


def test_a_driver_too_old_for_the_extension(machine):
    words = "CUDA driver version is insufficient for CUDA runtime version"
    machine.cuda.fault = lambda: words
    assert cuda.available() == f"CUDA does not start: {words}"


def test_a_gpu_without_code_for_it(machine):
    machine.cuda.archs = "80"
    assert cuda.available() == "was built for 80; cuda:0 is a H100 of sm_90"


class OnGpu:
    """A map that says it is on the GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, x):
        self._x = x

    def __getattr__(self, name):
        return getattr(self._x, name)


def test_calls_it_does_not_take(machine):
    x = OnGpu(MAP)
    assert cuda.supports("add_relu", x, x) is None
    assert cuda.supports("add_relu", MAP, MAP) == "runs on CUDA GPUs, x is on cpu"
    wide = OnGpu(MAP.double())
    expected = "takes float32, bfloat16 and float16, x is torch.float64"
    assert cuda.supports("add_relu", wide, wide) == expected
    pool = ((3, 2), (2, 2), (1, 1))
    assert "square pools" in cuda.supports("max_pool_backward", x, None, (1, 8, 9, 9), *pool)
