"""The paths of the kernels on a GPU, where there is one."""

import sys
from pathlib import Path

import pytest
import torch

import resnet_fused as rf
from resnet_fused.backends import triton

sys.path.append(str(Path(__file__).parents[2] / "ops"))  # formulas
from devices import precision_of
from ends import STEMS, each_head, each_stem, head_arguments, stem_arguments
from paths import (
    IM2COL_PATHS,
    PATHS,
    arguments,
    assert_right,
    each_dtype,
    each_half,
    each_im2col_path,
    each_path,
)

from resnet_fused.backends.triton import im2col
from resnet_fused.backends.triton.shapes import Config
from resnet_fused.backends.triton.stem import StemConfig
from resnet_fused.ops import OPS

if triton.available() or triton.interpreted():
    pytest.skip(triton.available() or "kernels are interpreted", allow_module_level=True)


def config_of(name: str) -> Config:
    config = Config.parse(name)
    if config.tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no tensor memory accelerator before sm_90")
    return config


@each_path
@each_dtype
def test_path(path, dtype):
    from resnet_fused.backends.triton import run

    shape, name = PATHS[path]
    config = config_of(name)
    args = arguments(*shape, dtype=dtype, residual=dtype != torch.bfloat16, device="cuda")
    with precision_of("tf32" if config.tma else "fp32"):
        out = run.conv_bn_act(*args, config=config)
        assert_right(args, out)
        assert torch.equal(run.conv_bn_act(*args, config=config), out), "not repeatable"


@each_im2col_path
@each_half
def test_im2col_path(path, dtype):
    from resnet_fused.backends.triton import run

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for sm_90")
    if reason := im2col.missing():
        pytest.skip(reason)
    shape, name = IM2COL_PATHS[path]
    args = arguments(*shape, dtype=dtype, residual=dtype == torch.bfloat16, device="cuda")
    out = run.conv_bn_act(*args, config=Config.parse(name))
    assert_right(args, out)
    assert torch.equal(run.conv_bn_act(*args, config=Config.parse(name)), out), "not repeatable"


@each_stem
@each_dtype
def test_stem(path, dtype):
    from resnet_fused.backends.triton import run

    shape, name = STEMS[path]
    args = stem_arguments(*shape, dtype=dtype, device="cuda")
    out = run.conv_bn_act_max_pool(*args, config=StemConfig.parse(name))
    assert_right(args, out, "conv_bn_act_max_pool")


@each_head
@each_dtype
def test_head(shape, dtype):
    args = head_arguments(*shape, dtype=dtype, device="cuda")
    assert_right(args, triton.avg_pool_linear(*args), "avg_pool_linear")


@each_dtype
def test_every_candidate_of_a_stem(dtype):
    args = stem_arguments((2, 3, 64, 64), 64, 7, 2, 3, 1, 3, 2, 1, dtype=dtype, device="cuda")
    for function in triton.candidates("conv_bn_act_max_pool", *args).values():
        assert_right(args, function(*args), "conv_bn_act_max_pool")


def test_every_candidate_of_a_layer():
    args = arguments((2, 64, 14, 14), 64, 3, 1, 1, dtype=torch.bfloat16, device="cuda")
    for function in triton.candidates("conv_bn_act", *args).values():
        assert_right(args, function(*args))


def test_every_candidate_of_two_convolutions():
    op = "conv_bn_act_conv_bn_act"
    for args in OPS[op].samples("cuda", torch.bfloat16):
        if args[0].numel() and triton.supports(op, *args) is None:
            for function in triton.candidates(op, *args).values():
                assert_right(args, function(*args), op)


def test_a_stream_that_is_not_the_default_one():
    args = arguments((2, 64, 14, 14), 64, 3, 1, 1, dtype=torch.float16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), rf.use_backend("triton"):
        out = triton.conv_bn_act(*args)
    stream.synchronize()
    assert_right(args, out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one():
    args = arguments((2, 64, 14, 14), 64, 3, 1, 1, dtype=torch.float16, device="cuda:1")
    out = triton.conv_bn_act(*args)
    assert out.device == torch.device("cuda", 1)
    assert_right(args, out)
