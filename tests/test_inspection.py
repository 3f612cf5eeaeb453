"""The command `inspect`: what it shows, and what it says about options that it does not take."""

import dataclasses
import re

import pytest
import torch
from typer.testing import CliRunner, Result

from resnet_fused.backends.triton.shapes import Problem
from resnet_fused.cli import app
from resnet_fused.inspection import convolutions
from resnet_fused.inspection.subjects import SUBJECTS


def call(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "140"}).invoke(app, ["inspect", *words])


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("compiler")
def test_a_shape_whose_k_is_split_has_two_kernels():
    result = call("--shape", "1,512,7,7,512,3,1", "--arch", "80", "--dtype", "fp16")
    assert result.exit_code == 0, result.output
    for word in (
        "conv_bn_act, fp16",
        "  80  ",
        "1x512x7x7",
        "3x3 512",
        "mma.sync",
        "async 16",
        "+ affine_kernel",
    ):
        assert word in result.stdout


@pytest.mark.usefixtures("compiler")
def test_a_model_has_a_row_per_distinct_convolution():
    result = call("--model", "cifar_resnet20", "--batch", "1", "--dtype", "bf16", "--arch", "90")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("1x")]
    distinct = convolutions("cifar_resnet20", 1, torch.bfloat16)
    assert len(rows) == len(distinct)
    assert rows[0][:4] == ["1x3x224x224", "3x3", "16", "1"]


PAIR, STEM, HEAD = "conv_bn_act_conv_bn_act", "conv_bn_act_max_pool", "avg_pool_linear"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("op", "shape", "words"),
    [
        (PAIR, "8,64,28,28,64,3,1,256", ("8x64x28x28", "3x3 64, 1x1 256 + r", "async 16", "wgmma")),
        (STEM, "2,3,64,64,64,7,2", ("2x3x64x64", "7x7 64 /2, pool 3x3 /2", "async 16", "wgmma")),
        (HEAD, "8,512,7,7,100", ("8x512x7x7", "mean, linear 100", "+ linear_kernel", "async 16")),
    ],
)
def test_each_op_on_each_architecture(op, shape, words):
    """One command line shows what the issue asks of a shape: registers, spills, products, loads."""
    result = call("--op", op, "--shape", shape)
    assert result.exit_code == 0, result.output
    for word in (f"{op}, bf16", *words, "mma.sync"):
        assert word in result.stdout
    assert ("tcgen05" in result.stdout) == (op != HEAD)
    numbers = [word for line in result.stdout.splitlines() for word in line.split()[:4]]
    assert all(arch in numbers or arch in result.stdout.split() for arch in ("80", "90", "100"))
    assert "0 of " in result.stdout


@pytest.mark.usefixtures("compiler")
def test_all_shows_every_config_that_would_be_timed():
    result = call("--op", STEM, "--shape", "2,3,64,64,64,7,2", "--all", "--arch", "80")
    assert result.exit_code == 0, result.output
    stem = SUBJECTS[STEM]
    problem = stem.parse("--shape", "2,3,64,64,64,7,2")
    configs = stem.candidates(problem, "bf16", 80)
    assert len(configs) > 1
    assert [
        word for word in result.stdout.split() if re.fullmatch(r"m\d+n\d+k\d+w\db\d+", word)
    ] == [str(config) for config in configs]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("dtype", "product"), [("tf32", "mma.sync"), ("fp32", "fma")])
def test_float32_is_float32_and_tf32_is_tf32(dtype, product):
    """Whatever torch's own flags say."""
    result = call("--shape", "2,64,7,7,64,3,1", "--arch", "80", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert f"conv_bn_act, {dtype}" in result.stdout
    (row,) = [line for line in result.stdout.splitlines() if "2x64x7x7" in line]
    assert product in row


def test_a_spill_exits_with_1(monkeypatch):
    from resnet_fused.backends.triton.aot import Compiled

    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spilled = Compiled("conv_fwd_kernel", 255, 16, 1024, "mma.sync", {"async 8": 2}, False)
    subject = dataclasses.replace(SUBJECTS["conv_bn_act"], compile=lambda *cut: [spilled])
    monkeypatch.setitem(SUBJECTS, "conv_bn_act", subject)
    result = call("--shape", "2,64,7,7,64,3,1")
    assert result.exit_code == 1
    assert "3 of 3 kernels spill" in result.stdout


def test_shapes_are_read():
    pairs = ((2, 2), (1, 1), (1, 1))
    conv = Problem.of((2, 64, 9, 8), (32, 64, 3, 3), *pairs, 1, False)
    assert SUBJECTS["conv_bn_act"].parse("--shape", "2,64,9,8,32,3,2") == conv
    stem = SUBJECTS[STEM].parse("--shape", "2,64,9,8,32,3,2")
    assert (stem.conv, stem.out_size) == (conv, (3, 2))
    pair = SUBJECTS[PAIR].parse("--shape", "2,64,9,8,32,3,2,128")
    assert (pair.first, pair.o, pair.residual) == (conv, 128, True)
    assert SUBJECTS[HEAD].parse("--shape", "2,64,9,8,10") == (2, 64, 9, 8, 10)
    for subject in SUBJECTS.values():
        subject.parse("--shape", subject.example)


def test_groups_and_dilation_are_read():
    conv = SUBJECTS["conv_bn_act"]
    geometry = {"groups": "32", "dilation": "2"}
    found = conv.parse("--shape", "2,128,9,8,64,3,1", geometry)
    pairs = ((1, 1), (2, 2), (2, 2))
    assert found == Problem.of((2, 128, 9, 8), (64, 4, 3, 3), *pairs, 32, False)
    assert found.out_size == (9, 8)  # padded for it
    assert conv.words(found)[1] == "3x3 64 groups 32 dilation 2"
    apart = {"dilation": "2"}
    assert SUBJECTS[PAIR].parse("--shape", "2,64,9,8,32,3,2,128", apart).first.dilation == (2, 2)
    assert SUBJECTS[STEM].parse("--shape", "2,64,9,8,32,3,2", apart).conv.padding == (2, 2)


@pytest.mark.usefixtures("compiler")
def test_a_resnext_s_convolution_is_compiled():
    result = call("--shape", "2,128,14,14,128,3,1", "--groups", "32", "--arch", "80")
    assert result.exit_code == 0, result.output
    (row,) = [line for line in result.stdout.splitlines() if "2x128x14x14" in line]
    assert "3x3 128 groups 32" in row


@pytest.mark.parametrize(
    ("op", "distinct", "calls"), [("conv_bn_act", 24, 53), (PAIR, 3, 7), (STEM, 1, 1), (HEAD, 1, 1)]
)
def test_the_calls_of_a_resnet50(op, distinct, calls):
    found = SUBJECTS[op].of_model("resnet50", 2, torch.bfloat16)
    assert (len(found), sum(found.values())) == (distinct, calls)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--model or --shape: one of the two is needed"),
        (("-m", "resnet18", "--shape", "1,1,1,1,1,1,1"), "--model or --shape: one of the two"),
        (("-m", "resnet5"), "--model: unknown value 'resnet5'; did you mean resnet50"),
        (("--shape", "1,2,3"), "--shape: '1,2,3' given; accepted: N,C,H,W,O,K,STRIDE, such"),
        (("--shape", "1,2,3,4,5,6,x"), "--shape, its STRIDE: 'x' given; accepted: a whole number"),
        (("--shape", "1,4,1,1,4,8,0"), "--shape, its STRIDE: '0' given"),
        (
            ("--shape", "1,2,3,4,5,6,7", "--op", PAIR),
            "--shape: '1,2,3,4,5,6,7' given; accepted: "
            "N,C,H,W,BETWEEN,K,STRIDE,O, such as 256,64,56,56,64,3,1,256",
        ),
        (
            ("--shape", "1,64,9,9,256,3,1,64", "--op", PAIR),
            "--shape: the kernel keeps at most 128 "
            "channels between two convolutions on the chip, weight has 256",
        ),
        (("--shape", "1,2,3", "--op", HEAD), "--shape: '1,2,3' given; accepted: N,C,H,W,CLASSES"),
        (
            ("-m", "resnet50", "--op", PAIR, "-d", "tf32"),
            f"--dtype: tf32 given; accepted by {PAIR}: bf16, fp16",
        ),
        (("-m", "resnet18", "--op", PAIR), f"--op: resnet18 has no {PAIR} that its kernel takes"),
        (
            ("-m", "resnet18", "--op", "conv_bn"),
            "--op: unknown value 'conv_bn'; did you mean conv_bn_",
        ),
        (
            ("--op", HEAD),
            f"--model or --shape: one of the two is needed, such as --model resnet50 or "
            f"--op {HEAD} --shape 256,2048,7,7,1000",
        ),
        (
            ("--shape", "1,64,9,9,96,3,1", "--groups", "48"),
            "--groups: 48 given; accepted: a divisor of the channels, 64 in and 96 out",
        ),
        (("--shape", "1,64,9,9,96,3,1", "--dilation", "0"), "--dilation: '0' given; accepted: a"),
        (
            ("--shape", "1,64,9,9,96,3,1", "--groups", "2", "--op", STEM),
            "--groups: not a number of this --op; accepted by conv_bn_act",
        ),
        (
            ("--shape", "8,512,7,7,100", "--dilation", "2", "--op", HEAD),
            f"--dilation: not a number of this --op; accepted by conv_bn_act, {PAIR}, {STEM}",
        ),
        (
            ("-m", "resnet18", "--groups", "2"),
            "--groups: '2' given; accepted with --shape, a model has its own",
        ),
        (("-m", "resnet18", "--arch", "70"), "--arch: unknown value '70'; "),
        (("-m", "resnet18", "-b", "0"), "--batch: '0' given"),
        (("-m", "resnet18", "-d", "fp8"), "--dtype: unknown value 'fp8'; accepted: fp32"),
    ],
)
def test_errors_are_one_line(words, message):
    result = call(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"resnet-fused: {message}")
    assert result.stderr.count("\n") == 1


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = call("--shape", "1,16,4,4,16,1,1")
    assert (result.exit_code, "unset it" in result.stderr) == (2, True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = call("--shape", "1,16,4,4,16,1,1")
    assert (result.exit_code, "triton is not installed" in result.stderr) == (2, True)
