"""A module's forward as a list of steps, some of them fused calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from resnet_fused import functional
from resnet_fused.nn.bn import is_batch_norm, scale_shift, uses_batch_statistics
from resnet_fused.nn.match import Group, Matches
from resnet_fused.nn.trace import Trace, has_hooks
from resnet_fused.ops.conv_bn_act import output_shape


@dataclass(frozen=True)
class Slot:
    """Stands in a step's arguments for the result of an earlier step."""

    index: int


@dataclass(frozen=True)
class Step:
    """One call of the forward: ``results[out] = ...``."""

    #: "module", "function", "method", "attribute", "fused" or "output".
    kind: str
    target: Any
    args: Any
    kwargs: dict[str, Any]
    out: int
    #: Results that no later step reads.
    frees: tuple[int, ...]


@dataclass(frozen=True)
class FusedCall:
    """conv → bn → [add] → [relu], by the names of the modules, resolved when it runs."""

    conv: str
    bn: str
    pattern: str
    #: Whether a residual is added before the ReLU.
    adds: bool
    act: str | None
    #: Runs the same nodes one by one, where the fused call does not apply.
    unfused: tuple[Step, ...]


@dataclass(frozen=True)
class Program:
    """What a fused module runs instead of its class's forward."""

    inputs: int
    steps: tuple[Step, ...]
    slots: int
    #: Modules that no step calls any more; a hook on one of them sends the call the old way.
    bypassed: tuple[str, ...]
    #: Whether training mode takes another way through the forward.
    eval_only: bool
    #: Convolutions in reach that were left alone, with the reason.
    skipped: tuple[tuple[str, str], ...]

    @property
    def fused(self) -> list[FusedCall]:
        """The fused calls in order."""
        return [step.target for step in self.steps if step.kind == "fused"]

    def applies(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether this call may run the steps: the usual arguments, no hook passed by."""
        if kwargs or len(args) != self.inputs or (self.eval_only and module.training):
            return False
        return not any(has_hooks(_submodule(module, name)) for name in self.bypassed)

    def run(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Run the steps on positional arguments."""
        results: list[Any] = [*args, *[None] * (self.slots - len(args))]
        for step in self.steps:
            if step.kind == "output":
                return _fill(step.args, results)
            results[step.out] = _run(module, step, results)
            for index in step.frees:
                results[index] = None
        raise AssertionError("a traced forward ends with an output")


def build(trace: Trace, matches: Matches) -> Program:
    """Write the steps of a traced forward, each group of ``matches`` as one fused call."""
    index = {node: i for i, node in enumerate(trace.graph.nodes)}
    ends = {group.nodes[-1]: group for group in matches.groups}
    inside = {n for group in matches.groups for n in group.nodes if n not in ends}
    nodes = [n for n in trace.graph.nodes if n.op != "placeholder" and n not in inside]
    reads = {node: _reads(node, ends.get(node)) for node in nodes}
    last_reader = {read: node for node in nodes for read in reads[node]}
    steps = []
    for node in nodes:
        frees = tuple(sorted(index[n] for n, reader in last_reader.items() if reader is node))
        steps.append(_step(node, ends.get(node), index, frees))
    names = [str(n.target) for n in inside | set(ends) if n.op == "call_module"]
    bypassed = dict.fromkeys([*names, *matches.erased, *trace.inlined])
    return Program(
        inputs=trace.inputs,
        steps=tuple(steps),
        slots=len(index),
        bypassed=tuple(bypassed),
        eval_only=trace.eval_only,
        skipped=tuple(matches.skipped.items()),
    )


def _reads(node: fx.Node, group: Group | None) -> list[fx.Node]:
    if group is None:
        return node.all_input_nodes
    return [n for n in (group.conv.args[0], group.residual) if isinstance(n, fx.Node)]


_KINDS = {
    "call_module": "module",
    "call_function": "function",
    "call_method": "method",
    "get_attr": "attribute",
    "output": "output",
}


def _step(
    node: fx.Node, group: Group | None, index: dict[fx.Node, int], frees: tuple[int, ...]
) -> Step:
    if group is None:
        args = fx.node.map_arg(node.args, lambda n: Slot(index[n]))
        kwargs = fx.node.map_arg(dict(node.kwargs), lambda n: Slot(index[n]))
        if node.op == "output":
            args = args[0]
        return Step(_KINDS[node.op], node.target, args, dict(kwargs), index[node], frees)
    call = FusedCall(
        conv=str(group.conv.target),
        bn=str(group.bn.target),
        pattern=group.pattern,
        adds=group.add is not None,
        act="relu" if group.relu is not None else None,
        unfused=tuple(_step(n, None, index, ()) for n in group.nodes),
    )
    inputs = tuple(Slot(index[n]) for n in _reads(node, group))
    return Step("fused", call, inputs, {}, index[node], frees)


def _run(module: nn.Module, step: Step, results: list[Any]) -> Any:
    if step.kind == "fused":
        return _run_fused(module, step, results)
    args, kwargs = _fill(step.args, results), _fill(step.kwargs, results)
    if step.kind == "module":
        return _submodule(module, step.target)(*args, **kwargs)
    if step.kind == "function":
        return step.target(*args, **kwargs)
    if step.kind == "method":
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    return _attribute(module, step.target)


def _run_fused(module: nn.Module, step: Step, results: list[Any]) -> Any:
    call: FusedCall = step.target
    conv, bn = _submodule(module, call.conv), _submodule(module, call.bn)
    x = results[step.args[0].index]
    residual = results[step.args[1].index] if call.adds else None
    if not _fits(conv, bn, x, residual):
        return _run_unfused(module, call, results)
    assert isinstance(conv, nn.Conv2d)
    scale, shift = scale_shift(conv, bn)
    return functional.conv_bn_act(
        x, conv.weight, scale, shift, residual,
        stride=conv.stride, padding=_padding(conv), dilation=conv.dilation, groups=conv.groups,
        act=call.act,
    )  # fmt: skip


def _fits(conv: nn.Module, bn: nn.Module, x: Tensor, residual: Tensor | None) -> bool:
    """Return whether the fused call computes what the modules would, for this call.

    The modules may have been exchanged since; BatchNorm may want the batch's statistics; an add
    may broadcast or promote. All of that is left to torch.
    """
    if type(conv) is not nn.Conv2d or not is_batch_norm(bn) or uses_batch_statistics(bn):
        return False
    if residual is None:
        return True
    shape = output_shape(x.shape, conv.weight.shape, conv.stride, _padding(conv), conv.dilation)
    return residual.dtype == x.dtype and tuple(residual.shape) == shape


def _padding(conv: nn.Conv2d) -> tuple[int, ...]:
    # Of the string paddings only "valid" is matched.
    return (0, 0) if isinstance(conv.padding, str) else conv.padding


def _run_unfused(module: nn.Module, call: FusedCall, results: list[Any]) -> Any:
    results = list(results)
    for step in call.unfused:
        results[step.out] = _run(module, step, results)
    return results[call.unfused[-1].out]


def _fill(value: Any, results: list[Any]) -> Any:
    """Return ``value`` with each slot in it, also inside sequences, replaced by its result."""
    if isinstance(value, Slot):
        return results[value.index]
    if isinstance(value, tuple | list):
        return type(value)(_fill(v, results) for v in value)
    if isinstance(value, dict):
        return {k: _fill(v, results) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(_fill(v, results) for v in (value.start, value.stop, value.step)))
    return value


def _submodule(module: nn.Module, name: str) -> nn.Module:
    """Return a submodule by its dotted name, faster than ``get_submodule``."""
    for part in name.split("."):
        module = module._modules[part]  # type: ignore[assignment]
    return module


def _attribute(module: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(_submodule(module, path) if path else module, last)
