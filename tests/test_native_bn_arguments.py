"""What the training kernels refuse, and that they write nothing but their outputs."""

import functools
import math

import pytest
import torch
from native_maps import backward_maps, each_run, vectors

from resnet_fused.backends import _training_kernels as kernels

_C = pytest.importorskip("resnet_fused._C")


@pytest.fixture(autouse=True)
def _as_it_was():
    """Leave the instruction set and the threads as they were."""
    isa, threads = _C.cpu_isa(), torch.get_num_threads()
    yield
    _C.set_cpu_isa(isa)
    torch.set_num_threads(threads)


def guarded(shape, dtype):
    """A channels_last map with 64 sevens on both sides, and those sevens."""
    size = math.prod(shape)
    flat = torch.full((size + 128,), 7.0, dtype=dtype)
    n, c, h, w = shape
    inner = flat[64 : 64 + size].view(n, h, w, c).permute(0, 3, 1, 2)
    return inner, (flat[:64], flat[64 + size :])


@each_run
@pytest.mark.parametrize("shape", [(1, 5, 3, 1), (2, 19, 3, 3), (1, 16, 2, 2)], ids=str)
def test_nothing_is_written_beside_an_output(shape, isa, dtype):
    _C.set_cpu_isa(isa)
    grad, x, _, y = backward_maps(shape, dtype)
    mean, *v = vectors(shape[1], 4)
    for run in (
        functools.partial(kernels.bn_apply, x, *v[:2]),
        functools.partial(kernels.add_relu, x, grad),
        functools.partial(kernels.bn_act_backward_apply, grad, x, *v, y=y),
    ):
        out, guards = guarded(shape, dtype)
        assert torch.equal(run(out=out), run())
        assert all((g == 7).all() for g in guards)
    out, guards = guarded(shape, dtype)
    kernels.bn_act_backward_reduce(grad, x, mean, y=y, masked=out)
    assert all((g == 7).all() for g in guards)


X = torch.zeros(1, 4, 2, 2).contiguous(memory_format=torch.channels_last)
V = torch.zeros(4)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("residual", lambda: kernels.bn_apply(X, V, V, X[:, :, :1])),
        ("residual", lambda: kernels.bn_apply(X, V, V, X.bfloat16())),
        ("residual", lambda: kernels.add_relu(X, X.to("meta"))),
        ("scale", lambda: kernels.bn_apply(X, V[:3], V)),
        ("shift", lambda: kernels.bn_apply(X, V, V.view(2, 2))),
        ("residual_scale", lambda: kernels.bn_apply(X, V, V, X, V)),
        ("residual_scale", lambda: kernels.bn_apply(X, V, V, None, V, V)),
        ("out", lambda: kernels.bn_apply(X, V, V, out=torch.zeros(1, 4, 2, 2))),
        ("out", lambda: kernels.bn_apply(X, V, V, out=X[:, :2])),
        ("grad", lambda: kernels.bn_act_backward_reduce(X[:, :2], X, V, y=X)),
        ("scale", lambda: kernels.bn_act_backward_reduce(X, X, V)),
        ("mean2", lambda: kernels.bn_act_backward_reduce(X, X, V, y=X, x2=X)),
        ("y", lambda: kernels.bn_act_backward_reduce(X, X, V, x2=X, mean2=V)),
        ("masked", lambda: kernels.bn_act_backward_reduce(X, X, V, relu=False, masked=X)),
        ("a", lambda: kernels.bn_act_backward_apply(X, X, V[:2], V, V, y=X)),
        ("y", lambda: kernels.bn_act_backward_apply_both(X, X, X, [V] * 3, [V] * 3)),
        ("index", lambda: kernels.max_pool_backward(X, X, (1, 4, 4, 4), 2, 2, 0)),
        ("grad", lambda: kernels.max_pool_backward(X, X, (1, 4, 9, 9), 2, 2, 0)),
        ("scale", lambda: kernels.max_pool_index(X, V[:3], V, 2, 2, 0)),
        ("k", lambda: kernels.max_pool_index(torch.zeros(1, 4, 40, 40), V, V, 17, 1, 0)),
    ],
)
def test_arguments_that_do_not_fit(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call()


def address(offset=0):
    return MEMORY.data_ptr() - MEMORY.data_ptr() % -64 + 64 * offset


MEMORY = torch.zeros(1 << 14)
SIZES = {"dtype": "float32", "rows": 4, "c": 8}  # a map is 128 bytes, a vector 32
STATS = {
    "x": address(), "mean": address(2), "var": address(3), "scratch": address(4),
    "scratch_bytes": _C.bn_stats_scratch_bytes(4, 8), **SIZES,
}  # fmt: skip
BN_APPLY = {
    "x": address(), "scale": address(2), "shift": address(3), "residual": address(4),
    "residual_scale": address(6), "residual_shift": address(7), "y": address(8),
    "bits": 0, **SIZES, "relu": True,
}  # fmt: skip
ACT = {
    "x": address(), "mean": address(2), "var": address(3), "weight": address(4),
    "bias": address(5), "residual": address(6), "y": address(8), "bits": 0,
    "scratch": address(12), "scratch_bytes": _C.bn_act_scratch_bytes(4, 8), **SIZES, "eps": 1e-5,
    "relu": True,
}  # fmt: skip
BACKWARD = {
    "grad": address(), "x": address(2), "mean": address(4), "var": address(5),
    "weight": address(6), "bias": address(7), "y": address(8), "bits": 0, "grad_x": address(10),
    "grad_weight": address(12), "grad_bias": address(13), "grad_residual": address(14),
    "activation": 0, "scratch": address(16),
    "scratch_bytes": _C.bn_act_backward_scratch_bytes(4, 8), **SIZES, "eps": 1e-5, "relu": True,
}  # fmt: skip
UPDATE = {
    "running_mean": address(), "running_var": address(2), "num_batches_tracked": address(4),
    "mean": address(6), "var": address(8), "c": 8, "count": 4, "momentum": 0.1,
}  # fmt: skip
REDUCE = {
    "grad": address(), "x": address(2), "x2": address(4), "scale": 0, "shift": 0, "y": address(6),
    "bits": 0, "mean": address(8), "mean2": address(9), "sum_g": address(10), "sum_gx": address(11),
    "sum_gx2": address(12), "masked": address(14), "scratch": address(16),
    "scratch_bytes": _C.bn_act_backward_reduce_scratch_bytes(4, 8), **SIZES, "relu": True,
}  # fmt: skip
APPLY = {
    "grad": address(), "x": address(2), "x2": address(4), "scale": 0, "shift": 0, "y": address(6),
    "bits": 0, **{name: address(8 + i) for i, name in enumerate(("a", "b", "d", "a2", "b2", "d2"))},
    "grad_x": address(14), "grad_x2": address(16), **SIZES, "relu": True,
}  # fmt: skip
ADD = {"x": address(), "residual": address(2), "y": address(4), "dtype": "float32", "n": 32}
POOL_BACK = {
    "grad": address(8), "grad_x": address(), "index": address(16), "dtype": "float32",
    "n": 1, "h": 4, "w": 4, "c": 8, "k": 2, "s": 2, "p": 0,
}  # fmt: skip
POOL = {
    "x": POOL_BACK["grad_x"], "y": POOL_BACK["grad"], "scale": address(24), "shift": address(32),
    "taken": address(40), "relu": True, **POOL_BACK,
}  # fmt: skip
del POOL["grad"], POOL["grad_x"]
POINTERS = {
    "bn_stats": (STATS, ("x", "mean", "var", "scratch")),
    "bn_apply": (BN_APPLY, ("x", "scale", "shift", "y")),
    "bn_update_stats": (UPDATE, ("running_mean", "running_var", "mean", "var")),
    "bn_act": (ACT, ("x", "mean", "var", "y", "scratch")),
    "bn_act_backward": (BACKWARD, ("grad", "x", "mean", "var", "scratch")),
    "bn_act_backward_reduce": (
        REDUCE, ("grad", "x", "mean", "mean2", "sum_g", "sum_gx", "sum_gx2", "scratch"),
    ),
    "bn_act_backward_apply": (
        APPLY, ("grad", "x", "a", "b", "d", "a2", "b2", "d2", "grad_x", "grad_x2"),
    ),
    "add_relu": (ADD, ("x", "residual", "y")),
    "max_pool_index": (POOL, ("x", "scale", "shift", "y", "index")),
    "max_pool_backward": (POOL_BACK, ("grad", "index", "grad_x")),
}  # fmt: skip


@pytest.mark.parametrize("function", ["bn_apply", "bn_act"])
def test_bits_to_write(function):
    """Of the ReLU of a sum in 16 bits, of whole bytes of channels, apart from every map."""
    good, _ = POINTERS[function]
    run, good = getattr(_C, function), good | {"dtype": "bfloat16", "bits": address(40)}
    run(**good)
    shortcut = {} if function == "bn_act" else {"residual_scale": 0, "residual_shift": 0}
    for change in (
        {"dtype": "float32"}, {"c": 4}, {"relu": False}, {"residual": 0, **shortcut},
        *({"bits": good[name]} for name in ("x", "residual", "y")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^bits: "):
            run(**good | change)


@pytest.mark.parametrize(
    "function", ["bn_act_backward", "bn_act_backward_reduce", "bn_act_backward_apply"]
)
def test_bits_to_read(function):
    """In place of ReLU's result; what is written is apart from them."""
    good, _ = POINTERS[function]
    run, good = getattr(_C, function), good | {"dtype": "bfloat16", "y": 0, "bits": address(40)}
    run(**good)
    for change in ({"dtype": "float32"}, {"c": 4}, {"y": address(42)}):
        with pytest.raises(ValueError, match=r"^bits: "):
            run(**good | change)
    for name in {"grad_x", "grad_x2", "grad_residual", "masked"} & good.keys():
        with pytest.raises(ValueError, match=rf"^{name}: .*bits"):
            run(**good | {name: good["bits"]})


@pytest.mark.parametrize("function", POINTERS)
def test_null_and_misaligned_pointers(function):
    good, names = POINTERS[function]
    run = getattr(_C, function)
    run(**good)
    for name in names:
        for bad in (0, good[name] + 1)[: 1 if name == "index" else 2]:
            with pytest.raises(ValueError, match=rf"^{name}: "):
                run(**good | {name: bad})


@pytest.mark.parametrize(
    ("function", "good", "changes"),
    [
        ("bn_stats", STATS, {"dtype": "float64", "rows": -1, "c": 0, "scratch_bytes": 8}),
        (
            "bn_apply",
            BN_APPLY,
            {"rows": -1, "c": 1 << 25, "y": BN_APPLY["x"] + 4, "residual_shift": 0},
        ),
        ("bn_update_stats", UPDATE, {"c": 0, "count": 1, "num_batches_tracked": UPDATE["var"] + 4}),
        (
            "bn_act",
            ACT,
            {"c": 0, "y": ACT["x"] + 4, "weight": ACT["weight"] + 2, "scratch_bytes": 8},
        ),
        (
            "bn_act_backward",
            BACKWARD,
            {
                "rows": 0,
                "grad_x": BACKWARD["grad_residual"],
                "grad_residual": BACKWARD["x"] + 4,
                "grad_weight": 2,
                "scratch_bytes": 64,
            },
        ),
        (
            "bn_act_backward_reduce",
            REDUCE,
            {"scratch_bytes": 8, "masked": REDUCE["x"] - 4, "y": 0, "dtype": "int8"},
        ),
        (
            "bn_act_backward_apply",
            APPLY,
            {"grad_x": APPLY["grad"] + 32, "grad_x2": APPLY["grad_x"], "y": 0},
        ),
        ("add_relu", ADD, {"n": -1, "y": ADD["x"] + 4, "dtype": ""}),
        (
            "max_pool_index",
            POOL,
            {"y": POOL["x"], "index": POOL["x"], "taken": POOL["index"], "k": 9, "s": 0, "p": 2},
        ),
        ("max_pool_backward", POOL_BACK, {"grad_x": POOL["y"], "h": 0, "n": -1}),
    ],
)
def test_sizes_and_overlaps(function, good, changes):
    named = {"residual_shift": "residual_scale"}
    for name, value in changes.items():
        with pytest.raises(ValueError, match=rf"^{named.get(name, name)}: "):
            getattr(_C, function)(**good | {name: value})


def test_a_masked_gradient_may_replace_what_is_not_read_behind_it():
    """Behind it, grad_x is made of x."""
    for over in ("grad", "y"):
        _C.bn_act_backward(**BACKWARD | {"grad_residual": BACKWARD[over]})
    _C.bn_act_backward(**BACKWARD | {"grad_residual": BACKWARD["x"], "grad_x": 0})
    with pytest.raises(ValueError, match=r"^grad_residual: must not overlap x"):
        _C.bn_act_backward(**BACKWARD | {"grad_residual": BACKWARD["x"]})


def test_an_activation_is_what_the_mask_is_made_of():
    """It is there where the mask is, in the pass that writes grad_x; over what that has read."""
    good = BACKWARD | {"y": 0, "activation": address(42)}
    for over in ("activation", "x", "grad"):
        _C.bn_act_backward(**good | {"activation": good[over]})
    for change in ({"y": BACKWARD["y"]}, {"grad_x": 0}, {"relu": False, "grad_residual": 0}):
        with pytest.raises(ValueError, match=r"^activation: only with grad_x"):
            _C.bn_act_backward(**good | change)
    for over in ("grad_x", "grad_residual"):
        with pytest.raises(ValueError, match=rf"^activation: must not overlap {over}"):
            _C.bn_act_backward(**good | {"activation": good[over]})


def test_no_instruction_set():
    _C.set_cpu_isa("none")
    with pytest.raises(ValueError, match=r"^dtype: no kernels for it on none"):
        kernels.bn_stats(X)


def test_what_a_pool_took_need_not_be_written():
    _C.max_pool_index(**POOL | {"taken": 0})
    with pytest.raises(ValueError, match=r"^taken: must be aligned"):
        _C.max_pool_index(**POOL | {"taken": POOL["taken"] + 1})
