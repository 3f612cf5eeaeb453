"""What bad input gets: an error that names the argument, what came and what is accepted."""

import pytest
import torch

import resnet_fused as rf
from resnet_fused import functional
from resnet_fused.ops import INFERENCE, _register

#: A call that works; each case changes some of it.
GOOD = {
    "conv_bn_act": {
        "x": (2, 4, 6, 5), "weight": (8, 4, 3, 3), "scale": (8,), "shift": (8,),
        "residual": (2, 8, 6, 5), "padding": 1,
    },
    "conv_bn_act_max_pool": {
        "x": (2, 4, 6, 5), "weight": (8, 4, 3, 3), "scale": (8,), "shift": (8,), "padding": 1,
    },
    "conv_bn_act_conv_bn_act": {
        "x": (2, 4, 6, 5), "weight": (8, 4, 3, 3), "scale": (8,), "shift": (8,),
        "weight2": (6, 8, 1, 1), "scale2": (6,), "shift2": (6,), "residual": (2, 6, 6, 5),
        "padding": 1,
    },
    "bn_apply": {"x": (2, 4, 6, 5), "scale": (4,), "shift": (4,), "residual": (2, 4, 6, 5)},
    "add_relu": {"x": (2, 4, 6, 5), "residual": (2, 4, 6, 5)},
    "avg_pool_linear": {"x": (2, 4, 6, 5), "weight": (3, 4), "bias": (3,)},
}  # fmt: skip

D = torch.double
#: op, what is changed, the error, and words its message must have.
CASES = [
    ("conv_bn_act", {"x": (4, 6, 5)}, ValueError, ["x must have 4 dimensions", "(4, 6, 5)"]),
    ("conv_bn_act", {"x": (2, 3, 6, 5)}, ValueError, ["3 channels", "(8, 4, 3, 3)", "groups=1"]),
    ("conv_bn_act", {"x": torch.int64}, TypeError, ["x must be one of torch.float32", "int64"]),
    ("conv_bn_act", {"x": torch.uint8}, TypeError, ["x must be one of", "uint8"]),
    ("conv_bn_act", {"x": torch.complex64}, TypeError, ["x must be one of", "complex64"]),
    ("conv_bn_act", {"x": (2, 4, 1, 5), "padding": 0}, ValueError, ["(2, 4, 1, 5)", "smaller"]),
    ("conv_bn_act", {"weight": (8, 4, 3)}, ValueError, ["weight must have 4 dim", "(8, 4, 3)"]),
    ("conv_bn_act", {"weight": (0, 4, 3, 3)}, ValueError, ["weight (0, 4, 3, 3) has an empty"]),
    ("conv_bn_act", {"weight": D}, TypeError, ["weight must have x's dtype", "float64"]),
    ("conv_bn_act", {"weight": "meta"}, ValueError, ["weight must be on x's device", "meta"]),
    ("conv_bn_act", {"groups": 3}, ValueError, ["groups=3", "4 channels"]),
    ("conv_bn_act", {"groups": 0}, ValueError, ["groups=0"]),
    ("conv_bn_act", {"groups": -1}, ValueError, ["groups=-1"]),
    ("conv_bn_act", {"stride": 0}, ValueError, ["stride must be", "at least 1", "(0, 0)"]),
    ("conv_bn_act", {"stride": (1, -1)}, ValueError, ["stride must be", "(1, -1)"]),
    ("conv_bn_act", {"stride": (1, 1, 1)}, ValueError, ["stride must be one or two", "(1, 1, 1)"]),
    ("conv_bn_act", {"stride": (1.0, 1.0)}, ValueError, ["stride must be one or two integers"]),
    ("conv_bn_act", {"padding": -1}, ValueError, ["padding must be", "at least 0", "(-1, -1)"]),
    ("conv_bn_act", {"padding": "same"}, ValueError, ["padding must be", "'same'"]),
    ("conv_bn_act", {"dilation": 0}, ValueError, ["dilation must be", "at least 1"]),
    ("conv_bn_act", {"dilation": (9, 9)}, ValueError, ["smaller than", "dilation (9, 9)"]),
    ("conv_bn_act", {"scale": (4,)}, ValueError, ["scale must have shape (8,)", "(4,)"]),
    ("conv_bn_act", {"scale": (8, 1, 1)}, ValueError, ["scale must have shape", "(8, 1, 1)"]),
    ("conv_bn_act", {"scale": D}, TypeError, ["scale must be torch.float32", "float64"]),
    ("conv_bn_act", {"shift": (1,)}, ValueError, ["shift must have shape (8,)"]),
    ("conv_bn_act", {"shift": torch.int32}, TypeError, ["shift must be", "int32"]),
    ("conv_bn_act", {"shift": "meta"}, ValueError, ["shift must be on x's device cpu"]),
    ("conv_bn_act", {"residual": (2, 8, 1, 1)}, ValueError, ["residual must have", "(2, 8, 6, 5)"]),
    ("conv_bn_act", {"residual": D}, TypeError, ["residual must have x's dtype", "float64"]),
    ("conv_bn_act", {"act": "gelu"}, ValueError, ["act must be one of", "'relu'", "'gelu'"]),
    ("conv_bn_act_max_pool", {"x": (4, 6, 5)}, ValueError, ["x must have 4 dim", "(4, 6, 5)"]),
    ("conv_bn_act_max_pool", {"x": torch.int8}, TypeError, ["x must be one of", "int8"]),
    ("conv_bn_act_max_pool", {"weight": D}, TypeError, ["weight must have x's dtype", "float64"]),
    ("conv_bn_act_max_pool", {"weight": (8, 4, 9, 9)}, ValueError, ["smaller than the kernel"]),
    ("conv_bn_act_max_pool", {"groups": 3}, ValueError, ["groups=3", "4 channels"]),
    ("conv_bn_act_max_pool", {"stride": 0}, ValueError, ["stride must be", "at least 1"]),
    ("conv_bn_act_max_pool", {"padding": "same"}, ValueError, ["padding must be", "'same'"]),
    ("conv_bn_act_max_pool", {"scale": (4,)}, ValueError, ["scale must have shape (8,)"]),
    ("conv_bn_act_max_pool", {"shift": "meta"}, ValueError, ["shift must be on x's device cpu"]),
    ("conv_bn_act_max_pool", {"act": "gelu"}, ValueError, ["act must be one of", "'gelu'"]),
    ("conv_bn_act_max_pool", {"pool_size": 0}, ValueError, ["pool_size must be", "at least 1"]),
    ("conv_bn_act_max_pool", {"pool_size": 9}, ValueError, ["(2, 8, 6, 5)", "smaller than", "(9,"]),
    ("conv_bn_act_max_pool", {"pool_size": 2.5}, ValueError, ["pool_size must be one or two"]),
    ("conv_bn_act_max_pool", {"pool_stride": (2, 0)}, ValueError, ["pool_stride must", "(2, 0)"]),
    ("conv_bn_act_max_pool", {"pool_padding": -1}, ValueError, ["pool_padding must", "at least 0"]),
    ("conv_bn_act_max_pool", {"pool_padding": (1, 2)}, ValueError, ["half of pool_size (3, 3)"]),
    ("bn_apply", {"x": (2, 4)}, ValueError, ["x must have 4 dimensions"]),
    ("bn_apply", {"x": torch.int32}, TypeError, ["x must be one of"]),
    ("bn_apply", {"scale": (5,)}, ValueError, ["scale must have shape (4,)"]),
    ("bn_apply", {"shift": torch.half}, TypeError, ["shift must be torch.float32", "float16"]),
    ("bn_apply", {"residual": (2, 4, 6, 1)}, ValueError, ["residual must have the output's shape"]),
    ("bn_apply", {"act": "tanh"}, ValueError, ["act must be one of", "'tanh'"]),
    ("add_relu", {"x": (2, 4, 6)}, ValueError, ["x must have 4 dimensions"]),
    ("add_relu", {"residual": (1, 4, 6, 5)}, ValueError, ["residual must have the output's shape"]),
    ("add_relu", {"residual": torch.half}, TypeError, ["residual must have x's dtype"]),
    ("add_relu", {"residual": "meta"}, ValueError, ["residual must be on x's device cpu"]),
    ("avg_pool_linear", {"x": (2, 4)}, ValueError, ["x must have 4 dimensions", "(2, 4)"]),
    ("avg_pool_linear", {"x": torch.int32}, TypeError, ["x must be one of", "int32"]),
    *(
        ("conv_bn_act_conv_bn_act", change, error, words)
        for change, error, words in (
            ({"x": (2, 3, 6, 5)}, ValueError, ["3 channels", "(8, 4, 3, 3)"]),
            ({"x": torch.int8}, TypeError, ["x must be one of", "int8"]),
            ({"weight": (8, 4, 9, 9)}, ValueError, ["smaller than the kernel"]),
            ({"stride": 0}, ValueError, ["stride must be", "at least 1"]),
            ({"scale": (6,)}, ValueError, ["scale must have shape (8,)", "(6,)"]),
            ({"shift": D}, TypeError, ["shift must be torch.float32", "float64"]),
            ({"weight2": (6, 8)}, ValueError, ["weight2 must have shape (O, 8, 1, 1)", "(6, 8)"]),
            ({"weight2": (6, 4, 1, 1)}, ValueError, ["weight2 must have", "weight's 8 output"]),
            ({"weight2": (6, 8, 3, 3)}, ValueError, ["weight2 must have", "(6, 8, 3, 3)"]),
            ({"weight2": (0, 8, 1, 1)}, ValueError, ["weight2 must have", "(0, 8, 1, 1)"]),
            ({"weight2": D}, TypeError, ["weight2 must have x's dtype", "float64"]),
            ({"weight2": "meta"}, ValueError, ["weight2 must be on x's device"]),
            ({"scale2": (8,)}, ValueError, ["scale2 must have shape (6,)", "(8,)"]),
            ({"shift2": "meta"}, ValueError, ["shift2 must be on x's device"]),
            ({"residual": (2, 8, 6, 5)}, ValueError, ["residual must have", "(2, 6, 6, 5)"]),
            ({"act": "gelu"}, ValueError, ["act must be one of", "'gelu'"]),
            ({"act2": "gelu"}, ValueError, ["act2 must be one of", "'gelu'"]),
        )
    ),
    ("avg_pool_linear", {"x": (2, 4, 0, 5)}, ValueError, ["at least one pixel", "(2, 4, 0, 5)"]),
    ("avg_pool_linear", {"x": (2, 5, 6, 5)}, ValueError, ["weight must have shape (K, 5)"]),
    ("avg_pool_linear", {"weight": (4,)}, ValueError, ["weight must have shape (K, 4)", "(4,)"]),
    ("avg_pool_linear", {"weight": (0, 4)}, ValueError, ["weight must have shape", "(0, 4)"]),
    ("avg_pool_linear", {"weight": D}, TypeError, ["weight must have x's dtype", "float64"]),
    ("avg_pool_linear", {"weight": "meta"}, ValueError, ["weight must be on x's device"]),
    ("avg_pool_linear", {"bias": (1,)}, ValueError, ["bias must have shape (3,)", "(1,)"]),
    ("avg_pool_linear", {"bias": D}, TypeError, ["bias must have x's dtype", "float64"]),
    ("avg_pool_linear", {"bias": "meta"}, ValueError, ["bias must be on x's device"]),
]
names = [f"{op}-{'-'.join(f'{k}={v}' for k, v in change.items())}" for op, change, *_ in CASES]
each_case = pytest.mark.parametrize(("op", "change", "error", "words"), CASES, ids=names)


def arguments(op: str, change: dict, device: str = "cpu") -> dict:
    """The good call's arguments, with a shape, dtype, device or value changed."""
    filled = {}
    for name, good in {**GOOD[op], **change}.items():
        shape = GOOD[op].get(name)
        if isinstance(shape, tuple) and isinstance(good, torch.dtype):
            filled[name] = torch.zeros(shape, device=device).to(good)
        elif isinstance(shape, tuple) and good == "meta":
            filled[name] = torch.zeros(shape, device="cpu" if device == "meta" else "meta")
        elif isinstance(shape, tuple):
            filled[name] = torch.ones(good, device=device)
        else:
            filled[name] = good
    return filled


def run(op: str, filled: dict) -> torch.Tensor:
    return getattr(functional, op)(**filled)


@pytest.mark.parametrize("op", INFERENCE)
def test_the_good_call_works(op):
    assert run(op, arguments(op, {})).shape[0] == 2


@each_case
def test_error(op, change, error, words, monkeypatch):
    monkeypatch.setattr(_register, "choose", lambda *args: pytest.fail("it has run"))
    filled = arguments(op, change)
    with pytest.raises(error) as caught:
        run(op, filled)
    assert str(caught.value).startswith(f"{op}: ")
    assert not [word for word in words if word not in str(caught.value)]


@each_case
def test_error_with_gradients(op, change, error, words):
    filled = arguments(op, change)
    for value in filled.values():
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            value.requires_grad_()
    with pytest.raises(error, match=f"{op}: "):
        run(op, filled)


@each_case
def test_error_on_meta_tensors(op, change, error, words):
    with pytest.raises(error, match=f"{op}: "):
        run(op, arguments(op, change, device="meta"))


@pytest.mark.parametrize("case", CASES[::6], ids=names[::6])
def test_error_under_compile(case):
    op, change, _, words = case
    torch._dynamo.reset()
    compiled = torch.compile(lambda filled: run(op, filled), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=f"{op}: ") as caught:
        compiled(arguments(op, change))
    assert words[0] in str(caught.value)


@pytest.mark.parametrize("backend", [b.name for b in rf.backends() if b.available])
def test_error_whoever_was_asked_for(backend):
    with rf.use_backend(backend), pytest.raises(ValueError, match="stride must be"):
        run("conv_bn_act", arguments("conv_bn_act", {"stride": 0}))


def test_explain_checks_too():
    filled = arguments("conv_bn_act", {"weight": (8, 4, 3)})
    with pytest.raises(ValueError, match="weight must have 4 dimensions"):
        rf.explain("conv_bn_act", filled["x"], filled["weight"])


@pytest.mark.parametrize("op", INFERENCE)
def test_no_memory_left(op, monkeypatch):
    """The error says for which call; it stays the one that torch's users catch."""

    def run_out(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(_register, "choose", lambda *args: run_out)
    with pytest.raises(torch.OutOfMemoryError, match=rf"^{op} on x \(2, 4, 6, 5\)") as caught:
        run(op, arguments(op, {}))
    assert "in torch.float32 on cpu: CUDA out of memory. Tried" in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    if "weight" in GOOD[op]:
        assert f"weight {GOOD[op]['weight']}" in str(caught.value)


def test_conv_bn_act_of_what_is_no_tensor_or_has_no_channels():
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(2, 4, 1, 1)
    for given, named in (([x, weight.tolist()], "weight"), ([x.numpy(), weight], "x")):
        with pytest.raises(TypeError, match=f"conv_bn_act: {named} must be a tensor, got"):
            rf.explain("conv_bn_act", *given)  # a call itself gets torch's dispatcher's error
    with pytest.raises(ValueError, match=r"weight \(2, 0, 1, 1\) has an empty dimension"):
        functional.conv_bn_act(x[:, :0], weight[:, :0])
