"""Offsets that take 64 bits: which launches use them, and that they reach every large tensor.

At their real sizes, on tensors without data. That the results are the same is for
`interpreted*.py`, where every launch is made to use them.
"""

import re

import pytest
import torch
from compiling import compilers

from resnet_fused.backends.triton.pair_tiles import Pair
from resnet_fused.backends.triton.shapes import Config, Problem
from resnet_fused.backends.triton.stem import Stem, StemConfig

pytest.importorskip("triton")

ONE, POOL = ((1, 1), (0, 0), (1, 1)), ((3, 3), (2, 2), (1, 1))
PADDED = ((1, 1), (1, 1), (1, 1))
#: Of sm_80, where nothing is fetched by TMA.
CAPABILITY = 80


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def conv(x, o, k=1, groups=1, name="m64n64k32w4s2x1g8") -> list:
    from resnet_fused.backends.triton import launch

    pairs = PADDED if k == 3 else ONE
    weight = (o, x[1] // groups, k, k)
    p = Problem.of(x, weight, *pairs, groups, False)
    y = meta(p.n, o, *p.out_size)
    args = (meta(*x), meta(*weight), None, None, None, y, p, Config.parse(name), None)
    return launch.conv(*args, CAPABILITY)


def pair(x, between, o) -> list:
    from resnet_fused.backends.triton import launch

    weights = (between, x[1], 3, 3), (o, between, 1, 1)
    p, config = Pair.of(x, *weights, *PADDED, False), Config.parse("m64n64k32w4s2x1g8")
    first, second = (meta(*shape) for shape in weights)
    args = (meta(*x), first, None, None, second, None, None, None, meta(x[0], o, *x[2:]))
    return [launch.pair(*args, p, config, None, None)]


def stem(x, o) -> list:
    from resnet_fused.backends.triton import launch_ends

    p = Stem.of(x, (o, x[1], 7, 7), (2, 2), (3, 3), (1, 1), *POOL)
    y, config = meta(x[0], o, *p.out_size), StemConfig.parse("m64n64k32w4b2")
    return [launch_ends.stem(meta(*x), meta(o, x[1], 7, 7), None, None, y, p, config, None)]


def head(x, classes) -> list:
    from resnet_fused.backends.triton import launch_ends

    return launch_ends.head(meta(*x), meta(classes, x[1]), None, meta(x[0], classes), CAPABILITY)


def gradients(x, o, k) -> list:
    from resnet_fused.backends.triton import conv_launch

    weight = (o, x[1], k, k)
    p = Problem.of(x, weight, *(PADDED if k == 3 else ONE), 1, False)
    y, out = meta(x[0], o, *x[2:]), meta(o, k * k * x[1])
    return [
        *conv_launch.backward_data(y, meta(*weight), meta(*x), p, CAPABILITY, meta(*x)),
        *conv_launch.backward_weight(y, meta(*x), out, p, CAPABILITY),
    ]


#: Launches, and which of them have 64-bit offsets.
CASES = {
    "ResNet's": (lambda: conv((256, 64, 56, 56), 64, 3), [False]),
    "a convolution's input": (lambda: conv((2**11, 128, 100, 100), 64, 3), [True]),
    "its output": (lambda: conv((2**11, 32, 100, 100), 128, 3), [True]),
    "its weight": (lambda: conv((1, 65536, 4, 4), 65536), [True]),
    "its weight, by a part": (lambda: conv((1, 65504, 4, 4), 32768), [False]),
    "the sums of parts of K": (
        lambda: conv((256, 1024, 64, 64), 1024, 1, 1, "m64n64k32w4s2x2g8"), [True, False]
    ),
    "groups": (lambda: conv((1, 2**17, 4, 4), 2**16, 1, 2), [True]),
    "channels one by one": (lambda: conv((1, 3, 2**13, 2**13), 64, 3), [True]),
    "depthwise": (lambda: conv((2**11, 256, 80, 80), 256, 3, 256), [True]),
    "the last rows of one channel": (lambda: conv((1, 1, 1, 2**31 - 8), 1), [True]),
    "a pair's weight": (lambda: pair((1, 64, 4, 4), 128, 2**24), [True]),
    "a pair": (lambda: pair((256, 64, 56, 56), 64, 256), [False]),
    "a stem": (lambda: stem((2**14, 3, 224, 224), 64), [True]),
    "ResNet's stem": (lambda: stem((256, 3, 224, 224), 64), [False]),
    "a head's map": (lambda: head((2**15, 2048, 7, 7), 1000), [True, False]),
    "a head's means": (lambda: head((2**20, 2048, 1, 1), 1000), [True, True]),
    "a head's weight": (lambda: head((8, 2048, 7, 7), 2**20), [False, True]),
    "a head's result": (lambda: head((2**16, 64, 1, 1), 2**15), [False, True]),
    "ResNet's head": (lambda: head((256, 2048, 7, 7), 1000), [False, False]),
    "gradients by a weight": (lambda: gradients((1, 65536, 4, 4), 65536, 1), [True, True]),
    "ResNet's gradients": (lambda: gradients((64, 64, 56, 56), 64, 1), None),
}  # fmt: skip


def made(name: str) -> list[tuple[bool, dict[str, set[str]]]]:
    """Of each launch: whether it is to have 64-bit offsets, and the offsets' types by pointer."""
    from resnet_fused.backends.triton import aot

    return [
        (step.arguments["WIDE"], offsets(aot.built(step, CAPABILITY).asm["ttir"]))
        for step in CASES[name][0]()
        if "WIDE" in step.arguments
    ]


def offsets(ttir: str) -> dict[str, set[str]]:
    """The types of what is added to each pointer that a kernel is given."""
    source: dict[str, str] = {}
    found: dict[str, set[str]] = {}
    step = r"\s*(%\w+) = tt\.(addptr|splat|broadcast|expand_dims) (%\w+).*!tt\.ptr<"
    for line in ttir.splitlines():
        if match := re.match(step, line):
            result, what, operand = match.groups()
            source[result] = source.get(operand, operand)
            if what == "addptr":
                types = line.partition(" loc(")[0].partition(" : ")[2]
                found.setdefault(source[result], set()).add(re.findall("i(?:32|64)", types)[-1])
    return found


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict:
    with compilers(tmp_path_factory.mktemp("triton")) as pool:
        running = {name: pool.submit(made, name) for name in CASES}
        return {name: f.result() for name, f in running.items()}


#: The vectors, and what is told by a channel alone.
SHORT = {"%scale_ptr", "%shift_ptr", "%bias_ptr"}


@pytest.mark.parametrize("name", CASES)
def test_offsets(kernels, name):
    expected = CASES[name][1]
    wide = [w for w, _ in kernels[name]]
    assert wide == (expected or [False] * len(wide))
    for is_wide, types in kernels[name]:
        assert types
        for pointer in types.keys() - SHORT:
            assert ("i64" in types[pointer]) == is_wide, f"{pointer}: {types[pointer]}"
