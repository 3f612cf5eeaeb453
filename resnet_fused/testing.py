"""What a numerical claim is held to: the float64 oracle, the 2x rule, gradient metrics.

Used by the tests, by ``resnet-fused verify`` and by the benchmarks, so that one rule decides.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def to_float64(value: Any) -> Any:
    """Return ``value`` with every floating point tensor and dtype in it as float64."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if isinstance(value, list | tuple):
        return type(value)(to_float64(v) for v in value)
    return value


class ErrorCheck(NamedTuple):
    """An error against the float64 oracle beside what it may be."""

    #: max |value - oracle|.
    error: float
    #: The error of eager torch in the same dtype.
    eager_error: float
    #: 2 · eager_error + floor.
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the 2x rule holds."""
        return self.error <= self.allowed


def max_error(value: Tensor, oracle: Tensor) -> float:
    """Return max |value - oracle|; infinite where only one is finite, or their NaNs differ.

    Equal infinities and NaN in the same places are no error.
    """
    if value.numel() == 0:
        return 0.0
    value, oracle = value.detach().double(), oracle.detach().double()
    same = (value == oracle) | (value.isnan() & oracle.isnan())
    difference = torch.where(same, 0.0, (value - oracle).abs())
    return float(torch.nan_to_num(difference, nan=math.inf, posinf=math.inf).max())


def two_x_rule(
    value: Tensor,
    eager: Tensor,
    oracle: Tensor,
    reduced: int,
    dtype: torch.dtype | None = None,
    size: float = 0.0,
) -> ErrorCheck:
    """Hold ``value`` to at most twice eager torch's error plus a floor.

    The floor is max|oracle| · (eps(dtype) + eps(accumulation dtype) · √reduced): one rounding of
    the result, and that of ``reduced`` random terms in float32 (float64 for float64). It is for
    the cases where eager happens to be exact.

    Args:
        value: the result under test.
        eager: what eager torch gives in the same dtype.
        oracle: the result in float64.
        reduced: how many terms each element sums (C/groups · KH · KW for a convolution).
        dtype: what the computation rounds to on its way, where that is not ``value``'s own dtype.
        size: √Σ terms², the size of a sum whose terms have random signs, for a result of few
            sums: all may cancel to nearly nothing, and the floor stands on the larger of both.
    """
    finite = oracle[oracle.isfinite()]
    peak = max(size, float(finite.abs().max())) if finite.numel() else size
    floor = peak * _rounding(dtype or value.dtype, reduced)
    eager_error = max_error(eager, oracle)
    allowed = 2 * (eager_error if math.isfinite(eager_error) else 0.0) + floor
    return ErrorCheck(max_error(value, oracle), eager_error, allowed)


def longest_sum(model: nn.Module) -> int:
    """Return the most products that one output of a convolution or linear layer sums."""
    weights = (
        module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    )
    return max((weight[0].numel() for weight in weights), default=1)


def factors_dtype(x: Tensor) -> torch.dtype:
    """Return what a convolution of ``x`` may round its factors to, for :func:`two_x_rule`.

    That is x's own dtype, but float16 for float32 on a GPU where torch allows TF32, which has as
    many bits of mantissa. Whether eager torch then takes TF32 differs by shape: cuDNN has no such
    convolution of three channels.
    """
    if x.is_cuda and x.dtype == torch.float32:
        flag: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        return torch.float16 if flag == "tf32" else x.dtype
    return x.dtype


class GradientMetrics(NamedTuple):
    """How a gradient relates to the oracle's."""

    #: Cosine of the angle between the two; 1 is the same direction.
    cosine: float
    #: Mean signed error over the mean magnitude of the oracle: a systematic drift.
    bias: float


def gradient_metrics(value: Tensor, oracle: Tensor) -> GradientMetrics:
    """Compare a gradient with the float64 oracle's by direction and by signed bias."""
    value, oracle = value.detach().double().flatten(), oracle.detach().double().flatten()
    norms = float(value.norm() * oracle.norm())
    if norms == 0.0:
        same = bool(torch.equal(value, oracle))
        return GradientMetrics(1.0 if same else 0.0, 0.0 if same else math.inf)
    magnitude = float(oracle.abs().mean())
    return GradientMetrics(
        float(value @ oracle) / norms, float((value - oracle).mean()) / magnitude
    )


class GradientCheck(NamedTuple):
    """A gradient held to the rule beside eager torch's own."""

    error: ErrorCheck
    metrics: GradientMetrics
    #: The least cosine allowed.
    cosine: float
    #: The largest |bias| allowed.
    bias: float

    @property
    def ok(self) -> bool:
        """Whether size, direction and drift of the error are all within the rule."""
        direction = self.metrics.cosine >= self.cosine
        return self.error.ok and direction and abs(self.metrics.bias) <= self.bias


def gradient_rule(
    value: Tensor, eager: Tensor, oracle: Tensor, reduced: int, dtype: torch.dtype | None = None
) -> GradientCheck:
    """Hold a gradient to :func:`two_x_rule`, and its direction and drift likewise.

    With r = eps(dtype) + eps(accumulation dtype) · √reduced, the relative error that rounding
    explains: 1 - cosine may be twice eager's plus r², as an angle r has 1 - cos r = r² / 2; the
    bias, the mean of n signed errors, twice eager's plus 4 r / √n.
    """
    ours, theirs = gradient_metrics(value, oracle), gradient_metrics(eager, oracle)
    r = _rounding(dtype or value.dtype, reduced)
    return GradientCheck(
        two_x_rule(value, eager, oracle, reduced, dtype),
        ours,
        cosine=1 - 2 * (1 - theirs.cosine) - r**2 - 1e-14,
        bias=2 * abs(theirs.bias) + 4 * r / math.sqrt(max(value.numel(), 1)),
    )


def _rounding(dtype: torch.dtype, reduced: int) -> float:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(dtype).eps + torch.finfo(wide).eps * math.sqrt(max(reduced, 1))


def optional_import(name: str) -> ModuleType:
    """Import torchvision, timm or another package that needs torchvision's operators to exist.

    Beside a CPU-only torch, PyPI's torchvision does not load its compiled operators and then fails
    to import because ``torchvision::nms`` has no schema. Defining the two schemas is enough for
    its models, transforms and data sets.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    _define_torchvision_schemas()
    return importlib.import_module(name)


_schemas: torch.library.Library | None = None


def _define_torchvision_schemas() -> None:
    global _schemas
    if _schemas is not None or hasattr(torch.ops.torchvision, "nms") or torch.version.cuda:
        return
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
