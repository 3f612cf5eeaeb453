"""The 1x1 convolution of Hopper up to its kernels: over plain loops on the host, and a GPU made up.

What CUTLASS makes of it is read off the machine code in ``test_build_hopper.py``; a real GPU runs
it in ``tests/gpu``.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import resnet_fused as rf
from resnet_fused import env
from resnet_fused.backends import _hopper_gemm, _tuned, candidates, choose, cuda, native
from resnet_fused.backends._hopper_gemm import Product, heuristic
from resnet_fused.backends._tuned_file import Choice
from resnet_fused.ops import OPS
from resnet_fused.testing import to_float64, two_x_rule

sys.path += [str(Path(__file__).parents[1] / name) for name in ("ops", "native")]
sys.path.append(str(Path(__file__).parent / "triton"))
import on_host
from formulas import samples
from paths import arguments, assert_right
from test_cuda_on_host import _OnGpu as OnGpu
from test_cuda_on_host import kernels_of

HALF = (torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))

#: name: (x, output channels, kernel, stride, padding, dilation)
SHAPES = {
    "a map": ((2, 24, 5, 7), 16),
    "one pixel": ((1, 8, 1, 1), 8),
    "one row": ((1, 16, 1, 9), 136),
    "a dilation, which is none for 1x1": ((1, 8, 4, 4), 8, 1, 1, 0, 2),
}


@pytest.fixture
def module():
    module = on_host.load()
    with kernels_of(module):
        yield module


@pytest.mark.parametrize("shape", SHAPES)
@each_dtype
def test_every_kernel(module, shape, dtype):
    """With residual and without."""
    for residual in (False, True):
        args = arguments(*SHAPES[shape], dtype=dtype, residual=residual)
        runs = _hopper_gemm.candidates(*args)
        assert list(runs) == KERNELS
        for run in runs.values():
            assert_right(args, run(*args))


def test_the_contract_runs_some_of_it(module):
    """``test_cuda_on_host`` holds these to the op's contract."""
    assert len(samples("conv_bn_act", torch.bfloat16, "cuda")) >= 2


@pytest.mark.parametrize(("stride", "ours"), [(1, 1), (2, 0)])
@each_dtype
def test_a_data_gradient_with_something_to_add(module, monkeypatch, stride, ours, dtype):
    """Of stride 1 it is such a convolution, by the weight turned."""
    ran = []
    run = _hopper_gemm.conv_bn_act
    monkeypatch.setattr(_hopper_gemm, "conv_bn_act", lambda *args: ran.append(args) or run(*args))
    grad, weight = torch.randn(2, 16, 5, 7).to(dtype), torch.randn(16, 24, 1, 1).to(dtype)
    residual = torch.randn(2, 24, 5 * stride, 7 * stride).to(dtype)
    geometry = ((stride, stride), (0, 0), (1, 1), 1)
    args = (grad, weight, list(residual.shape), *geometry, residual)
    out = cuda.conv_backward_data(*args)
    assert len(ran) == ours
    reference = OPS["conv_backward_data"].reference
    check = two_x_rule(out, reference(*args), reference(*to_float64(args)), 16)
    assert check.ok, check
    assert out.is_contiguous(memory_format=torch.channels_last)
    cuda.conv_backward_data(*args[:-1], None)
    assert len(ran) == ours, "nothing is added: torch's is as fast, or was not measured"


@each_dtype
def test_a_data_gradient_s_candidates(module, dtype):
    """Every kernel once: with something to add, the default runs one of them."""
    grad, weight = torch.randn(2, 16, 5, 7).to(dtype), torch.randn(16, 24, 1, 1).to(dtype)
    residual, reference = torch.randn(2, 24, 5, 7).to(dtype), OPS["conv_backward_data"].reference
    for added, names in ((None, KERNELS), (residual, ["gemm"])):
        args = (grad, weight, [2, 24, 5, 7], (1, 1), (0, 0), (1, 1), 1, added)
        runs = cuda.candidates("conv_backward_data", *args)
        assert list(runs) == ["default", *names]
        for run in runs.values():
            check = two_x_rule(run(*args), reference(*args), reference(*to_float64(args)), 16)
            assert check.ok, check
    strided = (grad, weight, [2, 24, 10, 14], (2, 2), (0, 0), (1, 1), 1, None)
    assert list(cuda.candidates("conv_backward_data", *strided)) == ["default"]


def test_odd_addresses_are_copied(module):
    x, weight, *rest = arguments((1, 8, 5, 5), 8, dtype=torch.bfloat16, residual=True)

    def odd(t):
        n, c, h, w = t.shape
        flat = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
        return flat.view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)

    expected = cuda.conv_bn_act(x, weight, *rest)
    rest[2] = odd(rest[2])
    assert rest[2].data_ptr() % 16
    assert torch.equal(cuda.conv_bn_act(odd(x), odd(weight), *rest), expected)


def test_a_weight_is_read_where_it_is(module):
    """Either layout of 1x1 has it dense already; a changed one is then seen."""
    for layout in (torch.contiguous_format, torch.channels_last):
        args = arguments((1, 8, 5, 5), 16, dtype=torch.float16)
        weight = args[1].contiguous(memory_format=layout)
        assert native.as_map(weight).data_ptr() == weight.data_ptr()
        for _ in range(2):
            assert_right((args[0], weight, *args[2:]), cuda.conv_bn_act(args[0], weight, *args[2:]))
            weight.mul_(2)


def test_a_transposed_weight_is_copied(module):
    args = arguments((1, 8, 5, 5), 16, dtype=torch.float16)
    weight = args[1].permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    assert weight.stride()[:2] == (1, 16)
    assert torch.equal(cuda.conv_bn_act(args[0], weight, *args[2:]), cuda.conv_bn_act(*args))


# --- what the bindings refuse --------------------------------------------------------------------

SIZES = Product(pixels=30, c=8, o=16)._asdict()


@pytest.fixture
def call(module):
    """A call that is right; what is given by name replaces its arguments."""
    x, y, weight = (torch.zeros(n, dtype=torch.bfloat16) for n in (240, 480, 128))
    vector, workspace = torch.zeros(16), torch.zeros(16, dtype=torch.uint8)
    good = {
        "x": x.data_ptr(), "weight": weight.data_ptr(), "y": y.data_ptr(), "residual": y.data_ptr(),
        "scale": vector.data_ptr(), "shift": vector.data_ptr(), "workspace": workspace.data_ptr(),
        "workspace_bytes": 16, "dtype": "bfloat16", "kernel": "gemm", **SIZES,
        "relu": True, "stream": 0,
    }  # fmt: skip

    def call(**changed):
        return module.cuda.conv_bn_act(**{**good, **changed}), (x, y, weight, vector, workspace)

    call.good = good
    return call


def test_a_call_that_is_right(call):
    call()
    call(scale=0, shift=0, residual=0)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        *[(name, 0, "null pointer") for name in ("x", "weight", "y", "workspace")],
        ("workspace_bytes", 15, "expected at least 16"),
        ("dtype", "float32", "expected bfloat16 or float16, got float32"),
        ("kernel", "gemm-m", "unknown name gemm-m"),
        *[(name, 0, "expected 1 to 2147483647, got 0") for name in ("pixels", "c", "o")],
        *[(name, 2**31, "expected 1 to 2147483647, got") for name in ("pixels", "c", "o")],
    ],
)
def test_arguments_that_are_wrong(call, name, value, words):
    with pytest.raises(ValueError, match=f"^{name}: .*{words}"):
        call(**{name: value})


@pytest.mark.parametrize("name", ["c", "o"])
def test_a_kernel_that_does_not_take_the_channels(call, name):
    with pytest.raises(ValueError, match=r"^kernel: gemm takes channels in mult"):
        call(**{name: 12})


@pytest.mark.parametrize("name", ["x", "weight", "y", "residual", "workspace"])
def test_addresses_are_aligned_to_16_bytes(call, name):
    with pytest.raises(ValueError, match=f"^{name}: must be aligned to 16 bytes"):
        call(**{name: call.good[name] + 8})


@pytest.mark.parametrize("name", ["scale", "shift"])
def test_vectors_are_aligned_to_a_float(call, name):
    with pytest.raises(ValueError, match=f"^{name}: must be aligned to 4 bytes"):
        call(**{name: call.good[name] + 2})


@pytest.mark.parametrize("name", ["x", "weight"])
def test_the_output_is_apart_from_what_is_read(call, name):
    with pytest.raises(ValueError, match=f"^y: must not overlap {name}"):
        call(y=call.good[name])


def test_the_output_may_be_the_residual_and_no_part_of_it(call):
    with pytest.raises(ValueError, match=r"^y: overlaps residual without being"):
        call(residual=call.good["y"] + 16)


def test_a_launch_that_fails_raises(call):
    with pytest.raises(RuntimeError, match="conv_bn_act: launch failed: invalid resource handle"):
        call(stream=64)


# --- which calls it takes ------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine with an H100 and an extension for it, its kernels the host's."""
    made = on_host.load().cuda
    kernels = SimpleNamespace(**{name: getattr(made, name) for name in dir(made)})
    kernels.archs, kernels.fault = "90a", lambda: None
    extension = SimpleNamespace(cuda=kernels, cpu_isa=lambda: "none")
    monkeypatch.setattr(native, "_load", lambda: (extension, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")
    monkeypatch.setattr(_hopper_gemm, "multiprocessors", lambda device: 132)
    caches = (cuda.available, cuda._declines_device, _hopper_gemm._declines_capability)
    for cached in caches:
        cached.cache_clear()
    yield kernels
    for cached in caches:
        cached.cache_clear()


def on_gpu(*shape, dtype=torch.bfloat16, **geometry):
    x, *rest = arguments(*shape, dtype=dtype, **geometry)
    return OnGpu(x), *rest


@each_dtype
def test_what_it_takes(machine, dtype):
    for shape in SHAPES.values():
        assert cuda.supports("conv_bn_act", *on_gpu(*shape, dtype=dtype)) is None


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (((1, 12, 5, 5), 16), "takes channels in multiples of 8, got (12, 16)"),
        (((1, 16, 5, 5), 12), "takes channels in multiples of 8, got (16, 12)"),
        (((1, 16, 5, 5), 16, 1, 1, 0, 1, 2), "padding (0, 0), groups 2"),
        (((1, 8, 9, 9), 8, 3, 1, 1), "got (3, 3), stride (1, 1), padding (1, 1), groups 1"),
        (((1, 8, 9, 9), 8, (1, 3)), "got (1, 3), stride (1, 1), padding (0, 0), groups 1"),
        (((1, 8, 9, 9), 8, 1, (1, 2)), "got (1, 1), stride (1, 2)"),
        (((1, 8, 9, 9), 8, 1, 1, (0, 1)), "got (1, 1), stride (1, 1), padding (0, 1)"),
        (((1, 3, 9, 9), 32, 7, 2, 3), "beside stems; got (7, 7)"),
        (((1, 1016, 2, 2), 8), "CUTLASS cannot implement it as gemm"),
        (((0, 8, 5, 5), 8), "pixels: expected 1 to 2147483647, got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shapes_it_does_not_take(machine, shape, words):
    reason = cuda.supports("conv_bn_act", *on_gpu(*shape))
    assert reason is not None
    assert words in reason


def test_pixels_are_counted_in_32_bits(machine):
    reason = _hopper_gemm._verdict("float16", Product(2**31, 8, 8))[1]
    assert reason == "pixels: expected 1 to 2147483647, got 2147483648"


def test_the_stem_is_run_beside_it(machine):
    stem = on_gpu((1, 3, 9, 9), 64, 7, 2, 3)
    assert _hopper_gemm.declines(*stem) is not None
    assert cuda.supports("conv_bn_act", *stem) is None
    assert all(name.startswith("band") for name in cuda.candidates("conv_bn_act", *stem))


def test_dtypes_devices_and_builds_without_it(machine, monkeypatch):
    shape = ((1, 8, 5, 5), 8)
    for dtype, words in (
        (torch.float32, "convolves 1x1 in bfloat16 and float16, x is torch.float32"),
        (torch.float64, "takes float32, bfloat16 and float16, x is torch.float64"),
    ):
        assert cuda.supports("conv_bn_act", *on_gpu(*shape, dtype=dtype)) == words
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    _hopper_gemm._declines_capability.cache_clear()
    expected = "convolves 1x1 on sm_90 alone; cuda:0 is a GPU of sm_100"
    assert cuda.supports("conv_bn_act", *on_gpu(*shape)) == expected
    assert not [f for f in env.diagnose() if f.name == "cuda 1x1 convolution"]
    del machine.conv_bn_act
    reason = "the extension was built without CUTLASS's headers, or not for sm_90a"
    assert cuda.supports("conv_bn_act", *on_gpu(*shape)) == f"has no 1x1 convolution: {reason}"
    finding = next(f for f in env.diagnose() if f.name == "cuda 1x1 convolution")
    assert (finding.good, finding.state) == (False, reason)
    assert "pip install --no-deps nvidia-cutlass" in finding.advice


# --- who runs it ---------------------------------------------------------------------------------


def test_auto_takes_it_only_where_it_was_measured(machine, monkeypatch):
    """By name it runs; tuning weighs all its kernels; the table's word is then followed."""
    monkeypatch.setattr(_tuned, "_tables", {OnGpu.device: {}})
    monkeypatch.setattr(_tuned, "_trained", {OnGpu.device: frozenset()})
    args = on_gpu((2, 64, 9, 9), 64)
    with rf.use_backend("cuda"):
        assert choose("conv_bn_act", *args) is cuda.conv_bn_act
    assert choose("conv_bn_act", *args) is not cuda.conv_bn_act
    names = [name for backend, name in candidates("conv_bn_act", *args) if backend == "cuda"]
    assert names == KERNELS
    choice = Choice("cuda", names[1], 1e-5, None)
    _tuned.remember(OnGpu.device, {_tuned.signature("conv_bn_act", args): choice})
    run = choose("conv_bn_act", *args)
    assert run.keywords == {"kernel": names[1]}


def test_explain_says_that_it_waits_for_tuning(machine, monkeypatch):
    monkeypatch.setattr(_tuned, "_tables", {OnGpu.device: {}})
    monkeypatch.setattr("resnet_fused.functional.op_arguments", lambda op, *args: args)
    verdicts = {v.name: v for v in rf.explain("conv_bn_act", *on_gpu((1, 8, 5, 5), 8))}
    assert "was not measured to be fastest (`tune`)" in verdicts["cuda"].reason
    assert not verdicts["cuda"].chosen


def test_other_ops_have_one_candidate(machine):
    x = OnGpu(torch.zeros(1, 8, 4, 4))
    assert cuda.candidates("add_relu", x, x) == {"default": cuda.add_relu}


# --- the choice where nothing was measured -------------------------------------------------------

KERNELS = ["gemm", "gemm-add"]


def test_the_kernels_are_those_of_the_extension(module):
    assert module.cuda.conv_bn_act_kernels() == KERNELS


def test_what_is_added_decides(module, monkeypatch):
    ran = []
    run = native.run
    monkeypatch.setattr(native, "run", lambda *args: ran.append(args) or run(*args))
    for residual, kernel in ((False, "gemm"), (True, "gemm-add")):
        args = arguments((1, 8, 5, 5), 16, dtype=torch.float16, residual=residual)
        assert heuristic(args[4]) == kernel
        cuda.conv_bn_act(*args)
        assert kernel in ran.pop()


#: Those with something to add, all of which took less time than by Triton's first tile. (56, 64,
#: 256) also occurs with nothing to add, and took more.
ADDING = [(56, 64, 256), (28, 128, 512), (14, 256, 1024), (7, 512, 2048)]
#: With nothing to add, those that took less time and those that did not.
FASTER = [(28, 512, 128), (28, 512, 256), (14, 1024, 256), (14, 1024, 512), (7, 2048, 512)]
SLOWER = [(56, 64, 64), (56, 64, 256), (56, 256, 64), (56, 256, 128)]


def taken(batch, side, c, o, residual):
    x = SimpleNamespace(shape=torch.Size((batch, c, side, side)), device=OnGpu.device)
    return _hopper_gemm.beats_triton(x, torch.empty(o, c, 1, 1), x if residual else None)


@pytest.mark.parametrize(("batch", "faster"), [(256, True), (1, False)])
def test_it_beats_triton_where_it_was_faster(machine, batch, faster):
    plain = {p for p in FASTER + SLOWER if taken(batch, *p, False)}
    assert plain == set(FASTER if faster else ())
    assert {p for p in ADDING if taken(batch, *p, True)} == set(ADDING if faster else ())


def test_it_beats_triton_with_as_many_blocks_as_were_measured(machine):
    assert taken(256, 7, 2048, 512, False)
    assert not taken(240, 7, 2048, 512, False)


def test_there_auto_takes_it_unmeasured(machine, monkeypatch):
    monkeypatch.setattr(_tuned, "_tables", {OnGpu.device: {}})
    monkeypatch.setattr("resnet_fused.functional.op_arguments", lambda op, *args: args)
    call = on_gpu((64, 512, 28, 28), 128)
    assert choose("conv_bn_act", *call) is cuda.conv_bn_act
    assert rf.explain("conv_bn_act", *call).chosen == "cuda"


def test_the_stem_is_taken_unmeasured(machine, monkeypatch):
    monkeypatch.setattr(_tuned, "_tables", {OnGpu.device: {}})
    assert choose("conv_bn_act", *on_gpu((2, 3, 16, 16), 64, 7, 2, 3)) is cuda.conv_bn_act
