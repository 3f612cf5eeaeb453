"""What `inspect` compiles: the ops of inference that have Triton kernels with tiles to choose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from resnet_fused.backends.triton import im2col, pair_tiles, stem
from resnet_fused.backends.triton.head import HeadConfig, head_config
from resnet_fused.backends.triton.pair_tiles import Pair
from resnet_fused.backends.triton.shapes import Config, Problem
from resnet_fused.backends.triton.stem import Stem, StemConfig
from resnet_fused.bench import options
from resnet_fused.bench.options import UsageError
from resnet_fused.engine import merge
from resnet_fused.engine.capture import Call, Captured, capture, fill

if TYPE_CHECKING:
    from resnet_fused.backends.triton.aot import Compiled

ALL_PRECISIONS = ("bf16", "fp16", "tf32", "fp32")
#: Neither groups nor a dilation.
_PLAIN: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Subject:
    """An op: how a problem is read, cut, compiled and shown."""

    #: What a shape on the command line is made of, and one of them.
    numbers: str
    example: str
    #: The problem of these numbers, and of the arguments of a call.
    of_numbers: Callable[..., Any]
    of_arguments: Callable[..., Any]
    #: The calls of a captured pass.
    calls: Callable[[Captured], Iterator[Call]]
    #: ``candidates(problem, precision, capability)``, the one used where none was measured first.
    candidates: Callable[[Any, str, int], Sequence[Any]]
    #: ``compile(problem, dtype, config, capability)``.
    compile: Callable[[Any, torch.dtype, Any, int], list[Compiled]]
    #: The input and the kernel in a few words.
    words: Callable[[Any], tuple[str, str]]
    precisions: tuple[str, ...] = ALL_PRECISIONS
    #: Why the kernel does not take a problem, or None.
    declines: Callable[[Any], str | None] = lambda problem: None
    #: What the command line may say of a convolution beside its shape: keywords of ``of_numbers``.
    geometry: tuple[str, ...] = ("dilation",)

    def parse(self, option: str, text: str, geometry: Mapping[str, str] = _PLAIN) -> Any:
        """Return the problem of numbers separated by commas, and of groups and dilation beside.

        Raises:
            UsageError: the text is not that, or no kernel takes the problem.
        """
        for name in geometry:
            if name not in self.geometry:
                takers = ", ".join(op for op, s in SUBJECTS.items() if name in s.geometry)
                raise UsageError(f"--{name}: not a number of this --op; accepted by {takers}")
        parts, names = text.split(","), self.numbers.split(",")
        if len(parts) != len(names):
            raise UsageError(
                f"{option}: {text!r} given; accepted: {self.numbers}, such as {self.example}"
            )
        problem = self.of_numbers(
            *(
                options.positive(f"{option}, its {name}", part)
                for name, part in zip(names, parts, strict=True)
            ),
            **{name: options.positive(f"--{name}", value) for name, value in geometry.items()},
        )
        if reason := self.declines(problem):
            raise UsageError(f"{option}: the kernel {reason}")
        return problem

    def of_model(self, name: str, batch: int, dtype: torch.dtype) -> Counter[Any]:
        """Return the distinct calls of a model on 224x224 images, and how often each is made.

        Nothing is computed: the model runs on meta tensors. What the kernel declines is left out.
        """
        import resnet_fused as rf
        from resnet_fused.models import create_model

        with torch.device("meta"), torch.no_grad():
            model = rf.fuse(create_model(name).to(dtype).eval())
            passed = capture(model, torch.empty(batch, 3, 224, 224, dtype=dtype))
        values = list(passed.examples)
        found = (self.of_arguments(*fill(call.args, values)) for call in self.calls(passed))
        return Counter(problem for problem in found if self.declines(problem) is None)


def _geometry(
    k: int, stride: int, dilation: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return stride, padding, dilation; padded as networks do, so that stride 1 keeps the size."""
    padding = dilation * (k // 2)
    return (stride, stride), (padding, padding), (dilation, dilation)


def _map(n: int, c: int, h: int, w: int) -> str:
    return f"{n}x{c}x{h}x{w}"


# --- conv_bn_act ---------------------------------------------------------------------------------


def _conv(
    n: int, c: int, h: int, w: int, o: int, k: int, stride: int, *, groups: int = 1,
    dilation: int = 1,
) -> Problem:  # fmt: skip
    if c % groups or o % groups:
        raise UsageError(
            f"--groups: {groups} given; accepted: a divisor of the channels, {c} in and {o} out"
        )
    shapes = (n, c, h, w), (o, c // groups, k, k)
    return Problem.of(*shapes, *_geometry(k, stride, dilation), groups, False)


def _conv_of(x: Any, weight: Any, scale: Any, shift: Any, residual: Any, *rest: Any) -> Problem:
    stride, padding, dilation, groups, _ = rest
    has_residual = residual is not None
    return Problem.of(x.shape, weight.shape, stride, padding, dilation, groups, has_residual)


def _conv_calls(passed: Captured) -> Iterator[Call]:
    return (call for call in passed.calls if call.target is merge.CONV)


def _compile_conv(problem: Problem, dtype: torch.dtype, config: Config, arch: int) -> Any:
    from resnet_fused.backends.triton import aot

    return aot.compile_conv(problem, dtype, config, arch)


def _conv_words(problem: Problem) -> tuple[str, str]:
    channels, outputs = problem.c * problem.groups, problem.o * problem.groups
    kh, kw = problem.kernel
    kernel = f"{kh}x{kw} {outputs}"
    kernel += f" /{problem.stride[0]}" if problem.stride[0] > 1 else ""
    kernel += f" groups {problem.groups}" if problem.groups > 1 else ""
    kernel += f" dilation {problem.dilation[0]}" if problem.dilation[0] > 1 else ""
    kernel += " + r" if problem.residual else ""
    return _map(problem.n, channels, problem.h, problem.w), kernel


# --- conv_bn_act_conv_bn_act, as a bottleneck has it: with a residual ----------------------------


def _pair(
    n: int, c: int, h: int, w: int, between: int, k: int, stride: int, o: int, *, dilation: int = 1
) -> Pair:
    shapes = (n, c, h, w), (between, c, k, k), (o, between, 1, 1)
    return Pair.of(*shapes, *_geometry(k, stride, dilation), residual=True)


def _pair_of(x: Any, weight: Any, scale: Any, shift: Any, weight2: Any, *rest: Any) -> Pair:
    residual, stride, padding, dilation = rest[2:6]
    shapes = (x.shape, weight.shape, weight2.shape)
    return Pair.of(*shapes, stride, padding, dilation, residual is not None)


def _pair_calls(passed: Captured) -> Iterator[Call]:
    return (call for _, call in merge.pairs(passed))


def _compile_pair(problem: Pair, dtype: torch.dtype, config: Config, arch: int) -> Any:
    from resnet_fused.backends.triton import aot

    return [aot.compile_pair(problem, dtype, config, arch)]


def _pair_words(problem: Pair) -> tuple[str, str]:
    given, kernel = _conv_words(problem.first)
    return given, f"{kernel}, 1x1 {problem.o}" + (" + r" if problem.residual else "")


# --- conv_bn_act_max_pool, with the pool of the ResNets: 3x3, stride 2, padding 1 ----------------


def _stem(
    n: int, c: int, h: int, w: int, o: int, k: int, stride: int, *, dilation: int = 1
) -> Stem:
    pool = (3, 3), (2, 2), (1, 1)
    return Stem.of((n, c, h, w), (o, c, k, k), *_geometry(k, stride, dilation), *pool)


def _stem_of(x: Any, weight: Any, scale: Any, shift: Any, *rest: Any) -> Stem:
    stride, padding, dilation, _, _, *pool = rest
    return Stem.of(x.shape, weight.shape, stride, padding, dilation, *pool)


def _compile_stem(problem: Stem, dtype: torch.dtype, config: StemConfig, arch: int) -> Any:
    from resnet_fused.backends.triton import aot

    return aot.compile_stem(problem, dtype, config, arch)


def _stem_words(problem: Stem) -> tuple[str, str]:
    given, kernel = _conv_words(problem.conv)
    (kh, kw), (step, _) = problem.pool_size, problem.pool_stride
    return given, f"{kernel}, pool {kh}x{kw} /{step}"


# --- avg_pool_linear -----------------------------------------------------------------------------


class _Head(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    classes: int


def _head_of(x: Any, weight: Any, bias: Any) -> _Head:
    n, c, h, w = x.shape
    return _Head(n, c, h, w, weight.shape[0])


def _head_candidates(problem: _Head, precision: str, capability: int) -> list[HeadConfig]:
    return [head_config(problem.n, problem.classes, precision == "fp32", capability)]


def _compile_head(problem: _Head, dtype: torch.dtype, config: HeadConfig, arch: int) -> Any:
    from resnet_fused.backends.triton import aot

    return aot.compile_head(problem[:4], problem.classes, dtype, arch)


def _head_words(problem: _Head) -> tuple[str, str]:
    return _map(*problem[:4]), f"mean, linear {problem.classes}"


SUBJECTS = {
    "conv_bn_act": Subject(
        "N,C,H,W,O,K,STRIDE", "256,64,56,56,64,3,1", _conv, _conv_of, _conv_calls,
        im2col.beside_tiles, _compile_conv, _conv_words, geometry=("groups", "dilation"),
    ),
    "conv_bn_act_conv_bn_act": Subject(
        "N,C,H,W,BETWEEN,K,STRIDE,O", "256,64,56,56,64,3,1,256", _pair, _pair_of, _pair_calls,
        pair_tiles.candidates, _compile_pair, _pair_words, ("bf16", "fp16"), pair_tiles.declines,
    ),
    "conv_bn_act_max_pool": Subject(
        "N,C,H,W,O,K,STRIDE", "256,3,224,224,64,7,2", _stem, _stem_of, merge.stems,
        stem.candidates, _compile_stem, _stem_words,
    ),
    "avg_pool_linear": Subject(
        "N,C,H,W,CLASSES", "256,2048,7,7,1000", _Head, _head_of, merge.heads,
        _head_candidates, _compile_head, _head_words, geometry=(),
    ),
}  # fmt: skip


def convolutions(name: str, batch: int, dtype: torch.dtype) -> Counter[Problem]:
    """Return a model's distinct fused convolutions on 224x224 images, and how often each is."""
    return SUBJECTS["conv_bn_act"].of_model(name, batch, dtype)
