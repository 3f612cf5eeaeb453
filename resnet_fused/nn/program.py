"""A module's forward as a list of steps, some of them fused calls."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C import _functorch
from torch.autograd import forward_ad

from resnet_fused.backends._sizes import output_shape
from resnet_fused.nn import block, flags, train
from resnet_fused.nn.bn import is_batch_norm, is_sharded, scale_shift, uses_batch_statistics
from resnet_fused.nn.child import Child, child_of
from resnet_fused.nn.flags import Flag
from resnet_fused.nn.match import Group, Matches
from resnet_fused.nn.trace import Trace, has_hooks
from resnet_fused.nn.train import Pending, geometry_of, result_dtype
from resnet_fused.ops import _direct


@dataclass(frozen=True)
class Slot:
    """Stands in a step's arguments for the result of an earlier step."""

    index: int


@dataclass(frozen=True)
class Step:
    """One call of the forward: ``results[out] = ...``."""

    #: "module", "function", "method", "attribute", "fused" or "output".
    kind: str
    #: What is called: a module's place in :attr:`Program.children`, a function, a name, a group.
    target: Any
    args: Any
    kwargs: dict[str, Any]
    out: int
    #: Results that no later step reads.
    frees: tuple[int, ...]


@dataclass(frozen=True)
class FusedCall:
    """conv → bn → [add] → [relu]; the modules by their places in :attr:`Program.children`."""

    name: str
    conv: int
    bn: int
    pattern: str
    #: Whether a residual is added before the ReLU.
    adds: bool
    act: str | None
    #: Whether what reads the result can take it pending, in training.
    defers: bool
    #: Whether a block's output is kept for backward, "default", or computed again, "low".
    memory: str
    #: Runs the same nodes one by one, where the fused call does not apply.
    unfused: tuple[Step, ...]


@dataclass(frozen=True)
class Program:
    """What a fused module runs instead of its class's forward."""

    inputs: int
    steps: tuple[Step, ...]
    slots: int
    #: The module itself, then each submodule that the steps call or stand for.
    children: tuple[Child, ...]
    #: Whether training mode takes another way through the forward.
    eval_only: bool
    #: Convolutions in reach that were left alone, with the reason.
    skipped: tuple[tuple[str, str], ...]
    #: Whether the steps are those of a block, and of which kind: see :mod:`block`.
    is_block: bool
    has_identity: bool
    #: What the traced forwards read beside their modules.
    flags: tuple[Flag, ...]

    @property
    def fused(self) -> list[FusedCall]:
        """The fused calls in order."""
        return [step.target for step in self.steps if step.kind == "fused"]

    def bind(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[nn.Module] | None:
        """Return the modules that the steps call, or None if this call is the class's forward's.

        It is where it may not run the steps, and where they would call nothing but torch's layers:
        in training where nothing of ours is faster, where running them one by one takes longer.
        It may with the usual arguments, no hook passed by, and no change to the module since:
        children exchanged or removed, a flag set that the forward was traced with, on it or among
        the globals. Under
        ``torch.func`` and in forward mode it may not: ops registered from Python have no gradients
        there.
        """
        if not torch.compiler.is_compiling() and _differentiates_otherwise():
            return None
        # ONNX has no ops of ours; and whoever traces through wants what the class's forward calls.
        if torch.onnx.is_in_onnx_export():
            return None
        if kwargs or len(args) != self.inputs or (self.eval_only and module.training):
            return None
        for a in args:
            if a is None or isinstance(a, fx.Proxy):
                return None
        if self._is_torchs(module):
            return None
        for flag in self.flags:
            if not flag.holds():
                return None
        bound = []
        for child in self.children:
            found = child.of(module)
            if found is None or not child.holds(found):
                return None
            bound.append(found)
        return bound

    def _is_torchs(self, module: nn.Module) -> bool:
        """Return whether no fused call would be fused, whatever its size."""
        calls = (step.target for step in self.steps if step.kind == "fused")
        pairs = ((self.children[c.conv].of(module), self.children[c.bn].of(module)) for c in calls)
        return all(train.is_torchs(conv, bn) for conv, bn in pairs)

    def run(self, bound: list[nn.Module], args: tuple[Any, ...]) -> Any:
        """Run the steps on positional arguments, with the modules that :meth:`bind` gave."""
        if self.is_block:
            identity = self.has_identity
            y = block.run(self.steps, bound, self.slots, *args, identity_shortcut=identity)
            if y is not None:
                return y
        results: list[Any] = [*args, *[None] * (self.slots - len(args))]
        for step in self.steps:
            if step.kind == "output":
                return _fill(step.args, results)
            results[step.out] = _run(bound, step, results)
            for index in step.frees:
                results[index] = None
        raise AssertionError("a traced forward ends with an output")

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        """Return itself: nothing in it changes or belongs to one module."""
        return self


def _differentiates_otherwise() -> bool:
    """Return whether somebody differentiates by other means than a backward."""
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def build(module: nn.Module, trace: Trace, matches: Matches, memory: str) -> Program:
    """Write the steps of ``module``'s traced forward, each group as one fused call."""
    return _Builder(module, trace, matches, memory).build()


class _Builder:
    def __init__(self, module: nn.Module, trace: Trace, matches: Matches, memory: str) -> None:
        self.module, self.trace, self.matches, self.memory = module, trace, matches, memory
        self.index = {node: i for i, node in enumerate(trace.graph.nodes)}
        self.ends = {group.nodes[-1]: group for group in matches.groups}
        self.grouped = {n for group in matches.groups for n in group.nodes}
        names = [str(n.target) for n in trace.graph.nodes if n.op == "call_module"]
        # Between the module and what it calls: lists that its forward went through.
        self.iterated = {outer for name in names for outer in _outer(name)} - {*trace.inlined}
        # An inlined module goes before what it contains, as a call replaces it whole.
        names = ["", *trace.inlined, *matches.erased, *names, *sorted(self.iterated)]
        self.places = {name: i for i, name in enumerate(dict.fromkeys(names))}

    def build(self) -> Program:
        nodes = [
            n for n in self.trace.graph.nodes
            if n.op != "placeholder" and (n not in self.grouped or n in self.ends)
        ]  # fmt: skip
        last_reader = {read: node for node in nodes for read in self._reads(node)}
        steps = []
        for node in nodes:
            frees = tuple(i for n, i in self.index.items() if last_reader.get(n) is node)
            steps.append(self._step(node, frees))
        return Program(
            inputs=self.trace.inputs,
            steps=tuple(steps),
            slots=len(self.index),
            children=tuple(self._child(name) for name in self.places),
            eval_only=self.trace.eval_only,
            skipped=tuple(self.matches.skipped.items()),
            is_block=(is_block := self.trace.inputs == 1 and block.is_block(steps)),
            has_identity=is_block and block.has_identity(steps),
            flags=self._flags(),
        )

    def _flags(self) -> tuple[Flag, ...]:
        modules = (self.module.get_submodule(name) for name in ("", *self.trace.inlined))
        return tuple(dict.fromkeys(flag for m in modules for flag in flags.read_by(m)))

    def _child(self, name: str) -> Child:
        module = self.module.get_submodule(name)
        traced = not name or name in self.trace.inlined
        grouped = any(n.op == "call_module" and n.target == name for n in self.grouped)
        bypassed = bool(name) and (traced or grouped or name in self.matches.erased)
        # Convolution and BatchNorm are looked at by the fused call; SyncBatchNorm may come later.
        fixed = bypassed and not (isinstance(module, nn.Conv2d) or is_batch_norm(module))
        iterated = name in self.iterated
        return child_of(
            module, name, bypassed=bypassed, fixed=fixed, traced=traced, iterated=iterated
        )

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        group = self.ends.get(node)
        return node.all_input_nodes if group is None else group.inputs

    def _step(self, node: fx.Node, frees: tuple[int, ...]) -> Step:
        group = self.ends.get(node)
        if group is None:
            return self._plain_step(node, frees)
        inputs = tuple(Slot(self.index[n]) for n in self._reads(node))
        return Step("fused", self._fused(group), inputs, {}, self.index[node], frees)

    def _plain_step(self, node: fx.Node, frees: tuple[int, ...] = ()) -> Step:
        args: Any = _slots(node.args, self.index)
        target: Any = node.target
        if node.op == "call_module":
            target = self.places[str(node.target)]
        elif node.op == "output":
            args = args[0]
        kwargs = _slots(dict(node.kwargs), self.index)
        return Step(_KINDS[node.op], target, args, kwargs, self.index[node], frees)

    def _fused(self, group: Group) -> FusedCall:
        return FusedCall(
            name=str(group.conv.target),
            conv=self.places[str(group.conv.target)],
            bn=self.places[str(group.bn.target)],
            pattern=group.pattern,
            adds=group.add is not None,
            act="relu" if group.relu is not None else None,
            defers=self._defers(group),
            memory=self.memory,
            unfused=tuple(self._plain_step(n) for n in group.nodes),
        )

    def _defers(self, group: Group) -> bool:
        """Return whether the one reader is a convolution, a max pool, or a block's end."""
        readers = list(group.nodes[-1].users)
        if group.add is not None or len(readers) != 1:
            return False
        reader = readers[0]
        if reader.op == "call_module" and reader not in self.grouped:
            return type(self.module.get_submodule(str(reader.target))) is nn.MaxPool2d
        return any(
            reader is other.conv or (reader is other.add and group.relu is None)
            for other in self.matches.groups
        )


def _outer(name: str) -> list[str]:
    """Return the names of the modules around one, from the outermost on."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


_KINDS = {
    "call_module": "module",
    "call_function": "function",
    "call_method": "method",
    "get_attr": "attribute",
    "output": "output",
}


def _slots(value: Any, index: dict[fx.Node, int]) -> Any:
    """Return ``value`` with each node in it, also inside sequences, replaced by its slot."""
    if isinstance(value, fx.Node):
        return Slot(index[value])
    return _map(value, lambda v: _slots(v, index))


def _fill(value: Any, results: list[Any]) -> Any:
    """Return ``value`` with each slot in it, also inside sequences, replaced by its result."""
    if isinstance(value, Slot):
        return results[value.index]
    return _map(value, lambda v: _fill(v, results))


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to the members of a sequence, dict or slice (fx has its own classes)."""
    if isinstance(value, tuple):
        members = [function(v) for v in value]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    if isinstance(value, list):
        return [function(v) for v in value]
    if isinstance(value, dict):
        return {k: function(v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(function(value.start), function(value.stop), function(value.step))
    return value


def _run(bound: list[nn.Module], step: Step, results: list[Any]) -> Any:
    if step.kind == "fused":
        return _run_fused(bound, step, results)
    args = [_fill(a, results) for a in step.args]
    kwargs = {k: _fill(v, results) for k, v in step.kwargs.items()}
    if step.kind == "module":
        module = bound[step.target]
        if len(args) == 1 and not kwargs and not has_hooks(module):
            return train.pool(module, args[0])
        if args and isinstance(args[0], Pending):
            args[0] = train.value(args[0])
        return module(*args, **kwargs)
    if step.kind == "function":
        return step.target(*args, **kwargs)
    if step.kind == "method":
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    return operator.attrgetter(step.target)(bound[0])


def _run_fused(bound: list[nn.Module], step: Step, results: list[Any]) -> Any:
    call: FusedCall = step.target
    conv, bn = bound[call.conv], bound[call.bn]
    place = step.args[0].index
    x = results[place]
    residual = results[step.args[1].index] if call.adds else None
    read_again = place not in step.frees
    ran = train.run(conv, bn, x, residual, call.act, call.memory, read_again=read_again)
    if ran is not None:
        results[place] = ran.x
        return ran.result if call.defers else train.value(ran.result)
    x, residual = train.value(x), None if residual is None else train.value(residual)
    if not _fits(conv, bn, x, residual):
        results = list(results)
        for slot, tensor in zip(step.args, (x, residual), strict=False):
            results[slot.index] = tensor
        for plain in call.unfused:
            results[plain.out] = _run(bound, plain, results)
        return results[call.unfused[-1].out]
    assert isinstance(conv, nn.Conv2d)
    scale, shift = scale_shift(conv, bn)
    # Nothing is kept of a weight that is another tensor in every call.
    weight = conv.weight.view_as(conv.weight) if is_sharded(conv) else conv.weight
    operands = (x, weight, scale, shift, residual)
    y: Tensor = _direct.record("conv_bn_act", *operands, *geometry_of(conv), call.act)
    return y


def _fits(conv: nn.Module, bn: nn.Module, x: Any, residual: Any) -> bool:
    """Return whether the fused call computes what the modules would, for this call.

    The modules may have been exchanged since; BatchNorm may want the batch's statistics; an add
    may broadcast or promote. All of that is left to torch.
    """
    if type(conv) is not nn.Conv2d or not is_batch_norm(bn) or uses_batch_statistics(bn):
        return False
    if conv.padding_mode != "zeros" or conv.padding == "same" or x.dim() != 4:
        return False
    if residual is None:
        return True
    if not isinstance(residual, Tensor) or residual.dtype != result_dtype(x):
        return False
    shape = output_shape(x.shape, conv.weight.shape, *geometry_of(conv)[:3])
    return tuple(residual.shape) == shape
