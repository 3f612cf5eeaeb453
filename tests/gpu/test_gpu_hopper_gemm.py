"""The 1x1 convolution of Hopper on a GPU: each kernel on those of a ResNet, and its edges."""

import pytest
import torch
from paths import arguments, assert_right

import resnet_fused as rf
from resnet_fused.backends import _hopper_gemm, cuda
from resnet_fused.inspection import convolutions

HALF = (torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _hopper(device):
    x = torch.zeros(1, 8, 1, 1, dtype=torch.bfloat16, device=device)
    args = (x, torch.zeros(8, 8, 1, 1, dtype=x.dtype, device=device), None, None, None)
    reason = cuda.available() or cuda.supports(
        "conv_bn_act", *args, (1, 1), (0, 0), (1, 1), 1, None
    )
    if reason:
        pytest.skip(reason)


def check_all_kernels(args):
    """Each against float64, and the same bits again."""
    for name, run in _hopper_gemm.candidates(*args).items():
        out = run(*args)
        try:
            assert_right(args, out)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        assert torch.equal(run(*args), out), f"{name} is not repeatable"


@each_dtype
@pytest.mark.parametrize("batch", [1, 8])
def test_convolutions_of_a_resnet(batch, dtype, device):
    seen = 0
    for p in convolutions("resnet50", batch, dtype):
        geometry = (p.kernel, p.stride, p.padding, p.dilation, p.groups)
        args = arguments(
            (p.n, p.c, p.h, p.w), p.o, *geometry, dtype=dtype, residual=p.residual, device=device
        )
        if _hopper_gemm.declines(*args) is None:
            check_all_kernels(args)
            seen += 1
    assert seen >= 8


@each_dtype
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        ((1, 8, 1, 1), 8),
        ((3, 72, 13, 11), 200),
        ((1, 136, 16, 16), 264),
        ((2, 64, 8, 8), 256),
        ((5, 64, 1, 1), 64),
        ((1, 1000, 9, 15), 40),
        ((1, 512, 131, 129), 8),
    ],
    ids=str,
)
def test_edges_of_tiles_and_maps(shape, residual, dtype, device):
    check_all_kernels(arguments(*shape, dtype=dtype, residual=residual, device=device))


@each_dtype
@pytest.mark.parametrize("act", [None, "relu"])
def test_not_finite_and_absent_operands(act, dtype, device):
    args = arguments((2, 64, 9, 9), 72, dtype=dtype, residual=True, device=device)
    x, weight, scale, shift, residual, *rest = args
    x[0, 0, 3, 3], residual[1, 1, 0, 0], scale[5] = torch.inf, torch.nan, -torch.inf
    for vectors in ((scale, shift), (None, shift), (scale, None), (None, None)):
        for added in (residual, None):
            call = (x, weight, *vectors, added, *rest[:-1], act)
            with rf.use_backend("reference"):
                expected = torch.ops.resnet_fused.conv_bn_act(*call)
            for run in _hopper_gemm.candidates(*call).values():
                out = run(*call)
                assert torch.equal(out.isnan(), expected.isnan())
                assert torch.equal(out.isinf(), expected.isinf())


def test_in_a_graph_and_on_another_stream(device):
    args = arguments((4, 64, 14, 14), 256, dtype=torch.bfloat16, residual=True, device=device)
    for run in _hopper_gemm.candidates(*args).values():
        expected = run(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(*args)
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


def test_by_name_it_runs_and_auto_leaves_it_to_others(device):
    args = arguments((8, 64, 28, 28), 64, dtype=torch.float16, device=device)
    with rf.use_backend("cuda"):
        assert_right(args, torch.ops.resnet_fused.conv_bn_act(*args))
    assert rf.explain("conv_bn_act", *args).chosen != "cuda"


def test_a_large_map_with_an_add_auto_leaves_to_it(device):
    args = arguments((96, 256, 28, 28), 512, dtype=torch.bfloat16, residual=True, device=device)
    assert rf.explain("conv_bn_act", *args).chosen == "cuda"
    assert_right(args, torch.ops.resnet_fused.conv_bn_act(*args))
