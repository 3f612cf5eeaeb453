"""What a model costs: multiply-adds, parameters and bytes, counted on meta tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class LayerCost:
    """One call of a convolution, a linear layer or another matrix product."""

    #: The layer's fully qualified name; the op's name if no parameter of the model is the weight.
    name: str
    #: The op that ran, such as "aten.convolution".
    op: str
    output_shape: tuple[int, ...]
    #: Multiply-adds.
    macs: int
    #: Elements of the layer's own parameters.
    params: int
    #: Bytes of the input, the weight and the output, each crossing memory once.
    nbytes: int


@dataclass(frozen=True)
class FlopReport:
    """The cost of one forward; ``str()`` is a table."""

    model: str
    input_size: tuple[int, ...]
    #: One row per call, in order.
    layers: list[LayerCost]
    #: Elements of all parameters of the model, shared ones once.
    params: int

    @property
    def macs(self) -> int:
        """Multiply-adds, what the paper calls FLOPs."""
        return sum(layer.macs for layer in self.layers)

    @property
    def flops(self) -> int:
        """Two per multiply-add, as ``torch.utils.flop_counter.FlopCounterMode`` counts."""
        return 2 * self.macs

    @property
    def nbytes(self) -> int:
        """Bytes of the layers' inputs, weights and outputs."""
        return sum(layer.nbytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return totals and rows as ``json.dumps`` takes them."""
        totals = {"macs": self.macs, "flops": self.flops, "nbytes": self.nbytes}
        return {**asdict(self), **totals}

    def __str__(self) -> str:
        """Return one line per layer and one for the total."""
        table = [("layer", "output", "MMACs", "params", "MiB")]
        for r in self.layers:
            table.append((r.name, _shape(r.output_shape), *_figures(r.macs, r.params, r.nbytes)))
        table.append(("total", "", *_figures(self.macs, self.params, self.nbytes)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        line = "  ".join(f"{{:{side}{w}}}" for side, w in zip("<<>>>", widths, strict=True))
        head = f"{self.model}, input {_shape(self.input_size)}"
        return "\n".join((head, *(line.format(*row) for row in table)))


def _figures(macs: int, params: int, nbytes: int) -> tuple[str, str, str]:
    return f"{macs / 1e6:.3f}", f"{params:,}", f"{nbytes / 2**20:.3f}"


def _shape(size: Sequence[int]) -> str:
    return "x".join(str(n) for n in size)


def count(model: nn.Module, input_size: Sequence[int] = (1, 3, 224, 224)) -> FlopReport:
    r"""Count one forward of ``model`` in eval mode, layer by layer, without computing anything.

    A convolution costs, as the paper counts,

    .. math:: \text{MACs} = N \cdot O \cdot OH \cdot OW \cdot (C / groups) \cdot KH \cdot KW

    and a linear layer N · O · C; BatchNorm, activations, additions, pooling and biases cost
    nothing. The formulas are those of ``torch.utils.flop_counter``, so that
    ``with FlopCounterMode(): model(x)`` gives the same total, for a fused model as for the
    original. He et al. (arXiv 1512.03385), table 1.

    The forward runs on a copy whose tensors are on the meta device: ``model``, its device, mode,
    buffers and hooks are untouched, and hooks do not run.

    Args:
        model: any module whose forward takes one tensor; fused or not.
        input_size: shape of that tensor; its dtype is that of the first floating point parameter.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: ``input_size`` is not a sequence of positive integers, or the forward fails on
            it.
    """
    calls = trace("count", model, input_size).calls
    rows = [_row(call) for call in calls if call.flops is not None]
    params = sum(p.numel() for p in model.parameters())
    return FlopReport(type(model).__name__, tuple(input_size), rows, params)


def _row(call: Call) -> LayerCost:
    return LayerCost(
        name=call.name,
        op=call.op,
        output_shape=tuple(call.out.shape),
        macs=(call.flops or 0) // 2,
        params=call.params,
        nbytes=sum(t.nbytes for t in (*call.factors, call.out)),
    )


class Call(NamedTuple):
    """One op of a forward, with the meta tensors it read and wrote."""

    #: The layer's fully qualified name; the op's name if no parameter of the model is a factor.
    name: str
    #: Such as "aten.convolution".
    op: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    #: The first tensor of the result.
    out: Tensor
    #: Two per multiply-add; None if torch has no formula for the op.
    flops: int | None
    #: Elements of the layer's own parameters.
    params: int

    @property
    def factors(self) -> tuple[Any, ...]:
        """The input and the weight."""
        return _factors(self.func, self.args)


class Trace(NamedTuple):
    """What a forward ran, in order, and what it returned."""

    calls: list[Call]
    x: Tensor
    result: Any


def trace(
    caller: str,
    model: nn.Module,
    input_size: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Trace:
    """Run one forward of a copy of ``model`` on meta tensors, in eval mode, and note every op.

    Args:
        caller: the function that errors name.
        model: any module whose forward takes one tensor; it is untouched.
        input_size: shape of that tensor.
        dtype: of the copy and the tensor, instead of the model's own.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: ``input_size`` is not a sequence of positive integers, or the forward fails on
            it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, got {type(model).__name__}")
    size = _checked_size(caller, input_size)
    twin = meta_copy(model).eval()
    if dtype is not None:
        twin = twin.to(dtype)
    own = next((p.dtype for p in twin.parameters() if p.is_floating_point()), None)
    recorder = _Recorder(_owners(twin))
    try:
        with torch.inference_mode(False), torch.no_grad():
            x = torch.empty(size, dtype=dtype or own, device="meta")
            with recorder:
                result = twin(x)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{caller}: {type(model).__name__} failed on input_size={size}: {reason}"
        ) from error
    return Trace(recorder.calls, x, result)


def _checked_size(caller: str, input_size: Sequence[int]) -> tuple[int, ...]:
    given = tuple(input_size) if isinstance(input_size, Sequence) else ()
    good = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in given)
    if not given or not good:
        raise ValueError(
            f"{caller}: input_size={input_size!r} is not accepted; accepted: the input's shape as "
            "positive integers, such as (1, 3, 224, 224)"
        )
    return given


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with every tensor on the meta device, and without hooks."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        attributes = vars(module)
        for group in (attributes, attributes["_parameters"], attributes["_buffers"]):
            memo.update((id(t), _meta(t)) for t in group.values() if isinstance(t, Tensor))
        memo.update((id(attributes[hooks]), OrderedDict()) for hooks in _HOOKS)
    return copy.deepcopy(model, memo)


def _meta(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


class _Owner(NamedTuple):
    """The layer that has a parameter."""

    name: str
    params: int


def _owners(model: nn.Module) -> dict[int, _Owner]:
    owners: dict[int, _Owner] = {}
    for name, parameter in model.named_parameters():
        layer, _, last = name.rpartition(".")
        own = model.get_submodule(layer).parameters(recurse=False)
        shown = layer if layer and last == "weight" else name
        owners[id(parameter)] = _Owner(shown, sum(p.numel() for p in own))
    return owners


class _Recorder(TorchDispatchMode):
    """Notes each op, with torch's FLOP formula where there is one."""

    def __init__(self, owners: dict[int, _Owner]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._owners = owners
        self._formulas = FlopCounterMode(display=False).flop_registry

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if results:
            formula = self._formulas.get(func._overloadpacket)
            flops = None if formula is None else formula(*args, **kwargs, out_val=out)
            op = str(func._overloadpacket)
            owners = (self._owner(f) for f in _factors(func, args))
            name, params = next((o for o in owners if o), _Owner(op, 0))
            self.calls.append(Call(name, op, func, args, kwargs, results[0], flops, params))
        return out

    def _owner(self, factor: Any) -> _Owner | None:
        """Return the owner of a parameter or of a view of one, as linear's transposed weight is."""
        whole = getattr(factor, "_base", None)
        return self._owners.get(id(factor if whole is None else whole))


def _factors(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # Of addmm's and baddbmm's arguments the first is the bias.
    start = 1 if func._schema.name in ("aten::addmm", "aten::baddbmm") else 0
    return args[start : start + 2]


class PaperRow(NamedTuple):
    """One model of the paper: what it reports beside what is counted at 224x224."""

    model: str
    #: Where a bottleneck's stride sits; None for the models without bottlenecks.
    stride_in: str | None
    #: Counted multiply-adds, 10^9.
    gmacs: float
    #: The paper's figure, 10^9 (table 1, figure 3, section 4.1).
    paper_gmacs: float
    #: Parameters, 10^6.
    mparams: float
    #: Counted multiply-adds over those of VGG-19.
    ratio_to_vgg19: float


#: Multiply-adds in 10^9 as He et al. (arXiv 1512.03385) give them.
_PAPER_GMACS = {
    "plain34": 3.6,
    "resnet18": 1.8,
    "resnet34": 3.6,
    "resnet50": 3.8,
    "resnet101": 7.6,
    "resnet152": 11.3,
    "vgg16": 15.3,
    "vgg19": 19.6,
}
_BOTTLENECKS = ("resnet50", "resnet101", "resnet152")


def paper_table() -> list[PaperRow]:
    """Count the models whose cost the paper reports, those with bottlenecks for both strides.

    He et al. (arXiv 1512.03385), table 1, figure 3, section 4.1; section 3.3 puts plain-34 at 18 %
    of VGG-19.
    """
    cases: list[tuple[str, str | None]] = []
    for name in _PAPER_GMACS:
        cases += [(name, "1x1"), (name, "3x3")] if name in _BOTTLENECKS else [(name, None)]
    reports = {case: _count_by_name(*case) for case in cases}
    vgg19 = reports["vgg19", None].macs
    return [
        PaperRow(
            model=name,
            stride_in=stride_in,
            gmacs=report.macs / 1e9,
            paper_gmacs=_PAPER_GMACS[name],
            mparams=report.params / 1e6,
            ratio_to_vgg19=report.macs / vgg19,
        )
        for (name, stride_in), report in reports.items()
    ]


def format_paper_table() -> str:
    """Return :func:`paper_table` as text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "stride in", box=box.SIMPLE)
    for title in ("GMACs", "paper", "params, M", "of VGG-19"):
        table.add_column(title, justify="right")
    for row in paper_table():
        figures = (f"{row.gmacs:.3f}", f"{row.paper_gmacs:.1f}", f"{row.mparams:.2f}")
        table.add_row(row.model, row.stride_in or "", *figures, f"{row.ratio_to_vgg19:.1%}")
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().strip("\n").split("\n"))


def _count_by_name(name: str, stride_in: str | None) -> FlopReport:
    from resnet_fused.models import create_model

    with torch.device("meta"):
        model = create_model(name, stride_in=stride_in or "3x3")
    return count(model)
