"""conv_bn_act on geometries that nobody thought of, drawn by hypothesis."""

import torch
from devices import device_of, moved
from formulas import BACKENDS, DTYPES, call, declined
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_contract import assert_contract

import resnet_fused as rf
from resnet_fused.backends._sizes import output_shape

fixed = settings(derandomize=True, deadline=None, max_examples=60)


@st.composite
def calls(draw) -> tuple:
    """Arguments of conv_bn_act that fit together: any layout, any of the optional ones left out."""
    groups = draw(st.integers(1, 3))
    channels, outputs = (groups * draw(st.integers(1, 9)) for _ in range(2))
    kernel, size = ([draw(st.integers(1, most)) for _ in range(2)] for most in (4, 11))
    stride, dilation = ([draw(st.integers(1, most)) for _ in range(2)] for most in (3, 2))
    padding = [draw(st.integers(0, 3)) for _ in range(2)]
    dtype = draw(st.sampled_from(DTYPES))
    vectors = draw(st.sampled_from((dtype, torch.promote_types(dtype, torch.float32))))
    x_shape = (draw(st.integers(0, 3)), channels, *size)
    weight_shape = (outputs, channels // groups, *kernel)
    out = output_shape(x_shape, weight_shape, stride, padding, dilation)
    assume(min(out[2:]) >= 1)
    layouts = st.sampled_from((torch.contiguous_format, torch.channels_last))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(shape, to):
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(to)
        return values.contiguous(memory_format=draw(layouts)) if len(shape) == 4 else values

    def maybe(shape, to):
        return tensor(shape, to) if draw(st.booleans()) else None

    return (
        tensor(x_shape, dtype), tensor(weight_shape, dtype),
        maybe((outputs,), vectors), maybe((outputs,), vectors), maybe(out, dtype),
        stride, padding, dilation, groups, draw(st.sampled_from((None, "relu"))),
    )  # fmt: skip


@fixed
@given(args=calls())
def test_drawn_geometry(args):
    for backend in BACKENDS:
        here = moved(args, device_of(backend))
        if not declined("conv_bn_act", backend, here):
            with rf.use_backend(backend):
                assert_contract("conv_bn_act", here)


@fixed
@given(args=calls())
def test_drawn_geometry_on_meta(args):
    real = call("conv_bn_act", args)
    fake = call("conv_bn_act", tuple(a.to("meta") if torch.is_tensor(a) else a for a in args))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
