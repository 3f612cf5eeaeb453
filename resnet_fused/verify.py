"""A certificate of errors: a fused model against float64, layer by layer, beside eager torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused.convert import fuse, fusion_report, unfuse
from resnet_fused.freeze import freeze
from resnet_fused.ops import OPS
from resnet_fused.testing import ErrorCheck, factors_dtype, longest_sum, to_float64, two_x_rule


class Row(NamedTuple):
    """One layer, or one output of the whole model."""

    name: str
    #: max |oracle|, to read the errors against.
    peak: float
    check: ErrorCheck


class VerifyReport(NamedTuple):
    """Errors against float64; ``str()`` is a table with a verdict."""

    #: Each fused convolution on the inputs it really got.
    layers: list[Row]
    #: The whole model, fused and frozen, from input to output.
    outputs: list[Row]

    @property
    def ok(self) -> bool:
        """Whether every row holds the 2x rule."""
        return all(row.check.ok for row in (*self.layers, *self.outputs))

    def __str__(self) -> str:
        """Return one line per layer and output, relative to the largest value, and the verdict."""
        rows = [*self.layers, *self.outputs]
        width = max((len(row.name) for row in rows), default=5)
        lines = [f"{'layer':<{width}}  {'error':>9}  {'eager':>9}  {'allowed':>9}"]
        for row in rows:
            error, eager, allowed = (value / (row.peak or 1.0) for value in row.check)
            verdict = "" if row.check.ok else "  WRONG"
            numbers = f"{error:9.2e}  {eager:9.2e}  {allowed:9.2e}"
            lines.append(f"{row.name:<{width}}  {numbers}{verdict}")
        wrong = sum(not row.check.ok for row in rows)
        summary = f"{wrong} of {len(rows)} rows are WRONG" if wrong else "every row is within it"
        lines.append("max |y - float64| / max |float64|; allowed: twice eager torch's, plus the")
        lines.append(f"rounding of as many random terms as the layer sums: {summary}.")
        return "\n".join(lines)


def verify(
    model: nn.Module,
    example_input: Tensor,
    *,
    on_step: Callable[[int, int], None] = lambda done, of_all: None,
) -> VerifyReport:
    """Hold a model, fused and frozen, to the 2x rule on one input.

    Every fused convolution is run on the input that reaches it in the fused model, and compared
    with the same layer in float64 and with eager torch (convolution, BatchNorm, add and ReLU one
    by one in the model's dtype). The model's output is compared end to end, beside eager torch in
    the model's layout and in channels_last, which an engine may choose: the larger error counts.

    Args:
        model: in eval mode, fused or not; it is not changed.
        example_input: what the model takes.
        on_step: is told how many layers are done, and of how many, the whole model one of them.

    Raises:
        ValueError: the model is in training mode or has no convolution.
        TypeError: ``model`` or ``example_input`` is of another type.
    """
    frozen = freeze(model, example_input)
    fused = fuse(model)
    of_all = len(fusion_report(fused).fused) + 1
    names = {id(p): name for name, p in fused.named_parameters()}
    recorder = _Recorder(names, lambda done: on_step(done, of_all))
    on_step(0, of_all)
    with torch.no_grad():
        with recorder:
            fused_output = fused(example_input)
        eager = unfuse(copy.deepcopy(model))
        eager_outputs = [eager(example_input)]
        for weight in eager.parameters():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        eager_outputs.append(eager(example_input))
        oracle = eager.double()(example_input.double())
        outputs, reduced = [], longest_sum(eager)
        for name, value in (("fuse", fused_output), ("freeze", frozen(example_input))):
            outputs += _compare(name, value, eager_outputs, oracle, reduced)
    on_step(of_all, of_all)
    return VerifyReport(recorder.rows, outputs)


class _Recorder(TorchDispatchMode):
    """Checks every conv_bn_act as it runs."""

    def __init__(self, names: dict[int, str], on_row: Callable[[int], None]) -> None:
        super().__init__()
        self._names, self._on_row = names, on_row
        self.rows: list[Row] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.resnet_fused.conv_bn_act.default:
            weight = args[1]
            name = self._names.get(id(weight), "conv").removesuffix(".weight")
            oracle = OPS["conv_bn_act"].reference(*map(to_float64, args))
            reduced = weight[0].numel()
            self.rows.append(_row(name, result, [_eager(*args)], oracle, reduced))
            self._on_row(len(self.rows))
        return result


def _eager(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str | None,
) -> Tensor:
    """Run the layer as eager torch does: each step rounds to x's dtype."""
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    y = (y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)
    if residual is not None:
        y = y + residual
    return torch.relu(y) if act == "relu" else y


def _compare(name: str, value: Any, eagers: list[Any], oracle: Any, reduced: int) -> list[Row]:
    leaves = [pytree.tree_leaves(v) for v in (value, oracle, *eagers)]
    rows = []
    for i, (v, o, *e) in enumerate(zip(*leaves, strict=True)):
        if isinstance(v, Tensor) and v.is_floating_point():
            title = f"output of {name}" if len(leaves[0]) == 1 else f"output {i} of {name}"
            rows.append(_row(title, v, e, o, reduced))
    return rows


def _row(name: str, value: Tensor, eagers: list[Tensor], oracle: Tensor, reduced: int) -> Row:
    """Return a row by whichever of eager torch's results allows for more."""
    finite = oracle[oracle.isfinite()]
    peak = float(finite.abs().max()) if finite.numel() else 0.0
    kind = factors_dtype(value)
    checks = [two_x_rule(value, eager, oracle, reduced, kind) for eager in eagers]
    return Row(name, peak, max(checks, key=lambda check: check.allowed))
