"""The weight's gradient by Winograd's transform: against float64, and beside torch's own."""

import ctypes

import pytest
import torch
from native_maps import each_run

from resnet_fused.backends import _cpu_conv, cpu, native
from resnet_fused.testing import gradient_rule

_C = pytest.importorskip("resnet_fused._C")
if _C.cpu_isa() == "none":
    pytest.skip("no kernels for this processor", allow_module_level=True)

NAMES = native.DTYPE_NAMES
#: (n, c, h, w, o, padding): one pixel, odd sizes, tails of channels, rows cut in parts of columns,
#: unequal and wide padding, several blocks of tiles, an empty batch.
SHAPES = [
    (1, 1, 1, 1, 1, (1, 1)),
    (2, 3, 5, 6, 7, (1, 1)),
    (1, 16, 3, 3, 5, (0, 0)),
    (2, 17, 9, 7, 33, (2, 2)),
    (3, 40, 8, 12, 15, (0, 1)),
    (1, 70, 4, 5, 29, (2, 1)),
    (33, 24, 13, 9, 24, (1, 1)),
    (9, 130, 24, 23, 65, (1, 1)),
    (0, 6, 5, 5, 4, (1, 1)),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def best_isa():
    """Leave the instruction set and the threads as they were."""
    isa, threads = _C.cpu_isa(), torch.get_num_threads()
    yield
    _C.set_cpu_isa(isa)
    torch.set_num_threads(threads)


def draw(shape, dtype=torch.float32):
    """grad and x, channels_last; x as behind a ReLU, so that sums do not cancel."""
    n, c, h, w, o, (ph, pw) = shape
    g = torch.Generator().manual_seed(c + o)
    x = torch.randn(n, c, h, w, generator=g).relu().to(dtype)
    grad = torch.randn(n, o, h + 2 * ph - 2, w + 2 * pw - 2, generator=g).to(dtype)
    return tuple(t.contiguous(memory_format=torch.channels_last) for t in (grad, x))


def guarded(size):
    """``size`` bytes at a 64-byte boundary and a guard behind: (tensor, address)."""
    raw = torch.full((size + 128,), 0x7F, dtype=torch.uint8)
    return raw, raw.data_ptr() + -raw.data_ptr() % 64


def sizes(shape, dtype):
    n, c, h, w, o, padding = shape
    return (NAMES[dtype], n, h, w, c, o, *padding)


def run(grad, x, shape, *, channels_last=False, threads=1):
    """Return the gradient (O, C, 3, 3) and whether the kernel calls it finite."""
    c, o = shape[1], shape[4]
    layout = (o, 3, 3, c) if channels_last else (o, c, 3, 3)
    flat = torch.full((o * c * 9 + 128,), 7.0, dtype=x.dtype)
    out = flat[64:-64]
    size = _C.conv_backward_weight_scratch_bytes(*sizes(shape, x.dtype), threads)
    raw, scratch = guarded(size)
    finite = _C.conv_backward_weight(
        grad.data_ptr(), x.data_ptr(), out.data_ptr(), scratch, size, *sizes(shape, x.dtype),
        channels_last, threads,
    )  # fmt: skip
    assert (flat[:64] == 7).all()
    assert (flat[-64:] == 7).all()
    tail = ctypes.string_at(scratch + size, raw.data_ptr() + raw.numel() - scratch - size)
    assert tail == b"\x7f" * len(tail)
    out = out.view(layout)
    return (out.permute(0, 3, 1, 2) if channels_last else out), finite


def eager(grad, x, shape):
    n, c, _, _, o, padding = shape
    if n == 0:
        return torch.zeros(o, c, 3, 3, dtype=x.dtype)
    weight = torch.empty(o, c, 3, 3, dtype=x.dtype)
    geometry = ([1, 1], padding, [1, 1], False, [0, 0], 1)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, *geometry, [False, True, False]
    )[1]


@each_run
@each_shape
@pytest.mark.parametrize("channels_last", [False, True])
def test_against_float64(shape, isa, dtype, channels_last):
    _C.set_cpu_isa(isa)
    if dtype == torch.bfloat16 and isa != "avx512_bf16":
        pytest.skip("bfloat16 needs AVX-512 BF16")
    grad, x = draw(shape, dtype)
    got, finite = run(grad, x, shape, channels_last=channels_last)
    oracle = eager(grad.double(), x.double(), shape)
    assert finite
    # The backend asks for no fewer terms: what the transform rounds is not less with fewer.
    terms = max(grad[:, 0].numel(), _cpu_conv.FEWEST_TERMS)
    check = gradient_rule(got, eager(grad, x, shape), oracle, terms, dtype)
    assert check.ok, check


@each_shape
def test_the_same_bits_on_any_number_of_threads(shape):
    grad, x = draw(shape)
    one, *others = (run(grad, x, shape, threads=t)[0] for t in (1, 2, 3, 7))
    assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 1], ids=["grad", "x"])
def test_what_is_not_finite_is_told_of(value, where):
    """Wherever it lies in a tile: corners meet one plane of the transform alone."""
    shape = (1, 24, 9, 10, 25, (1, 1))
    for row in range(9):
        for column in range(10):
            maps = draw(shape)
            maps[where][0, -1, row, column] = value
            assert not run(*maps, shape)[1], (row, column)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_lies_where_torch_has_it(value, channels_last):
    grad, x = draw((2, 24, 9, 10, 24, (1, 1)))
    grad[1, 3, 0, 0] = value
    geometry = ([24, 24, 3, 3], [1, 1], [1, 1], [1, 1], 1, channels_last)
    got, want = (
        cpu.conv_backward_weight(grad, x, *geometry),
        cpu._torch_conv.backward_weight(grad, x, *geometry),
    )
    assert 0 < got.isfinite().sum() < got.numel()
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_backend_runs_it_where_it_pays(channels_last):
    grad, x = draw((2, 24, 9, 10, 40, (1, 1)))
    size, same = [40, 24, 3, 3], ([1, 1], [1, 1], [1, 1], 1, channels_last)
    got = _cpu_conv.backward_weight(grad.contiguous(), x.contiguous(), size, *same)
    want = cpu._torch_conv.backward_weight(grad, x, size, *same)
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(got, cpu.conv_backward_weight(grad, x, size, *same))


@pytest.mark.parametrize(
    ("size", "stride", "dilation", "groups"),
    [
        ([24, 24, 3, 3], [1, 2], [1, 1], 1),
        ([24, 24, 3, 3], [1, 1], [2, 1], 1),
        ([48, 24, 3, 3], [1, 1], [1, 1], 2),
        ([24, 24, 3, 1], [1, 1], [1, 1], 1),
        ([24, 16, 3, 3], [1, 1], [1, 1], 1),
    ],
)
def test_the_backend_leaves_the_rest_to_torch(size, stride, dilation, groups):
    x, grad = torch.empty(2, size[1] * groups, 9, 9), torch.empty(2, size[0], 9, 9)
    args = (size, stride, [1, 1], dilation, groups, False)
    assert _cpu_conv.backward_weight(grad, x, *args) is None


def test_the_backend_leaves_few_terms_to_torch():
    grad, x = draw((1, 24, 9, 9, 24, (1, 1)))
    geometry = ([24, 24, 3, 3], [1, 1], [1, 1], [1, 1], 1, False)
    assert _cpu_conv.backward_weight(grad, x, *geometry) is None


def arguments(**changed):
    shape = (1, 4, 5, 5, 6, (1, 1))
    maps = draw(shape)
    out = torch.empty(6 * 4 * 9)
    names = ("dtype", "n", "h", "w", "c", "o", "ph", "pw")
    size = _C.conv_backward_weight_scratch_bytes(*sizes(shape, torch.float32), 1)
    raw, scratch = guarded(size)
    keep = (*maps, out, raw)
    return keep, {
        "grad": maps[0].data_ptr(), "x": maps[1].data_ptr(), "grad_weight": out.data_ptr(),
        "scratch": scratch, "scratch_bytes": size, "channels_last": False, "threads": 1,
        **dict(zip(names, sizes(shape, torch.float32), strict=True)), **changed,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float16"), ("n", -1), ("h", 0), ("w", 0), ("c", 0), ("o", 0), ("o", 2**31 + 1),
        ("ph", -1), ("pw", 2**12 + 1), ("threads", 0), ("grad", 0), ("x", 0), ("grad_weight", 0),
        ("scratch", 0), ("scratch", 32), ("x", 2), ("scratch_bytes", 63),
    ],
)  # fmt: skip
def test_arguments(name, value):
    _keep, given = arguments(**{name: value})
    with pytest.raises(ValueError, match=rf"^{name}: "):
        _C.conv_backward_weight(**given)


def test_arguments_that_do_not_fit_each_other():
    _keep, given = arguments()
    for name, other in (("grad_weight", "x"), ("grad_weight", "grad"), ("scratch", "grad")):
        with pytest.raises(ValueError, match=f"^{name}: must not overlap {other}"):
            _C.conv_backward_weight(**given | {name: given[other]})
    with pytest.raises(ValueError, match=r"^kh: the kernel is taller"):
        _C.conv_backward_weight(**given | {"h": 1, "ph": 0})
    with pytest.raises(ValueError, match=r"^o: the weight is too large"):
        _C.conv_backward_weight(**given | {"n": 0, "c": 2**31, "o": 2**31})
    with pytest.raises(ValueError, match=r"^threads: "):
        _C.conv_backward_weight_scratch_bytes("float32", 1, 5, 5, 4, 6, 1, 1, 0)
