"""Tracing one module's forward with torch.fx: blocks stay calls, straight chains are inlined.

A module is inlined into its parent only if it is a straight chain of childless modules (a
``Sequential(conv, bn)``, a ConvLayer class), so that a convolution inside it can be matched with an
add outside it. Everything else stays one call, with its hooks and wrappers intact.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn


class Trace:
    """The graph of one module's forward, and what the graph depends on."""

    def __init__(
        self, graph: fx.Graph, inputs: int, inlined: tuple[str, ...], eval_only: bool
    ) -> None:
        self.graph = graph
        #: How many positional arguments the graph takes: those without a default.
        self.inputs = inputs
        #: Names of the submodules whose forward was inlined.
        self.inlined = inlined
        #: Whether the graph in training mode is another one.
        self.eval_only = eval_only


class TraceError(Exception):
    """The forward cannot be turned into a graph; the message says why."""


#: Whether each module is a straight chain; one per walk over a model, as every trace asks.
Chains = dict[nn.Module, bool]


class _Tracer(fx.Tracer):
    def __init__(self, required: list[str], chains: Chains) -> None:
        super().__init__()
        self._required = required
        self._chains = chains
        self.inlined: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m not in self._chains:
            self._chains[m] = _is_chain(m, self._chains)
        if not self._chains[m]:
            return True
        self.inlined.append(module_qualified_name)
        return False

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Make placeholders for the required arguments only; the others keep their defaults."""
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self._required]
        return root_fn, [self.root, *proxies]


def trace(module: nn.Module, chains: Chains) -> Trace:
    """Trace ``module``'s forward in eval mode, and compare with the graph in training mode.

    Args:
        module: the module; its children's forwards are not entered unless they are chains.
        chains: what is known so far about the model's modules; filled on the way.

    Raises:
        TraceError: the forward has control flow on values, keeps state on the module, or takes
            arguments that no graph can stand for.
    """
    required = _required_arguments(module)
    before = dict(module.__dict__)
    try:
        with _training(module, False):
            tracer = _Tracer(required, chains)
            graph = tracer.trace(module)
        with _training(module, True):
            eval_only = _text(_Tracer(required, chains).trace(module)) != _text(graph)
    except Exception as error:
        # A forward is anybody's code: whatever it raises on symbolic values, it is not traceable.
        raise TraceError(str(error).strip().split("\n")[0] or type(error).__name__) from error
    finally:
        changed = {k for k, v in module.__dict__.items() if before.get(k, _MISSING) is not v}
        module.__dict__.clear()
        module.__dict__.update(before)
    if changed:
        raise TraceError(f"forward writes attributes of the module: {', '.join(sorted(changed))}")
    return Trace(graph, len(required), tuple(dict.fromkeys(tracer.inlined)), eval_only)


_MISSING = object()


def _is_chain(module: nn.Module, chains: Chains) -> bool:
    """Return whether ``module`` passes one value through childless modules, one after another."""
    children = list(module.modules())[1:]
    if not any(isinstance(child, nn.Conv2d) for child in children) or has_hooks(module):
        return False
    try:
        graph = trace(module, chains).graph
    except TraceError:
        return False
    previous: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if previous is not None:
                return False
        elif node.op == "output":
            return node.args[0] is previous
        elif node.op != "call_module" or node.args != (previous,) or node.kwargs:
            return False
        elif next(module.get_submodule(node.target).children(), None) is not None:
            return False
        previous = node
    return False


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling ``module`` runs more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _required_arguments(module: nn.Module) -> list[str]:
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError("a TorchScript module has no Python forward")
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty]
    if not required or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in required):
        raise TraceError("forward does not take a fixed list of positional arguments")
    return [p.name for p in required]


@contextmanager
def _training(module: nn.Module, mode: bool) -> Iterator[None]:
    """Set the training flags directly: a model may override ``train`` to keep parts frozen."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in flags:
            m.training = mode
        yield
    finally:
        for m, flag in flags:
            m.training = flag


def _text(graph: fx.Graph) -> list[str]:
    return [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.nodes]
