"""The native CPU kernels alone: every algorithm and instruction set against a float64 oracle."""

import ctypes
import itertools
import math

import pytest
import torch

_C = pytest.importorskip("resnet_fused._C")

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
ISAS = ["avx2", "avx512", "avx512_bf16", "amx_bf16"]
ISAS = ISAS[: ISAS.index(_C.cpu_isa()) + 1] if _C.cpu_isa() in ISAS else []


@pytest.fixture(autouse=True)
def best_isa():
    """Leave the instruction set and the threads as they were."""
    isa, threads = _C.cpu_isa(), torch.get_num_threads()
    yield
    _C.set_cpu_isa(isa)
    torch.set_num_threads(threads)


def aligned(n, fill=0x7F):
    """n bytes at a 64-byte boundary, followed by a guard; (tensor, address)."""
    raw = torch.full((n + 128,), fill, dtype=torch.uint8)
    at = -raw.data_ptr() % 64
    return raw, raw.data_ptr() + at


def nhwc(t):
    return t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).contiguous()


def native(
    x,
    w,
    algorithm,
    scale=None,
    shift=None,
    residual=None,
    relu=False,
    *,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    inplace=False,
    threads=None,
):
    """Run one algorithm on NCHW tensors; NCHW out."""
    n, c, h, wd = x.shape
    o, cg, kh, kw = w.shape
    name = NAMES[x.dtype]
    shape = (n, h, wd, c, o, kh, kw, *stride, *padding, *dilation, groups)
    oh = (h + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (wd + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    xs, w = nhwc(x), w.contiguous()
    layout = (name, algorithm, o, cg, kh, kw, groups)
    packed_bytes = _C.conv_bn_act_packed_bytes(*layout)
    _keep, packed = aligned(packed_bytes)
    along = (cg * kh * kw, kh * kw, 1)
    _C.conv_bn_act_pack(w.data_ptr(), packed, packed_bytes, *layout, *along)
    size = _C.conv_bn_act_scratch_bytes(name, algorithm, *shape, threads or torch.get_num_threads())
    keep2, scratch = aligned(size)
    r = None if residual is None else nhwc(residual)
    guard = 256
    flat = torch.full((n * oh * ow * o + 2 * guard,), 7.0, dtype=x.dtype)
    y = flat[guard : guard + n * oh * ow * o].view(n, oh, ow, o)
    if inplace:
        y.copy_(r)
        r = y
    pointers = [0 if t is None else t.data_ptr() for t in (scale, shift, r, y)]
    _C.conv_bn_act(
        xs.data_ptr(), packed, packed_bytes, *pointers, scratch, size, name, algorithm, *shape, relu
    )
    assert (flat[:guard] == 7).all()
    assert (flat[guard + y.numel() :] == 7).all()
    tail = ctypes.string_at(scratch + size, keep2.data_ptr() + keep2.numel() - scratch - size)
    assert tail == b"\x7f" * len(tail)
    return y.permute(0, 3, 1, 2)


def eager(x, w, scale, shift, residual, relu, conv):
    y = torch.nn.functional.conv2d(x, w, None, **conv)
    if scale is not None:
        y = y * scale.to(y.dtype).view(1, -1, 1, 1)
    if shift is not None:
        y = y + shift.to(y.dtype).view(1, -1, 1, 1)
    if residual is not None:
        y = y + residual
    return torch.relu(y) if relu else y


def algorithms(x, w, conv):
    n, c, h, wd = x.shape
    o, _, kh, kw = w.shape
    names = _C.conv_bn_act_algorithms(
        NAMES[x.dtype],
        n,
        h,
        wd,
        c,
        o,
        kh,
        kw,
        *conv["stride"],
        *conv["padding"],
        *conv["dilation"],
        conv["groups"],
    )
    assert "direct" in names
    if _C.cpu_isa() != "amx_bf16" or x.dtype != torch.bfloat16:
        return names
    # Beside its own, AMX has what runs without it, and is tested without it.
    runs = conv["groups"] == 1 and (c % 32 == 0 or kw == 1 or conv["dilation"][1] == 1)
    assert runs == ("amx" in names)
    return ["amx"] if runs else []


def make(n, c, h, w, o, k, stride=1, padding=0, dilation=1, groups=1, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def pair(v):
        return v if isinstance(v, tuple) else (v, v)

    kh, kw = pair(k)
    conv = {
        "stride": pair(stride),
        "padding": pair(padding),
        "dilation": pair(dilation),
        "groups": groups,
    }
    x = torch.randn(n, c, h, w, generator=g).to(dtype)
    weight = (
        torch.randn(o, c // groups, kh, kw, generator=g) / math.sqrt(c // groups * kh * kw)
    ).to(dtype)
    scale = torch.randn(o, generator=g)
    shift = torch.randn(o, generator=g)
    y = torch.nn.functional.conv2d(x, weight, None, **conv)
    residual = torch.randn(y.shape, generator=g).to(dtype)
    return x, weight, scale, shift, residual, conv


def check(x, w, scale, shift, residual, relu, conv, got):
    up = [None if t is None else t.double() for t in (x, w, scale, shift, residual)]
    oracle = eager(*up, relu, conv)
    reference = eager(x, w, scale, shift, residual, relu, conv)
    assert got.shape == oracle.shape
    if oracle.numel() == 0:
        return
    limit = 2 * (reference.double() - oracle).abs().max() + torch.finfo(
        x.dtype
    ).eps * oracle.abs().max() * math.sqrt(w[0].numel())
    assert (got.double() - oracle).abs().max() <= limit


# (n, c, h, w, o, kernel, stride, padding, dilation, groups)
SHAPES = {
    "1x1": (2, 16, 7, 5, 32, 1),
    "1x1 odd channels": (1, 13, 9, 9, 37, 1),
    "1x1 wide": (1, 64, 14, 14, 96, 1),
    "1x1 stride 2": (2, 32, 14, 14, 64, 1, 2),
    "1x1 stride 3, padded, odd": (1, 5, 11, 8, 18, 1, 3, 2),
    "1x1 one pixel": (1, 64, 1, 1, 100, 1),
    "1x1 many panels": (1, 1024, 7, 7, 300, 1),
    "3x3": (2, 16, 12, 20, 32, 3, 1, 1),
    "3x3 7x7 map": (3, 32, 7, 7, 48, 3, 1, 1),
    "3x3 odd": (1, 7, 13, 17, 19, 3, 1, 1),
    "3x3 unpadded": (1, 8, 10, 11, 16, 3),
    "3x3 one pixel": (1, 16, 1, 1, 16, 3, 1, 1),
    "3x3 two rows": (1, 16, 2, 3, 16, 3, 1, 1),
    "3x3 stride 2": (2, 24, 15, 14, 40, 3, 2, 1),
    "3x3 dilation 2": (1, 16, 14, 14, 32, 3, 1, 2, 2),
    "3x3 blocks": (1, 64, 40, 44, 64, 3, 1, 1),
    "3x3 many panels": (1, 96, 7, 7, 330, 3, 1, 1),
    "3x3 deep": (1, 256, 14, 14, 64, 3, 1, 1),
    "3x3 padding 3": (1, 8, 6, 6, 16, 3, 1, 3),
    "1x3 and strides": (1, 6, 9, 12, 16, (1, 3), (1, 2), (0, 1)),
    "5x2 dilation (2,3)": (2, 6, 12, 13, 10, (5, 2), (2, 1), (3, 2), (2, 3)),
    "3x3 stride 3, dilation 2": (2, 32, 20, 23, 24, 3, 3, 2, 2),
    "5x4 stride (4,6), dilation (6,4)": (1, 64, 33, 30, 24, (5, 4), (4, 6), (7, 2), (6, 4)),
    "3x3 stride 2, images": (5, 64, 7, 7, 40, 3, 2, 1),
    "stem": (2, 3, 40, 46, 64, 7, 2, 3),
    "stem 1 channel": (1, 1, 28, 28, 16, 5, 1, 2),
    "groups 4": (1, 32, 9, 9, 32, 3, 1, 1, 1, 4),
    "groups odd": (2, 15, 8, 9, 21, 3, 2, 1, 1, 3),
    "groups 1x1": (1, 64, 6, 6, 96, 1, 1, 0, 1, 2),
    "resnext": (1, 128, 14, 14, 128, 3, 1, 1, 1, 32),
    "depthwise": (2, 33, 9, 10, 33, 3, 1, 1, 1, 33),
    "depthwise stride 2": (1, 64, 15, 15, 64, 5, 2, 2, 1, 64),
    "depthwise multiplier": (1, 8, 9, 9, 16, 3, 1, 1, 1, 8),
    "long row": (1, 160, 3, 600, 16, 3, 1, 1),
    "no images": (0, 16, 8, 8, 16, 3, 1, 1),
}
RUNS = [
    (isa, dtype) for isa in ISAS for dtype in NAMES if isa != "amx_bf16" or dtype == torch.bfloat16
]


@pytest.mark.parametrize(("isa", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_oracle(shape, isa, dtype):
    _C.set_cpu_isa(isa)
    x, w, scale, shift, residual, conv = make(*SHAPES[shape], dtype=dtype)
    for name, threads in itertools.product(algorithms(x, w, conv), (1, 2)):
        torch.set_num_threads(threads)
        got = native(x, w, name, scale, shift, residual, True, **conv)
        check(x, w, scale, shift, residual, True, conv, got)


@pytest.mark.parametrize(("isa", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize("shape", ["1x1 odd channels", "3x3", "groups odd", "depthwise"])
def test_epilogues(shape, isa, dtype):
    """Each of scale, shift, residual and ReLU with and without; in place gives the same bits."""
    _C.set_cpu_isa(isa)
    x, w, scale, shift, residual, conv = make(*SHAPES[shape], dtype=dtype)
    for name in algorithms(x, w, conv):
        for have in itertools.product((False, True), repeat=4):
            a, b, r = (
                t if h else None for t, h in zip((scale, shift, residual), have, strict=False)
            )
            got = native(x, w, name, a, b, r, have[3], **conv)
            check(x, w, a, b, r, have[3], conv, got)
            if r is not None:
                assert torch.equal(got, native(x, w, name, a, b, r, have[3], **conv, inplace=True))


@pytest.mark.parametrize(("isa", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "shape", ["1x1 odd channels", "3x3", "3x3 odd", "3x3 7x7 map", "stem", "depthwise"]
)
def test_not_finite(shape, value, isa, dtype):
    """NaN and infinities reach exactly the outputs they reach in a direct convolution."""
    _C.set_cpu_isa(isa)
    x, w, scale, shift, residual, conv = make(*SHAPES[shape], dtype=dtype)
    x = x.abs() + 0.01
    x[0, x.shape[1] // 2, x.shape[2] // 2, x.shape[3] // 2] = value
    x[-1, 0, 0, -1] = value
    for relu in (False, True):
        want = eager(
            x.double(), w.double(), scale.double(), shift.double(), residual.double(), relu, conv
        )
        for name in algorithms(x, w, conv):
            got = native(x, w, name, scale, shift, residual, relu, **conv).double()
            bad = ~want.isfinite()
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got[bad].nan_to_num(nan=0.0), want[bad].nan_to_num(nan=0.0))
            assert (got - want)[~bad].abs().max() <= 0.05 * want[~bad].abs().max()


@pytest.mark.parametrize("isa", [isa for isa, dtype in RUNS if dtype == torch.float32])
@pytest.mark.parametrize("shape", ["3x3", "3x3 odd", "3x3 7x7 map"])
def test_values_too_large_for_a_transform(shape, isa):
    """Where a transform overflows and the convolution does not, the tile is computed directly."""
    _C.set_cpu_isa(isa)
    x, w, scale, shift, _, conv = make(*SHAPES[shape])
    x = x / x.abs().max() * 3e38
    w = w / w.abs().sum((1, 2, 3), keepdim=True)
    one, none = torch.ones_like(scale), torch.zeros_like(shift)
    want = eager(x.double(), w.double(), one.double(), none.double(), None, False, conv)
    for name in algorithms(x, w, conv):
        got = native(x, w, name, one, none, None, False, **conv).double()
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(("isa", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize(
    "shape", ["1x1 wide", "3x3 blocks", "3x3 7x7 map", "3x3 many panels", "stem"]
)
def test_bitwise_repeatable(shape, isa, dtype):
    """The same bits each time, on any number of threads."""
    _C.set_cpu_isa(isa)
    x, w, scale, shift, residual, conv = make(*SHAPES[shape], dtype=dtype)
    for name in algorithms(x, w, conv):
        results = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            results.append(native(x, w, name, scale, shift, residual, True, **conv))
        assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize("dtype", sorted({dtype for _, dtype in RUNS}, key=str))
def test_scratch_for_fewer_threads_than_the_pool_has(dtype):
    x, w, *_, conv = make(*SHAPES["3x3 blocks"], dtype=dtype)
    torch.set_num_threads(2)
    for name in algorithms(x, w, conv):
        one = native(x, w, name, threads=1, **conv)
        assert torch.equal(one, native(x, w, name, threads=2, **conv))


def test_arguments_are_checked():
    ok = {
        "dtype": "float32",
        "n": 1,
        "h": 8,
        "w": 8,
        "c": 4,
        "o": 4,
        "kh": 3,
        "kw": 3,
        "sh": 1,
        "sw": 1,
        "ph": 1,
        "pw": 1,
        "dh": 1,
        "dw": 1,
        "groups": 1,
    }
    _C.conv_bn_act_algorithms(**ok)
    for name, value in [
        ("dtype", "float64"),
        ("n", -1),
        ("h", 0),
        ("c", 0),
        ("kh", 20),
        ("sh", 0),
        ("ph", -1),
        ("dw", 0),
        ("groups", 3),
    ]:
        word = "c" if name == "groups" else name
        with pytest.raises(ValueError, match=rf"^{word}: "):
            _C.conv_bn_act_algorithms(**ok | {name: value})
    shape = [v for k, v in ok.items() if k != "dtype"]
    with pytest.raises(ValueError, match=r"algorithm: "):
        _C.conv_bn_act_scratch_bytes("float32", "nonesuch", *shape, 1)
    x, y, _keep, buffer = torch.zeros(257), torch.zeros(256), *aligned(1 << 20)
    size = _C.conv_bn_act_scratch_bytes("float32", "direct", *shape, 1)
    packed_bytes = _C.conv_bn_act_packed_bytes("float32", "direct", 4, 4, 3, 3, 1)
    good = dict(
        x=x.data_ptr(),
        packed=buffer,
        scale=buffer + (1 << 18),
        shift=buffer + (1 << 18) + 64,
        residual=buffer + (1 << 17),
        y=y.data_ptr(),
        scratch=buffer + (1 << 19),
        scratch_bytes=size,
        packed_bytes=packed_bytes,
        algorithm="direct",
        relu=True,
        **ok,
    )
    # Not more than an element's alignment is asked of maps and vectors.
    _C.conv_bn_act(**good | {"x": x[1:].data_ptr(), "residual": good["residual"] + 4})
    _C.conv_bn_act(**good | {"scale": good["scale"] + 4, "shift": 0, "residual": good["y"]})
    for name, value in [
        ("x", 0),
        ("x", good["x"] + 1),
        ("y", 0),
        ("y", good["y"] + 1),
        ("y", good["x"]),
        ("y", good["x"] + 4),
        ("y", good["residual"] - 4),
        ("y", good["scale"] - 4 * 255),
        ("y", good["packed"]),
        ("residual", good["residual"] + 1),
        ("scale", good["scale"] + 3),
        ("shift", good["shift"] + 2),
        ("packed", 0),
        ("packed", buffer + 4),
        ("packed_bytes", packed_bytes - 1),
        ("scratch", 0),
        ("scratch", buffer + 4),
        ("scratch", good["packed"]),
        ("scratch", good["residual"]),
        ("scratch", good["shift"]),
        ("scratch_bytes", size - 1),
    ]:
        with pytest.raises(ValueError, match=rf"^{name}: "):
            _C.conv_bn_act(**good | {name: value})


def test_packing_arguments_are_checked():
    _keep, buffer = aligned(1 << 16)
    weight = {"dtype": "float32", "algorithm": "direct"}
    weight |= {"o": 4, "c_per_group": 4, "kh": 3, "kw": 3, "groups": 1}
    good = weight | {
        "weight": buffer + (1 << 15) + 4,
        "packed": buffer,
        "along_o": 36,
        "along_c": 9,
        "along_tap": 1,
        "packed_bytes": _C.conv_bn_act_packed_bytes(**weight),
    }
    _C.conv_bn_act_pack(**good)
    for name, value in [
        ("weight", 0),
        ("weight", good["weight"] + 1),
        ("packed", 0),
        ("packed", buffer + 4),
        ("packed", buffer + (1 << 15)),
        ("packed_bytes", good["packed_bytes"] - 1),
        ("along_o", -1),
    ]:
        with pytest.raises(ValueError, match=rf"^{name}: "):
            _C.conv_bn_act_pack(**good | {name: value})
    # The last of the weight alone lies in the buffer.
    with pytest.raises(ValueError, match=r"^packed: must not overlap weight"):
        _C.conv_bn_act_pack(**good | {"weight": buffer - 4 * 143})
    with pytest.raises(ValueError, match=r"^weight: the tensors are too large"):
        _C.conv_bn_act_pack(**good | {"along_o": 1 << 40, "o": 1 << 20})


def test_isa_names():
    with pytest.raises(ValueError, match=r"^name: "):
        _C.set_cpu_isa("sse9")
    _C.set_cpu_isa("none")
    assert _C.cpu_isa() == "none"
    assert _C.conv_bn_act_algorithms("float32", 1, 8, 8, 4, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1) == []


def test_pool_and_head_arguments_are_checked():
    x, y = torch.zeros(512), torch.zeros(512)
    pool = {
        "x": x.data_ptr(),
        "y": y.data_ptr(),
        "dtype": "float32",
        "n": 1,
        "h": 4,
        "w": 4,
        "c": 8,
        "k": 3,
        "s": 2,
        "p": 1,
    }
    _C.max_pool(**pool)
    for name, value in [
        ("x", 0),
        ("x", pool["x"] + 2),
        ("y", 0),
        ("y", pool["y"] + 1),
        ("y", pool["x"]),
        ("y", pool["x"] + 4 * 127),
        ("k", 9),
        ("s", 0),
        ("p", 2),
        ("n", 1 << 31),
    ]:
        large = {"h": 1 << 20, "w": 1 << 20} if name == "n" else {}
        with pytest.raises(ValueError, match=rf"^{name}: "):
            _C.max_pool(**pool | {name: value} | large)
    weight, bias, scratch = torch.zeros(40), torch.zeros(5), torch.zeros(8)
    head = {
        "x": x.data_ptr(),
        "weight": weight.data_ptr(),
        "bias": bias.data_ptr(),
        "y": y.data_ptr(),
        "scratch": scratch.data_ptr(),
        "scratch_bytes": 32,
        "dtype": "float32",
        "n": 1,
        "hw": 4,
        "c": 8,
        "classes": 5,
    }
    _C.head(**head)
    _C.head(**head | {"bias": 0})
    for name, value in [
        ("x", 0),
        ("x", head["x"] + 1),
        ("weight", 0),
        ("weight", head["weight"] + 2),
        ("bias", head["bias"] + 1),
        ("y", 0),
        ("y", head["y"] + 1),
        ("y", head["x"] + 4 * 31),
        ("y", head["weight"]),
        ("y", head["bias"] - 4),
        ("y", head["scratch"] + 4),
        ("scratch", 0),
        ("scratch", head["scratch"] + 1),
        ("scratch", head["x"]),
        ("scratch", head["weight"] + 4),
        ("scratch", head["bias"]),
        ("scratch_bytes", 31),
        ("hw", 0),
    ]:
        with pytest.raises(ValueError, match=rf"^{name}: "):
            _C.head(**head | {name: value})
    # 4 * n * c is 0 in 64 bits.
    with pytest.raises(ValueError, match=r"^n: the tensors are too large"):
        _C.head(**head | {"n": 1 << 31, "c": 1 << 31})


@pytest.mark.parametrize(("isa", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize(
    ("shape", "k", "s", "p"),
    [
        ((2, 64, 14, 16), 3, 2, 1),
        ((1, 37, 7, 9), 3, 1, 0),
        ((1, 5, 1, 1), 3, 2, 1),
        ((0, 8, 4, 4), 2, 2, 0),
    ],
)
def test_max_pool(shape, k, s, p, isa, dtype):
    _C.set_cpu_isa(isa)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if x.numel():
        x[0, 1, 0, 0], x[-1, 2, -1, -1] = float("nan"), -float("inf")
    want = torch.nn.functional.max_pool2d(x, k, s, p)
    n, c, oh, ow = want.shape
    xs, y = nhwc(x), torch.zeros(n, oh, ow, c, dtype=dtype)
    _C.max_pool(xs.data_ptr(), y.data_ptr(), NAMES[dtype], n, *x.shape[2:], c, k, s, p)
    assert torch.equal(y.permute(0, 3, 1, 2).nan_to_num(9.0), want.nan_to_num(9.0))


@pytest.mark.parametrize(("isa", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize(
    ("n", "hw", "c", "classes"), [(1, 49, 512, 1000), (6, 49, 37, 7), (3, 1, 200, 10)]
)
def test_head(n, hw, c, classes, isa, dtype):
    _C.set_cpu_isa(isa)
    g = torch.Generator().manual_seed(2)
    x, w = (
        torch.randn(n, hw, c, generator=g).to(dtype),
        torch.randn(classes, c, generator=g).to(dtype),
    )
    bias, scratch = torch.randn(classes, generator=g).to(dtype), torch.zeros(n * c)
    for b in (bias, None):
        y = torch.zeros(n, classes, dtype=dtype)
        _C.head(
            x.data_ptr(),
            w.data_ptr(),
            0 if b is None else b.data_ptr(),
            y.data_ptr(),
            scratch.data_ptr(),
            4 * n * c,
            NAMES[dtype],
            n,
            hw,
            c,
            classes,
        )
        oracle = x.double().mean(1) @ w.double().T + (0 if b is None else b.double())
        eps = torch.finfo(dtype).eps
        assert (y.double() - oracle).abs().max() <= eps * oracle.abs().max() * 2
