"""What the backend says about calls it does not take, and that "auto" never interprets."""

import contextlib
import os
import subprocess
import sys
import types

import pytest
import torch

import resnet_fused as rf
from resnet_fused.backends import ORDER, _requested, choose, trains, triton
from resnet_fused.backends.triton.shapes import Config
from resnet_fused.ops import TRAINING

X = torch.randn(1, 4, 6, 6)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Nothing is remembered from before, and nothing after."""
    kept = (triton.interpreted, triton._load_error, triton._name, triton._too_old)
    for function in kept:
        function.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    for function in kept:
        function.cache_clear()


def gpu(monkeypatch, capability: tuple[int, int]) -> None:
    """Make believe that there is one GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


class OnGpu:
    """As much of a CUDA tensor as `supports` asks for."""

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        self.dtype, self.device = dtype, torch.device("cuda", 0)


def test_the_order():
    names = list(ORDER)
    assert names.index("triton") > names.index("onednn")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu():
    assert triton.available() == "there is no CUDA GPU, and TRITON_INTERPRET=1 is not set"
    with pytest.raises(RuntimeError, match=r"'triton' is not available: there is no.*sm_80"):
        rf.use_backend("triton")


def test_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import resnet_fused as rf\n"
        "(found,) = [b for b in rf.backends() if b.name == 'triton']\n"
        "assert found.reason == 'triton is not installed', found\n"
        "assert 'brings triton' in found.advice\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_broken_triton(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton.language", None)
    assert triton.available().startswith("triton does not load: ")


def test_a_gpu_that_is_too_old(monkeypatch):
    gpu(monkeypatch, (7, 0))
    expected = "needs a GPU of sm_80 or later, cuda:0 is a Tesla V100 of sm_70"
    if triton.available() != "triton is not installed":
        assert triton.available() == expected
    assert triton.supports("add_relu", OnGpu()) == expected


def test_a_gpu_that_will_do(monkeypatch):
    gpu(monkeypatch, (8, 6))
    assert triton.available() in (None, "triton is not installed")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert triton.supports("add_relu", OnGpu(dtype)) is None
    reason = triton.supports("add_relu", OnGpu(torch.float64))
    assert reason == "takes float32, bfloat16 and float16, x is torch.float64"
    assert triton.supports("add_relu", X) == "runs on CUDA GPUs, x is on cpu"


def test_groups_that_no_grid_holds(monkeypatch):
    gpu(monkeypatch, (9, 0))
    geometry = ((1, 1), (1, 1), (1, 1))

    def declined(per_group: int, groups: int) -> str | None:
        weight = torch.empty(groups, per_group, 3, 3, device="meta")
        rest = (weight, None, None, None, *geometry, groups, "relu")
        return triton.supports("conv_bn_act", OnGpu(), *rest)

    assert declined(2, 65535) is None
    assert declined(2, 65536) == "takes 65535 groups at most, groups=65536"
    assert declined(1, 2**20) is None


def test_ends_that_no_grid_holds(monkeypatch):
    """Up to the limit, the grid that is launched fits; above it, the call is declined in words."""
    pytest.importorskip("triton")
    from resnet_fused.backends.triton import launch_ends
    from resnet_fused.backends.triton import stem as stem_tiles

    gpu(monkeypatch, (9, 0))

    class Shaped(OnGpu):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.shape = torch.Size(shape)

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float16, device="meta")

    def stem(height: int, o: int = 64) -> str | None:
        x, weight = (1, 3, height, 8), (o, 3, 7, 7)
        pairs, pool = ((2, 2), (3, 3), (1, 1)), ((3, 3), (2, 2), (1, 1))
        p = stem_tiles.Stem.of(x, weight, *pairs, *pool)
        rest = (None, None, meta(1, o, *p.out_size), p)
        for config in stem_tiles.candidates(p, "fp16", 90):
            grid = launch_ends.stem(meta(*x), meta(*weight), *rest, config, None).grid
            holds.append(max(grid[1:]) <= 65535)
        args = (meta(*weight), None, None, *pairs, 1, None, *pool)
        return triton.supports("conv_bn_act_max_pool", Shaped(*x), *args)

    def head(n: int, c: int) -> str | None:
        for step in launch_ends.head(meta(n, c, 1, 1), meta(10, c), None, meta(n, 10), 90):
            holds.append(max(step.grid[1:]) <= 65535)
        return triton.supports("avg_pool_linear", Shaped(n, c, 1, 1), meta(10, c), None)

    holds: list[bool] = []
    assert stem(4 * 65535) is None
    assert head(64 * 65535, 16) is None
    assert head(8, 64 * 65535) is None
    assert all(holds)
    assert stem(2**23) == "takes outputs of 65535 rows at most, got 2097152"
    assert stem(64, 2**21) == "takes 1048560 output channels at most, weight has 2097152"
    said = "takes 4194240 images and channels at most, x is "
    assert head(2**22, 16) == said + "(4194304, 16, 1, 1)"
    assert head(8, 2**22) == said + "(8, 4194304, 1, 1)"
    assert not all(holds)


def test_kernels_are_launched_on_the_device_of_x(monkeypatch):
    """Triton launches on the current device, whatever its arguments' is."""
    pytest.importorskip("triton")
    from resnet_fused.backends.triton import launch, run

    current: list[torch.device] = []
    launched: list[str] = []

    @contextlib.contextmanager
    def device_of(x):
        current.append(x.device)
        yield
        current.pop()

    def launch_on(step) -> None:
        assert current == [torch.device("meta")]
        launched.append(step.kernel.__name__)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(launch.Launch, "run", launch_on)
    x, weight = torch.empty(1, 512, 7, 7, device="meta"), torch.empty(64, 512, 3, 3, device="meta")
    rest = (None, None, None, (1, 1), (1, 1), (1, 1), 1, "relu")
    run.conv_bn_act(x, weight, *rest, config=Config.parse("m16n64k64w4s2x4g8"))
    run.bn_apply(x, None, None, x, "relu")
    assert launched == ["conv_fwd_kernel", "affine_kernel", "affine_kernel"]
    del launched[:]
    geometry = ((1, 1), (1, 1), (1, 1))
    run.conv_bn_act_max_pool(
        x, weight, None, None, *geometry, 1, "relu", (3, 3), (2, 2), (1, 1)
    )  # fmt: skip
    run.avg_pool_linear(x, weight[:, :, 0, 0], None)
    half, first, second = (
        torch.empty(shape, dtype=torch.float16, device="meta")
        for shape in ((1, 64, 7, 7), (64, 64, 3, 3), (256, 64, 1, 1))
    )
    vectors = (None, None, second, None, None, None)
    run.conv_bn_act_conv_bn_act(half, first, *vectors, *geometry, "relu", "relu")
    assert launched == [
        "stem_fwd_kernel", "mean_kernel", "linear_kernel", "conv_pair_fwd_kernel"
    ]  # fmt: skip
    assert not current


def test_training_is_not_chosen_unmeasured(monkeypatch):
    """No GPU is known to be faster by it, so cuDNN's convolutions stay: all ops of training.

    But the small ones that nobody else has, of an end that is itself to be measured.
    """
    gpu(monkeypatch, (9, 0))
    small = {"channel_covariance", "pointwise_bn_stats", "pointwise_bn_gradients"}
    others = {op for op in TRAINING if not TRAINING[op].mutates}
    assert set(triton.ONLY_MEASURED) == others - small
    assert all(triton.supports(op, OnGpu()) is None for op in TRAINING)
    alone = types.SimpleNamespace(
        available=lambda: None, supports=lambda op, *args: None,
        ONLY_MEASURED=triton.ONLY_MEASURED, **dict.fromkeys(TRAINING, print),
    )  # fmt: skip
    monkeypatch.setitem(choose.__globals__, "ORDER", {"triton": alone})
    x = torch.empty(0)
    chosen = {op for op in TRAINING if choose(op, x) is not None}
    assert chosen == {"bn_update_stats", *small}
    with rf.use_backend("triton"):
        assert all(choose(op, x) is print for op in TRAINING)


def test_trains_in_the_interpreter_by_name_only(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys.modules["resnet_fused.backends"], "_trains", {})
    monkeypatch.delitem(ORDER, "cpu")  # it would train in half precision itself
    half, wide = ((torch.device("cpu"), d) for d in (torch.float16, torch.float64))
    assert not trains(*half, 1)
    with rf.use_backend("triton"):
        assert trains(*half, 1)
        assert not trains(*wide, 1)


def test_the_interpreter_runs_only_what_asks_for_it_by_name(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "only what asks for triton by name" in triton.supports("add_relu", X)
    monkeypatch.setattr(_requested, "_name", "triton")
    assert triton.supports("add_relu", X) is None
    assert "x is torch.float64" in triton.supports("add_relu", X.double())


def test_auto_does_not_choose_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(ORDER, "cpu")  # it would take this itself
    verdicts = rf.explain("add_relu", X.half(), X.half())
    assert verdicts.chosen == "reference"
    assert {v.name: v.reason for v in verdicts}["triton"].startswith("its interpreter")
