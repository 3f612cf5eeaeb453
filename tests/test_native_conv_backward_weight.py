"""The weight's gradient, by Winograd's transform and directly: against float64, beside torch's."""

import ctypes
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_maps import DTYPES, each_run

from resnet_fused.backends import _cpu_weight_gradient, cpu, native
from resnet_fused.testing import gradient_rule

_C = pytest.importorskip("resnet_fused._C")
if _C.cpu_isa() == "none":
    pytest.skip("no kernels for this processor", allow_module_level=True)

NAMES = native.DTYPE_NAMES


class Case(NamedTuple):
    """A convolution, and how its weight's gradient is summed."""

    algorithm: str
    n: int
    c: int
    h: int
    w: int
    o: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def output(self):
        sides = zip((self.h, self.w), *self[6:], strict=True)
        return tuple((s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in sides)

    def sizes(self, dtype):
        """What the bindings take: dtype, algorithm, n, h, w, c, o, geometry, groups."""
        geometry = (x for pair in self[6:] for x in pair)
        return (
            NAMES[dtype], self.algorithm, self.n, self.h, self.w, self.c, self.o, *geometry, 1
        )  # fmt: skip


#: One pixel, odd sizes, tails of channels, rows cut in parts of columns, unequal and wide padding,
#: several blocks of tiles, an empty batch; then for the direct sum: 1x1, with strides, several runs
#: of pixels, several units of channels and of taps, an odd pixel at a block's end, dilation, wide
#: padding.
CASES = [
    Case("winograd4", 1, 1, 1, 1, 1),
    Case("winograd4", 2, 3, 5, 6, 7),
    Case("winograd4", 1, 16, 3, 3, 5, padding=(0, 0)),
    Case("winograd4", 2, 17, 9, 7, 33, padding=(2, 2)),
    Case("winograd4", 3, 40, 8, 12, 15, padding=(0, 1)),
    Case("winograd4", 1, 70, 4, 5, 29, padding=(2, 1)),
    Case("winograd4", 33, 24, 13, 9, 24),
    Case("winograd4", 9, 130, 24, 23, 65),
    Case("winograd4", 0, 6, 5, 5, 4),
    Case("direct", 1, 1, 1, 1, 1, (1, 1), padding=(0, 0)),
    Case("direct", 3, 5, 3, 7, 9, (1, 1), padding=(0, 0)),
    Case("direct", 2, 64, 30, 29, 40, (1, 1), padding=(0, 0)),
    Case("direct", 5, 33, 17, 15, 300, (1, 1), (2, 2), (0, 0)),
    Case("direct", 1, 290, 7, 9, 270, (1, 1), (1, 3), (0, 0)),
    Case("direct", 3, 300, 9, 8, 31),
    Case("direct", 2, 40, 13, 11, 65, stride=(2, 2)),
    Case("direct", 2, 3, 23, 21, 16, (7, 7), (2, 2), (3, 3)),
    Case("direct", 2, 19, 12, 14, 35, (3, 2), (1, 2), (2, 0), (2, 3)),
    Case("direct", 1, 8, 4, 5, 6, (1, 1), (1, 2), (3, 2)),
    Case("direct", 0, 6, 5, 5, 4),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
#: The direct sum on the tile registers, where the processor has them.
AMX = [c._replace(algorithm="amx") for c in CASES if c.algorithm == "direct"]
#: Several blocks of pixels in a run; half a tile; runs and parts of several blocks each.
AMX += [
    Case("amx", 2, 70, 33, 32, 50),
    Case("amx", 1, 33, 16, 32, 17, (1, 1), padding=(0, 0)),
    Case("amx", 3, 70, 30, 29, 300, (1, 1), padding=(0, 0)),
]
needs_amx = pytest.mark.skipif(_C.cpu_isa() != "amx_bf16", reason="this processor has no AMX")
each_of_amx = pytest.mark.parametrize("case", AMX, ids=str)


@pytest.fixture(autouse=True)
def best_isa():
    """Leave the instruction set and the threads as they were."""
    isa, threads = _C.cpu_isa(), torch.get_num_threads()
    yield
    _C.set_cpu_isa(isa)
    torch.set_num_threads(threads)


def draw(case, dtype=torch.float32):
    """grad and x, channels_last; x as behind a ReLU, so that sums do not cancel."""
    g = torch.Generator().manual_seed(case.c + case.o)
    x = torch.randn(case.n, case.c, case.h, case.w, generator=g).relu().to(dtype)
    grad = torch.randn(case.n, case.o, *case.output, generator=g).to(dtype)
    return tuple(t.contiguous(memory_format=torch.channels_last) for t in (grad, x))


def guarded(size):
    """``size`` bytes at a 64-byte boundary and a guard behind: (tensor, address)."""
    raw = torch.full((size + 128,), 0x7F, dtype=torch.uint8)
    return raw, raw.data_ptr() + -raw.data_ptr() % 64


def run(grad, x, case, *, channels_last=False, wide=False, threads=1):
    """Return the gradient (O, C, KH, KW) and whether the kernel calls it right as it is."""
    c, o, (kh, kw) = case.c, case.o, case.kernel
    layout = (o, kh, kw, c) if channels_last else (o, c, kh, kw)
    flat = torch.full((o * c * kh * kw + 128,), 7.0, dtype=torch.float32 if wide else x.dtype)
    out = flat[64:-64]
    sizes = case.sizes(x.dtype)
    size = _C.conv_backward_weight_scratch_bytes(*sizes, threads)
    raw, scratch = guarded(size)
    right = _C.conv_backward_weight(
        grad.data_ptr(), x.data_ptr(), out.data_ptr(), scratch, size, *sizes, channels_last, wide,
        threads,
    )  # fmt: skip
    assert (flat[:64] == 7).all()
    assert (flat[-64:] == 7).all()
    tail = ctypes.string_at(scratch + size, raw.data_ptr() + raw.numel() - scratch - size)
    assert tail == b"\x7f" * len(tail)
    out = out.view(layout)
    return (out.permute(0, 3, 1, 2) if channels_last else out), right


def eager(grad, x, case):
    size = (case.o, case.c, *case.kernel)
    if case.n == 0:
        return torch.zeros(size, dtype=x.dtype)
    weight = torch.empty(size, dtype=x.dtype)
    geometry = (case.stride, case.padding, case.dilation, False, [0, 0], 1)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, *geometry, [False, True, False]
    )[1]


def assert_right(case, dtype, *, channels_last=False, threads=1):
    grad, x = draw(case, dtype)
    got, right = run(grad, x, case, channels_last=channels_last, threads=threads)
    oracle = eager(grad.double(), x.double(), case)
    assert right
    terms = grad[:, 0].numel()
    if case.algorithm == "winograd4":
        # The backend asks for no fewer terms: what the transform rounds is not less with fewer.
        terms = max(terms, _cpu_weight_gradient.FEWEST_TERMS)
    check = gradient_rule(got, eager(grad, x, case), oracle, terms, dtype)
    assert check.ok, check


@each_run
@each_case
@pytest.mark.parametrize("channels_last", [False, True])
def test_against_float64(case, isa, dtype, channels_last):
    _C.set_cpu_isa(isa)
    assert_right(case, dtype, channels_last=channels_last)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_drawn_convolutions(data):
    def pair(low, high):
        return tuple(data.draw(st.integers(low, high)) for _ in range(2))

    kernel, stride, padding, dilation = pair(1, 4), pair(1, 3), pair(0, 4), pair(1, 2)
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    h, w = (data.draw(st.integers(low, low + 9)) for low in least)
    n, c, o = (data.draw(st.integers(1, high)) for high in (3, 80, 60))
    kinds = [("direct", dtype) for dtype in DTYPES]
    kinds += [("amx", torch.bfloat16)] * (_C.cpu_isa() == "amx_bf16")
    algorithm, dtype = data.draw(st.sampled_from(kinds))
    case = Case(algorithm, n, c, h, w, o, kernel, stride, padding, dilation)
    assert_right(case, dtype, threads=data.draw(st.integers(1, 3)))


@needs_amx
@each_of_amx
@pytest.mark.parametrize("channels_last", [False, True])
def test_on_amx_against_float64(case, channels_last):
    assert_right(case, torch.bfloat16, channels_last=channels_last)
    maps = draw(case, torch.bfloat16)
    got, *others = (run(*maps, case, wide=True, threads=t)[0] for t in (1, 2, 3, 7))
    assert all(torch.equal(got, other) for other in others)
    assert torch.equal(got.bfloat16(), run(*maps, case)[0])


@needs_amx
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1], ids=["grad", "x"])
def test_amx_keeps_what_is_not_finite_in_place(value, where):
    case = Case("amx", 2, 40, 5, 6, 20)
    maps = draw(case, torch.bfloat16)
    maps[where][1, 3, 0, 0] = value
    got, right = run(*maps, case)
    want = eager(*(t.double() for t in maps), case).bfloat16()
    assert right
    assert 0 < got.isfinite().sum() < got.numel()
    torch.testing.assert_close(got, want, equal_nan=True, rtol=2e-2, atol=2e-2)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_wide_gradient_is_what_the_other_rounds(case, channels_last, dtype):
    maps = draw(case, dtype)
    wide, right = run(*maps, case, channels_last=channels_last, wide=True)
    narrow, right_too = run(*maps, case, channels_last=channels_last)
    assert right == right_too
    assert torch.equal(wide.to(dtype), narrow)
    assert case.n * case.c * case.o < 100 or not torch.equal(wide, narrow.float())


@each_case
def test_the_same_bits_on_any_number_of_threads(case):
    grad, x = draw(case)
    one, *others = (run(grad, x, case, threads=t)[0] for t in (1, 2, 3, 7))
    assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 1], ids=["grad", "x"])
def test_what_is_not_finite_is_told_of(value, where):
    """Wherever it lies in a tile: corners meet one plane of the transform alone."""
    case = Case("winograd4", 1, 24, 9, 10, 25)
    for row in range(9):
        for column in range(10):
            maps = draw(case)
            maps[where][0, -1, row, column] = value
            assert not run(*maps, case)[1], (row, column)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_lies_where_torch_has_it(value, channels_last):
    grad, x = draw(Case("winograd4", 2, 24, 9, 10, 24))
    grad[1, 3, 0, 0] = value
    geometry = ([24, 24, 3, 3], [1, 1], [1, 1], [1, 1], 1, channels_last, torch.float32)
    got, want = (
        cpu.conv_backward_weight(grad, x, *geometry),
        cpu._torch_conv.backward_weight(grad, x, *geometry),
    )
    assert 0 < got.isfinite().sum() < got.numel()
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", NAMES)
def test_the_direct_sum_keeps_what_is_not_finite_in_place(value, dtype):
    case = Case("direct", 2, 40, 5, 6, 20)
    grad, x = draw(case)
    x[1, 3, 0, 0] = value
    got, right = run(grad, x, case)
    want = eager(grad, x, case)
    assert right
    assert 0 < got.isfinite().sum() < got.numel()
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("case", "algorithm"),
    [
        (Case("", 2, 24, 9, 10, 40), "winograd4"),
        (Case("", 1, 32, 9, 9, 24), "direct"),
        (Case("", 2, 32, 9, 9, 24, stride=(1, 2)), "direct"),
        (Case("", 2, 32, 9, 9, 24, dilation=(2, 1)), "direct"),
        (Case("", 2, 3, 9, 9, 5, (1, 1), (2, 2), (0, 0)), "direct"),
    ],
)
def test_the_backend_runs_it_where_it_pays(case, algorithm, channels_last):
    grad, x = draw(case)
    size, *geometry = (list(v) for v in ((case.o, case.c, *case.kernel), *case[7:]))
    same = (*geometry, 1, channels_last, torch.float32)
    assert _cpu_weight_gradient._gradient_algorithm(grad, size, *geometry[::2], 1) == algorithm
    got = _cpu_weight_gradient.backward_weight(grad.contiguous(), x.contiguous(), size, *same)
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
        ([48, 24, 1, 1], [1, 1], [1, 1], 2),
        ([24, 24, 3, 1], [1, 1], [1, 1], 1),
        ([24, 16, 3, 3], [1, 1], [1, 1], 1),
    ],
)
def test_the_backend_leaves_the_rest_to_torch(size, stride, dilation, groups):
    x, grad = torch.empty(2, size[1] * groups, 9, 9), torch.empty(2, size[0], 9, 9)
    args = (size, stride, [1, 1], dilation, groups, False, torch.float32)
    assert _cpu_weight_gradient.backward_weight(grad, x, *args) is None


def test_the_backend_leaves_few_terms_to_torch():
    grad, x = draw(Case("winograd4", 1, 24, 9, 9, 24))
    geometry = ([24, 24, 3, 3], [1, 1], [1, 1], [1, 1], 1, False, torch.float32)
    assert _cpu_weight_gradient.backward_weight(grad, x, *geometry) is None


def arguments(**changed):
    case = Case("winograd4", 1, 4, 5, 5, 6)
    maps = draw(case)
    out = torch.empty(6 * 4 * 9)
    names = (
        "dtype", "algorithm", "n", "h", "w", "c", "o",
        "kh", "kw", "sh", "sw", "ph", "pw", "dh", "dw", "groups",
    )  # fmt: skip
    size = _C.conv_backward_weight_scratch_bytes(*case.sizes(torch.float32), 1)
    raw, scratch = guarded(size)
    keep = (*maps, out, raw)
    return keep, {
        "grad": maps[0].data_ptr(), "x": maps[1].data_ptr(), "grad_weight": out.data_ptr(),
        "scratch": scratch, "scratch_bytes": size, "channels_last": False,
        "wide": False, "threads": 1,
        **dict(zip(names, case.sizes(torch.float32), strict=True)), **changed,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float64"), ("algorithm", "winograd2"), ("sw", 2), ("kh", 0),
        ("dh", 0), ("n", -1), ("h", 0), ("w", 0), ("c", 0), ("o", 0), ("o", 2**31 + 1),
        ("ph", -1), ("pw", 2**12 + 1), ("threads", 0), ("grad", 0), ("x", 0), ("grad_weight", 0),
        ("scratch", 0), ("scratch", 32), ("x", 2), ("scratch_bytes", 63),
    ],
)  # fmt: skip
def test_arguments(name, value):
    _keep, given = arguments(**{name: value})
    # A shape that Winograd's transform does not take is the algorithm's fault.
    named = "algorithm" if name == "sw" else name
    with pytest.raises(ValueError, match=rf"^{named}: "):
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
    with pytest.raises(ValueError, match=r"^algorithm: direct cannot run this shape"):
        _C.conv_backward_weight(**given | {"algorithm": "direct", "groups": 2})
    with pytest.raises(ValueError, match=r"^threads: "):
        _C.conv_backward_weight_scratch_bytes(*CASES[0].sizes(torch.float32), 0)
