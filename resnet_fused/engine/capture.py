"""One forward pass of a model as a straight list of operator calls on known shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree


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
    #: One entry per leaf of the model's result: a Ref, or a constant.
    outputs: tuple[Any, ...]
    spec: pytree.TreeSpec
    #: How many values there are, the input included.
    size: int


def capture(model: nn.Module, x: Tensor) -> Captured:
    """Record what ``model`` runs on an input of x's shape; parameters become constants.

    Raises:
        ValueError: the forward branches on values of tensors, or writes into a constant.
    """
    spec: list[pytree.TreeSpec] = []

    def forward(x: Tensor) -> list[Any]:
        leaves, tree = pytree.tree_flatten(model(x))
        spec.append(tree)
        return leaves

    with torch.no_grad():
        # Once as it is: what is derived from parameters is then ready and is not recorded.
        model(x)
        try:
            module = make_fx(forward, pre_dispatch=True)(x)
        except RuntimeError as error:
            if "tracing tensor" in str(error):
                raise ValueError(
                    "freeze: the model's forward branches on the values of a tensor, which no "
                    f"fixed plan can follow: {str(error).splitlines()[0]}"
                ) from error
            raise
    return _to_calls(module, spec[-1])


def _to_calls(module: fx.GraphModule, spec: pytree.TreeSpec) -> Captured:
    refs: dict[fx.Node, Any] = {}
    calls: list[Call] = []
    size = 0
    outputs: tuple[Any, ...] = ()
    for node in module.graph.nodes:
        if node.op == "output":
            outputs = tuple(fx.node.map_arg(node.args[0], lambda n: refs[n]))
        elif node.op == "get_attr":
            refs[node] = getattr(module, str(node.target))
        elif node.op == "placeholder":
            refs[node], size = Ref(size), size + 1
        elif node.target is torch._C._set_grad_enabled:
            continue
        else:
            refs[node], size = _record(node, refs, calls, size)
    return Captured(tuple(calls), outputs, spec, size)


def _record(
    node: fx.Node, refs: dict[fx.Node, Any], calls: list[Call], size: int
) -> tuple[Any, int]:
    """Append the node's call, or run it now if it reads constants only."""
    args = fx.node.map_arg(node.args, lambda n: refs[n])
    kwargs = fx.node.map_arg(dict(node.kwargs), lambda n: refs[n])
    inputs = [refs[n] for n in node.all_input_nodes]
    if inputs and not any(isinstance(i, Ref) for i in inputs):
        with torch.no_grad():
            return node.target(*args, **kwargs), size  # type: ignore[operator]
    calls.append(Call(node.target, args, kwargs, size))
    return Ref(size), size + 1
