"""The CUDA stem, compiled as C++ and run on the host: its tiles, bands and edges, and its choices.

``test_cuda_on_host`` holds it to the op's contract.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from resnet_fused.backends import _cuda_stem, _device, cuda
from resnet_fused.ops import OPS
from resnet_fused.testing import to_float64, two_x_rule

sys.path += [str(Path(__file__).parents[1] / name) for name in ("ops", "native")]
import on_host
from formulas import eager
from test_cuda_on_host import kernels_of

OP = "conv_bn_act_max_pool"
GEOMETRY = ((2, 2), (3, 3), (1, 1), 1)
POOL = ((3, 3), (2, 2), (1, 1))


def arguments(shape, o=64, dtype=torch.bfloat16, act="relu"):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, vectors = torch.randn(o, shape[1], 7, 7).to(dtype), torch.randn(2, o)
    return (x, weight, *vectors, *GEOMETRY, act, *POOL)


@pytest.fixture
def module():
    module = on_host.load()
    with kernels_of(module):
        yield module
    module.reverse_turns(False)


def assert_right(args, out, op=OP):
    check = two_x_rule(out, eager(op, args), eager(op, to_float64(args)), args[1][0].numel())
    assert check.ok, check


@pytest.mark.parametrize(
    ("shape", "band"),
    [
        ((1, 3, 17, 12), 1),
        ((1, 3, 17, 12), 2),
        ((1, 3, 17, 12), 14),  # higher than the map, whose last window has two rows
        ((2, 4, 4, 5), 1),
        ((1, 1, 1, 1), 1),
        ((1, 2, 3, 226), 1),  # two tiles of columns, the second of one window
        ((1, 3, 5, 460), 2),  # three tiles
    ],
    ids=str,
)
def test_edges(module, shape, band):
    args = arguments(shape)
    out = _cuda_stem.conv_bn_act_max_pool(*args, band=band)
    assert_right(args, out)
    module.reverse_turns(True)
    assert torch.equal(_cuda_stem.conv_bn_act_max_pool(*args, band=band), out), "a race"


@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize(
    ("shape", "band"),
    [((1, 3, 17, 12), 1), ((2, 3, 9, 13), 4), ((1, 4, 3, 226), 2), ((1, 1, 1, 1), 28)],
    ids=str,
)
def test_without_a_pool(module, shape, band, act):
    x, weight, scale, shift, *_ = arguments(shape)
    args = (x, weight, scale, shift, None, *GEOMETRY, act)
    out = _cuda_stem.conv_bn_act(*args, band=band)
    assert_right(args, out, "conv_bn_act")
    assert {*cuda.candidates("conv_bn_act", *args)} <= {f"band{b}" for b in _cuda_stem.BANDS}
    module.reverse_turns(True)
    assert torch.equal(_cuda_stem.conv_bn_act(*args, band=band), out), "a race"
    raw = _cuda_stem.convolve(x, weight)
    assert_right((x, weight, None, None, None, *GEOMETRY, None), raw, "conv_bn_act")


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("shape", "o"),
    [((2, 3, 17, 12), 64), ((1, 4, 6, 33), 128), ((1, 3, 3, 226), 64), ((1, 1, 1, 1), 64)],
    ids=str,
)
def test_the_gradient_of_the_weight(module, monkeypatch, shape, o, channels_last):
    x, weight, *_ = arguments(shape, o)
    grad = torch.randn(F.conv2d(x, weight, stride=2, padding=3).shape).to(x.dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    sizes = (list(weight.shape), *GEOMETRY, channels_last)
    reference = OPS["conv_backward_weight"].reference
    expected = reference(grad.double(), x.double(), *sizes, torch.float64)
    for processors in (132, 1):  # a band to a block, and several
        monkeypatch.setattr(_device, "multiprocessors", lambda device, n=processors: n)
        out = cuda.conv_backward_weight(grad, x, *sizes, x.dtype)
        plain = reference(grad, x, *sizes, x.dtype)
        check = two_x_rule(out, plain, expected, grad[:, 0].numel())
        assert check.ok, check
        assert out.stride() == expected.stride()
        module.reverse_turns(True)
        assert torch.equal(cuda.conv_backward_weight(grad, x, *sizes, x.dtype), out), "a race"
        module.reverse_turns(False)


def test_what_lies_beside_a_row_is_in_no_gradient(module):
    """The last column's eighth pixel, and windows behind the last, meet what is not finite."""
    x, weight, *_ = arguments((1, 3, 9, 23))
    x[0, :, :, -1] = torch.inf
    grad = torch.ones(1, 64, 5, 12, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    sizes = (list(weight.shape), *GEOMETRY, True)
    out = cuda.conv_backward_weight(grad, x, *sizes, torch.float32)
    assert out.dtype == torch.float32
    reference = OPS["conv_backward_weight"].reference
    expected = reference(grad.double(), x.double(), *sizes, torch.float64)
    assert torch.equal(out.isfinite(), expected.isfinite())


def test_several_groups_of_channels(module):
    args = arguments((1, 3, 9, 9), o=128, dtype=torch.float16, act=None)
    assert_right(args, _cuda_stem.conv_bn_act_max_pool(*args))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_pixel_spoils_what_it_reaches(module, value):
    """Beside each window lies a pixel that is multiplied by nothing, and may be anything."""
    x, weight, *rest = arguments((1, 3, 18, 40), act=None)
    for column in range(12, 20):
        spoiled = x.clone()
        spoiled[0, 1, 8, column] = value
        out = _cuda_stem.conv_bn_act_max_pool(spoiled, weight, *rest)
        expected = eager(OP, (spoiled, weight, *rest))
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())


def test_candidates_are_as_high_as_the_output(module):
    args = arguments((1, 3, 17, 12))
    runs = cuda.candidates(OP, *args)
    assert [*runs] == ["band1", "band2", "band4"]
    results = [run(*args) for run in runs.values()]
    assert all(torch.equal(y, results[0]) for y in results)


def test_bands_leave_no_processor_idle():
    """One image: a row each. Many: bands high enough to hide what each computes again.

    On an H200 these were the fastest but for 256 images without a pool, which were not measured.
    """
    assert _cuda_stem.heuristic(1, 64, 56, 56, True, 132) == 1
    assert _cuda_stem.heuristic(32, 64, 56, 56, True, 132) == 7
    assert _cuda_stem.heuristic(256, 64, 56, 56, True, 132) == 28
    assert _cuda_stem.heuristic(256, 64, 112, 112, False, 132) >= 14


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({0: torch.zeros(1, 3, 9, 9)}, "bfloat16 and float16"),
        ({1: torch.zeros(64, 3, 5, 5)}, "of 7x7, stride 2 and padding 3, got (5, 5)"),
        ({4: (1, 1)}, "of 7x7, stride 2"),
        ({9: (2, 2)}, "by 3x3 of stride 2 and padding 1, got"),
        ({1: torch.zeros(32, 3, 7, 7)}, "to a multiple of 64, got 3 to 32"),
        ({1: torch.zeros(64, 5, 7, 7)}, "up to 4 channels"),
    ],
)
def test_what_it_declines(change, said):
    args = [*arguments((1, 3, 9, 9))]
    for i, value in change.items():
        args[i] = value
    assert said in _cuda_stem.declines(*args)


def test_a_gpu_that_it_was_not_built_for(module):
    x, weight, scale, shift, *rest = arguments((1, 3, 9, 9))
    convolution = (x, weight, scale, shift, None, *GEOMETRY, "relu")
    with pytest.MonkeyPatch.context() as patch:  # ends before the module's own
        patch.setattr(cuda, "_declines_device", lambda index: "was built for 90a")
        assert cuda.supports("conv_bn_act", *convolution) == "was built for 90a"
        assert cuda.supports(OP, x, weight, scale, shift, *rest) == "was built for 90a"


def test_images_that_32_bits_do_not_count(module):
    x = torch.empty(1, 3, 26760, 26760, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(64, 3, 7, 7, dtype=torch.bfloat16, device="meta")
    said = cuda.supports(OP, x, weight, None, None, *GEOMETRY, "relu", *POOL)
    assert said == "has a stem for images of up to 2^31 elements, x is (1, 3, 26760, 26760)"
    size = (2, 64, 5800, 5800)
    x = torch.empty(size, dtype=torch.bfloat16, device="meta")
    assert "(2, 64, 5800, 5800)" in cuda.supports("bn_act_max_pool", x, *[None] * 6, *POOL)
    grad = torch.empty(2, 64, 2900, 2900, dtype=torch.bfloat16, device="meta")
    assert "(2, 64, 5800, 5800)" in cuda.supports("max_pool_backward", grad, None, [*size], *POOL)


def test_bad_arguments(module):
    """Each is named before anything is written."""
    x, y = torch.zeros(81 * 3 + 8, dtype=torch.bfloat16), torch.zeros(9 * 64, dtype=torch.bfloat16)
    weight = _cuda_stem.pack(torch.zeros(64, 3, 7, 7, dtype=torch.bfloat16))
    run, sizes = module.cuda.stem, (1, 9, 9, 3, 64)
    at, rest = (x.data_ptr(), weight.data_ptr(), 0, 0, y.data_ptr()), (True, True, 0)
    run(*at, "bfloat16", *sizes, 1, *rest)
    for said, bad in {
        "dtype: expected bfloat16 or float16, got float32": (
            *at,
            "float32",
            *sizes,
            1,
            True,
            True,
            0,
        ),
        "c: expected 1 to 4, got 5": (*at, "bfloat16", 1, 9, 9, 5, 64, 1, *rest),
        "o: expected a multiple of 64, got 96": (*at, "bfloat16", 1, 9, 9, 3, 96, 1, *rest),
        "band: expected 1": (*at, "bfloat16", *sizes, 0, *rest),
        "x: null pointer": (0, *at[1:], "bfloat16", *sizes, 1, *rest),
        "y: must be aligned": (*at[:4], at[4] + 2, "bfloat16", *sizes, 1, *rest),
        "y: must not overlap x": (at[4], *at[1:], "bfloat16", *sizes, 1, *rest),
    }.items():
        with pytest.raises(ValueError, match=said):
            run(*bad)
