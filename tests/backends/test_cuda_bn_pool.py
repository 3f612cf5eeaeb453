"""BatchNorm's backward that gathers through the pool, compiled as C++ and run on the host."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from native_maps import at_places
from test_cuda_on_host import _OnGpu as OnGpu
from test_cuda_on_host import each_dtype, kernels_of, maps

from resnet_fused.backends import ORDER, _outputs, _tuned, choose, cuda
from resnet_fused.backends import _training_kernels as kernels
from resnet_fused.ops import OPS, _bn
from resnet_fused.testing import to_float64, two_x_rule

sys.path.append(str(Path(__file__).parents[1] / "native"))
import on_host

OP = "bn_act_max_pool_backward"
WINDOWS = [(3, 2, 1), (3, 2, 0), (2, 2, 1), (3, 1, 1), (5, 3, 2)]


@pytest.fixture
def module():
    module = on_host.load()
    with kernels_of(module):
        yield module
    module.reverse_turns(False)


def arguments(shape, dtype, window, act="relu", wanted=(True, True, True)):
    """The op's arguments, of a forward by the kernels."""
    (x,) = maps(shape, dtype, 1)
    x = x * 2 + 1
    mean, var = _bn.statistics(x)
    weight, bias = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(1))
    pool = tuple((side, side) for side in window)
    y, *of_pool = cuda.bn_act_max_pool(x, mean, var, weight, bias, 1e-5, act, *pool)
    (grad,) = maps(y.shape, dtype, 1)
    return grad, *of_pool, x, mean, var, weight, bias, 1e-5, act, *pool, wanted


def run(args):
    return cuda.bn_act_max_pool_backward(*args)


def assert_right(args):
    plain, exact = OPS[OP].reference(*args), OPS[OP].reference(*to_float64(args))
    largest = float(args[0].abs().max()) * float((args[6].abs() / args[5].sqrt()).max())
    for got, p, e in zip(run(args), plain, exact, strict=True):
        terms = max(args[3].numel() // args[3].shape[1], 1)
        check = two_x_rule(got, p, e, terms, None, largest)
        assert check.ok, check


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("size", [(5, 5), (6, 9), (3, 14)], ids=str)
@pytest.mark.parametrize("channels", [7, 72])
def test_every_edge(module, window, size, channels):
    """Squares of pixels stick out on any side, and so do the windows over them."""
    for dtype, act in itertools.product((torch.float16, torch.float32), ("relu", None)):
        assert_right(arguments((2, channels, *size), dtype, window, act))


@pytest.mark.parametrize("window", WINDOWS[:2], ids=str)
@pytest.mark.parametrize("shape", [(300, 8, 3, 3), (5, 64, 16, 17), (1, 264, 9, 40)], ids=str)
def test_squares_are_counted_on_over_rows_and_images(module, shape, window):
    """A step is several images, a few rows and columns, or a part of a row; parts are several."""
    assert_right(arguments(shape, torch.bfloat16, window))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_mask_is_that_of_the_two_passes(module, window):
    """In float32 nothing between is rounded: but for the order of sums the same."""
    args = arguments((3, 20, 9, 8), torch.float32, window)
    grad, index, taken, x, *vectors, eps, _, _, _, _, wanted = args
    grad_a = kernels.max_pool_backward(grad, index, x.shape, *window)
    expected = kernels.bn_act_backward(
        grad_a, x, *vectors, eps, None, True, [*wanted, *[False] * 2]
    )
    assert not taken.numel()
    by_kernel = kernels.bn_act_max_pool_backward(
        grad, index, at_places(x, index, *window), x, *vectors, eps, *window, True, wanted
    )
    for found in (run(args), by_kernel):
        for got, same in zip(found, expected, strict=False):
            torch.testing.assert_close(got, same, rtol=1e-5, atol=1e-5)


@each_dtype
@pytest.mark.parametrize("shape", [(4, 64, 16, 16), (2, 17, 9, 5), (300, 8, 3, 3)], ids=str)
def test_threads_in_reverse_give_the_same_bits(module, shape, dtype):
    for window in WINDOWS[::2]:
        args = arguments(shape, dtype, window)
        forwards = run(args)
        module.reverse_turns(True)
        assert all(map(torch.equal, forwards, run(args)))
        module.reverse_turns(False)


@each_dtype
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("place", [0, 3])
def test_nan_spoils_its_channel_alone(module, window, dtype, place):
    """In the gradient the channel's sums, and so all of it; in x the statistics too."""
    args = list(arguments((2, 9, 7, 6), dtype, window, None))
    args[place] = args[place].clone()
    args[place][1, 3, 1, 1] = torch.nan
    args[4:6] = _bn.statistics(args[3])
    args[1:3] = cuda.bn_act_max_pool(*args[3:-1])[1:]
    found = run(args)
    for got, plain in zip(found, OPS[OP].reference(*args), strict=True):
        assert torch.equal(got.isnan(), plain.isnan())
    assert torch.equal(found[0].isnan().any(3).any(2).any(0), torch.arange(9) == 3)
    assert found[0][:, 3].isnan().all()
    assert found[1].isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("channels", [8, 5])
def test_no_images(module, channels):
    empty = torch.zeros(0, channels, 6, 6), torch.zeros(0, channels, 3, 3)
    vector = torch.ones(channels)
    index = empty[1].byte()
    args = (empty[1], index, empty[1], empty[0], vector, vector, vector, vector, 1e-5, "relu")
    pool = ((3, 3), (2, 2), (1, 1))
    grad_x, grad_weight, grad_bias = run((*args, *pool, (True, True, True)))
    assert grad_x.shape == empty[0].shape
    assert not grad_weight.any()
    assert not grad_bias.any()


def test_views_that_are_not_aligned_take_the_narrow_path(module):
    args = arguments((2, 16, 6, 6), torch.bfloat16, (3, 2, 1))
    expected = run(args)
    for place in (0, 1, 2, 3, 4, 6):
        given, t = list(args), args[place]
        flat = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
        given[place] = flat.as_strided(t.shape, t.stride()).copy_(t)
        for got, same in zip(run(given), expected, strict=True):
            torch.testing.assert_close(got, same, rtol=1e-5, atol=1e-5)


# --- what is chosen and what is refused ----------------------------------------------------------


def test_it_runs_where_nothing_was_measured(module, monkeypatch):
    monkeypatch.setattr(_tuned, "lookup", lambda op, args: None)
    grad, *rest = arguments((2, 16, 6, 6), torch.bfloat16, (3, 2, 1))
    monkeypatch.setattr(ORDER["cuda"], "supports", lambda op, x, *args: None)
    assert choose(OP, OnGpu(grad), *rest) is cuda.bn_act_max_pool_backward


def test_pools_it_does_not_take(module):
    grad, index, taken, x, *rest, _, _, _, wanted = arguments(
        (2, 16, 6, 6), torch.bfloat16, (3, 2, 1)
    )
    pool = ((3, 2), (2, 2), (1, 1))
    assert "square pools" in cuda.supports(OP, grad, index, taken, x, *rest, *pool, wanted)
    x = torch.empty(2, 64, 5800, 5800, dtype=torch.bfloat16, device="meta")
    pool = ((3, 3), (2, 2), (1, 1))
    assert "(2, 64, 5800, 5800)" in cuda.supports(OP, grad, index, taken, x, *rest, *pool, wanted)


@pytest.mark.parametrize(
    ("name", "place", "change"),
    [
        ("grad", 0, lambda t: t.float()),
        ("grad", 0, lambda t: t[:, :, 1:]),
        ("index", 1, lambda t: t.int()),
        ("index", 1, lambda t: t[..., 1:]),
        ("taken", 2, lambda t: t[:, 1:]),
        ("taken", 2, lambda t: t.float()),
        ("mean", 4, lambda t: t[1:]),
    ],
)
def test_tensors_that_do_not_fit(module, name, place, change):
    args = list(arguments((2, 16, 6, 6), torch.bfloat16, (3, 2, 1)))
    args[place] = change(args[place])
    with pytest.raises(ValueError, match=rf"^{name}: "):
        run(args)


def test_addresses_and_sizes_are_checked(module):
    size = module.cuda.bn_act_max_pool_backward_scratch_bytes(16, 4)
    memory = _outputs.scratch(8192, torch.device("cpu"))
    memory.zero_()
    start = memory.data_ptr()
    names = (
        "grad",
        "index",
        "taken",
        "x",
        "mean",
        "var",
        "weight",
        "bias",
        "grad_x",
        "grad_weight",
    )
    good = {name: start + 512 * i for i, name in enumerate((*names, "grad_bias", "scratch"))}
    good |= {"scratch_bytes": size, "dtype": "float32", "n": 1, "h": 4, "w": 4, "c": 4, "k": 2,
             "s": 2, "p": 0, "eps": 1e-5, "relu": True, "stream": 0}  # fmt: skip
    run = module.cuda.bn_act_max_pool_backward
    run(**good)
    run(**{**good, "weight": 0, "bias": 0, "grad_x": 0, "grad_weight": 0, "grad_bias": 0})
    for name in ("grad", "index", "taken", "x", "mean", "var", "scratch"):
        with pytest.raises(ValueError, match=f"^{name}: null"):
            run(**{**good, name: 0})
    for name in ("grad", "taken", "x", "mean", "grad_x", "grad_weight", "grad_bias", "scratch"):
        with pytest.raises(ValueError, match=f"^{name}: must be aligned"):
            run(**{**good, name: good[name] + 1})
    for name in ("grad", "index", "x"):
        with pytest.raises(ValueError, match=f"^grad_x: must not overlap {name}"):
            run(**{**good, "grad_x": good[name]})
    for name, value in (("n", 0), ("c", 0), ("k", 9), ("p", 2), ("scratch_bytes", size - 1)):
        with pytest.raises(ValueError, match=f"^{name}: "):
            run(**{**good, name: value})
