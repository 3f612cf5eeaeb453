"""One forward pass of a model as a straight list of operator calls on known shapes."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from resnet_fused.nn.bn import scale_shift, uses_batch_statistics
from resnet_fused.nn.fused import program_of
from resnet_fused.nn.watch import random_outside_torch, same_state

_DROPOUTS = (torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default)

#: What a result may consist of: in anything else tensors could hide. Sizes are tuples of integers.
_LEAVES = (Tensor, type(None), bool, int, float, str, torch.dtype, torch.device)


#: How values leave tensors unseen by the trace, and what that is called.
_LEAVING = {
    Tensor.data.__get__: ".data",  # type: ignore[attr-defined]
    Tensor.numpy: ".numpy()",
    Tensor.tolist: ".tolist()",
    Tensor.__array__: "NumPy",
    Tensor.__dlpack__: "DLPack",
}


@dataclass(frozen=True)
class Call:
    """``values[out] = target(*args, **kwargs)``; a :class:`Ref` in args stands for a value."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: int


@dataclass(frozen=True)
class Ref:
    """Stands for the value of an earlier call (0 is the model's input)."""

    index: int


def refs(call: Call) -> Iterator[Ref]:
    """Yield the values a call reads."""
    leaves = pytree.tree_leaves((call.args, call.kwargs), is_leaf=lambda v: isinstance(v, Ref))
    return (leaf for leaf in leaves if isinstance(leaf, Ref))


def fill(value: Any, values: list[Any]) -> Any:
    """Return ``value`` with each Ref in it, also inside sequences, replaced by its value."""
    if isinstance(value, Ref):
        return values[value.index]
    if isinstance(value, tuple | list):
        return type(value)(fill(v, values) for v in value)
    if isinstance(value, dict):
        return {k: fill(v, values) for k, v in value.items()}
    return value


@dataclass(frozen=True)
class Captured:
    """The calls of one forward pass."""

    calls: tuple[Call, ...]
    #: One entry per leaf of the model's result: a Ref, or what it is every time.
    outputs: tuple[Any, ...]
    spec: pytree.TreeSpec
    #: What each value is like, the input's first: a tensor of its shape and device without data.
    examples: tuple[Any, ...]

    @property
    def size(self) -> int:
        """How many values there are, the input included."""
        return len(self.examples)


def capture(model: nn.Module, x: Tensor) -> Captured:
    """Record what ``model`` runs on an input of x's shape; parameters become constants.

    What it holds fixed was so for x's values: ``constancy`` says whether it is for others.

    Raises:
        TypeError: the result has something in it that is neither a tensor nor a plain constant.
        ValueError: the forward branches on values of tensors, changes the model's own, or draws
            random numbers of Python or NumPy.
    """
    results: list[tuple[list[Any], pytree.TreeSpec]] = []

    def forward(x: Tensor) -> list[Tensor]:
        with _Inside():
            results.append(pytree.tree_flatten(model(x)))
        return [leaf for leaf in results[-1][0] if isinstance(leaf, Tensor)]

    _prepare(model)
    before, sources = _state(model), [*random_outside_torch()]
    drawn = [source.get() for source in sources]
    try:
        module = make_fx(forward, pre_dispatch=True)(x)
    except RuntimeError as error:
        if "tracing tensor" in str(error):
            raise ValueError(
                "freeze: the model's forward branches on the values of a tensor, which no "
                f"fixed plan can follow: {str(error).splitlines()[0]}"
            ) from error
        raise
    _check_unchanged(model, before)
    if not all(same_state(s.get(), then) for s, then in zip(sources, drawn, strict=True)):
        raise ValueError("freeze: the model's forward draws random numbers of Python or NumPy, "
                         "which an engine would repeat: accepted are torch's")  # fmt: skip
    leaves, spec = results[-1]
    _check_leaves(leaves)
    calls, tensors, examples = _Recorder(module).record()
    found = iter(tensors)
    outputs = tuple(next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return Captured(calls, outputs, spec, examples)


class _Inside(TorchFunctionMode):
    """Refuses to give values of traced tensors away: what comes back of them is a constant."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _LEAVING and _depends_on_input(args[0]):
            raise ValueError(
                f"freeze: the model's forward takes values out of the trace by {_LEAVING[func]}, "
                "which an engine would repeat for every input: it must stay in torch's operators"
            )
        return func(*args, **(kwargs or {}))


def _depends_on_input(tensor: Tensor) -> bool:
    mode = get_proxy_mode()
    proxy = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    if proxy is None:
        return False
    waiting, seen = [proxy.proxy.node], set()
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return True
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return False


def _prepare(model: nn.Module) -> None:
    """Compute what fused calls derive from parameters, so that it is not recorded."""
    for module in model.modules():
        program = program_of(module)
        if program is None:
            continue
        for call in program.fused:
            names = [program.children[place].name for place in (call.conv, call.bn)]
            conv, bn = map(module.get_submodule, names)
            if isinstance(conv, nn.Conv2d) and not uses_batch_statistics(bn):
                scale_shift(conv, bn)


def _check_unchanged(model: nn.Module, before: _State) -> None:
    after = _state(model)
    changed = {name for (name, _), stamp in before.items() - after.items() if stamp.registered}
    changed |= {n for (n, _), stamp in after.items() - before.items() if stamp.registered}
    changed |= {key[0] for key in before.keys() & after.keys() if before[key] != after[key]}
    if changed:
        raise ValueError(f"freeze: the model's forward changes its own "
                         f"{', '.join(sorted(changed))}: an engine holds constants")  # fmt: skip


def _check_leaves(leaves: list[Any]) -> None:
    kinds = {type(leaf) for leaf in leaves if not isinstance(leaf, _LEAVES)}
    if kinds:
        names = ", ".join(sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds))
        raise TypeError(
            f"freeze: the model returns {names}, which an engine cannot fill anew for each input: "
            "accepted are tensors, None, bool, int, float, str, torch.Size, torch.dtype and "
            "torch.device, in tuples, lists, dicts and what torch.utils._pytree knows besides"
        )


class _Stamp(NamedTuple):
    version: int
    #: Whether it is a parameter or buffer; another attribute may become another tensor.
    registered: bool


#: By name and tensor.
_State = dict[tuple[str, int], _Stamp]


def _state(model: nn.Module) -> _State:
    state = {}
    for prefix, module in model.named_modules():
        for registered, named in (
            (False, vars(module)), (True, module._parameters), (True, module._buffers)
        ):  # fmt: skip
            for name, tensor in named.items():
                # Tensors made in inference mode count no versions.
                if isinstance(tensor, Tensor) and not tensor.is_inference():
                    where = f"{prefix}.{name}" if prefix else name
                    state[where, id(tensor)] = _Stamp(tensor._version, registered)
    return state


class _Recorder:
    """Writes a traced graph as calls; what depends on constants only is computed now."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._refs: dict[fx.Node, Any] = {}
        self._calls: list[Call] = []
        self._examples: list[Any] = []
        nodes = module.graph.nodes
        self._unfolded = _rewritten(module.graph)
        # Under autocast an operator does not do now what it did then.
        self._folds = not any(n.target is torch.amp.autocast_mode._enter_autocast for n in nodes)

    def record(self) -> tuple[tuple[Call, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Return the calls, the model's tensors, and what each value is like."""
        tensors: tuple[Any, ...] = ()
        for node in self._module.graph.nodes:
            if node.op == "output":
                tensors = tuple(self._operands(node.args[0]))
            elif node.op == "get_attr":
                self._refs[node] = operator.attrgetter(str(node.target))(self._module)
            elif node.op == "placeholder":
                self._refs[node] = self._new(node)
            elif node.target is not torch._C._set_grad_enabled:
                self._refs[node] = self._call(node)
        return tuple(self._calls), tensors, tuple(self._examples)

    def _operands(self, args: Any) -> Any:
        return fx.node.map_arg(args, lambda node: self._refs[node])

    def _new(self, node: fx.Node) -> Ref:
        self._examples.append(node.meta.get("val"))
        return Ref(len(self._examples) - 1)

    def _call(self, node: fx.Node) -> Any:
        args, kwargs = self._operands(node.args), self._operands(dict(node.kwargs))
        if node.target in _DROPOUTS and args[2] is False:
            return args[0]
        inputs = [self._refs[n] for n in node.all_input_nodes]
        constant = inputs and not any(isinstance(i, Ref) for i in inputs)
        if constant and self._folds and node not in self._unfolded and not _draws(node):
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if _shape_depends_on_values(node):
            raise ValueError(
                "freeze: the model's forward has a shape that depends on values "
                f"(by {node.target}), which no fixed plan can follow"
            )
        ref = self._new(node)
        self._calls.append(Call(node.target, args, kwargs, ref.index))
        return ref


def _rewritten(graph: fx.Graph) -> set[fx.Node]:
    """Return the constants that are written in place, and what they are made from.

    Each run needs them new, so they cannot be computed once.
    """
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        made = node.op == "call_function" and bool(node.all_input_nodes)
        if node.op == "get_attr" or (made and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        found.update(constant.intersection(_written(node)))
        if node in found:
            found.update(node.all_input_nodes)
    return found


def _written(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that the node's operator writes."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    names = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return [given[n] for n in names if isinstance(given.get(n), fx.Node)]


def _draws(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _shape_depends_on_values(node: fx.Node) -> bool:
    if node.target is torch.ops.aten.index.Tensor:
        # With integers the result is as large as the index.
        return any(
            n.meta["val"].dtype in (torch.bool, torch.uint8) for n in node.all_input_nodes[1:]
        )
    return torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())
