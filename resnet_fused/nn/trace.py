"""Tracing one module's forward with torch.fx: blocks stay calls, straight chains are inlined.

A module is inlined into its parent only if it is a straight chain of childless modules (a
``Sequential(conv, bn)``, a ConvLayer class), so that a convolution inside it can be matched with an
add outside it. Everything else stays one call, with its hooks and wrappers intact.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import operator
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from resnet_fused.nn.names import names_of
from resnet_fused.nn.watch import Watch
from resnet_fused.ops._checks import AUTOCAST_DEVICES


class Trace(NamedTuple):
    """The graph of one module's forward, and what the graph depends on."""

    graph: fx.Graph
    #: How many positional arguments the graph takes: those without a default.
    inputs: int
    #: Names of the submodules whose forward was inlined.
    inlined: tuple[str, ...]
    #: Whether the graph in training mode is another one, or none.
    eval_only: bool


class TraceError(Exception):
    """The forward cannot be turned into a graph; the message says why."""


#: Whether a module (by its id) is a straight chain; one per walk over a model, as every trace asks.
Chains = dict[int, bool]


class _Proxy(fx.Proxy):
    """A symbol for a tensor, where fx's own would let a forward go wrong unseen."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Refuse ``isinstance``: a branch taken on a symbol's type is not the tensor's branch."""
        raise TraceError("forward asks for the type of a value")

    def __getattr__(self, name: str) -> Any:
        """Have what a tensor has; fx has every attribute, and so its default is never taken."""
        if not hasattr(Tensor, name):
            if self.node.op == "placeholder":
                raise AttributeError(f"'Tensor' object has no attribute {name!r}")
            raise TraceError(f"forward asks a value for {name!r}, which no tensor has")
        return super().__getattr__(name)


def _in_place(function: Any) -> Any:
    def method(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


# fx would take ``y += x`` for ``y = y + x``, although others may hold ``y``.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _Tracer(fx.Tracer):
    # A buffer read or written in the forward belongs into the graph, not into the tracing.
    proxy_buffer_attributes = True

    def __init__(self, required: list[str], chains: Chains) -> None:
        super().__init__()
        self._required = required
        self._chains = chains
        self._mode = _mode()
        #: Symbols that were made; with the graph all but those that somebody keeps are gone.
        self._made: list[weakref.ref[fx.Proxy]] = []
        self.inlined: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if id(m) not in self._chains:
            self._chains[id(m)] = _is_chain(m, self._chains)
        if not self._chains[id(m)]:
            return True
        self.inlined.append(module_qualified_name)
        return False

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Make placeholders for the required arguments only; the others keep their defaults."""
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self._required]
        return root_fn, [self.root, *proxies]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuse what a graph does not say: under which modes a part of the forward runs."""
        if _mode() != self._mode:
            raise TraceError("a part of forward runs in another grad mode or autocast")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        if node.op != "get_attr":  # of which fx keeps one
            self._made.append(weakref.ref(proxy))
        return proxy

    def keeps_values(self) -> bool:
        """Return whether the forward has put a symbol away where somebody may read it."""
        if any(made() is not None for made in self._made):
            gc.collect()  # it may be of a frame that has ended
        return any(made() is not None for made in self._made)

    def create_arg(self, a: Any) -> Any:
        # Before fx asks what it is an instance of.
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)


def trace(module: nn.Module, chains: Chains) -> Trace:
    """Trace ``module``'s forward in eval mode, and compare with the graph in other modes.

    Args:
        module: the module; its children's forwards are not entered unless they are chains.
        chains: what is known so far about the model's modules; filled on the way.

    Raises:
        TraceError: the forward has control flow on values, keeps state on the module, or takes
            arguments that no graph can stand for.
    """
    required = _required_arguments(module)
    graph, inlined = _graph(module, required, chains, training=False)
    text = _text(graph)
    with _other_modes():
        if _text(_graph(module, required, chains, training=False)[0]) != text:
            raise TraceError("forward depends on the grad mode or on autocast")
    try:
        eval_only = _text(_graph(module, required, chains, training=True)[0]) != text
    except TraceError:
        eval_only = True
    return Trace(graph, len(required), inlined, eval_only)


def _graph(
    module: nn.Module, required: list[str], chains: Chains, *, training: bool
) -> tuple[fx.Graph, tuple[str, ...]]:
    tracer = _Tracer(required, chains)
    with Watch(module) as watch:
        try:
            # The flags directly: a model may override ``train`` to keep parts of it frozen.
            for m in module.modules():
                m.training = training
            graph = tracer.trace(module)
        except Exception as error:
            # A forward is anybody's code: whatever it raises on symbols, it is not traceable.
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise TraceError(reason) from error
    if watch.changed:
        raise TraceError(f"forward changes {', '.join(watch.changed)}")
    if tracer.keeps_values():
        raise TraceError("forward keeps a value beside its result")
    return graph, tuple(dict.fromkeys(tracer.inlined))


def _mode() -> tuple[Any, ...]:
    """Return the modes that decide about what an op does, but are no argument of it."""
    autocast = [
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in AUTOCAST_DEVICES
    ]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


@contextlib.contextmanager
def _other_modes() -> Iterator[None]:
    """Turn autocast and the recording of gradients over, for a forward that asks for them."""
    before = [torch.is_autocast_enabled(device) for device in AUTOCAST_DEVICES]
    with torch.set_grad_enabled(not torch.is_grad_enabled()):
        try:
            for device, enabled in zip(AUTOCAST_DEVICES, before, strict=True):
                torch.set_autocast_enabled(device, not enabled)
            yield
        finally:
            for device, enabled in zip(AUTOCAST_DEVICES, before, strict=True):
                torch.set_autocast_enabled(device, enabled)


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
        elif not _is_link(module, node, previous):
            return False
        previous = node
    return False


def _is_link(module: nn.Module, node: fx.Node, previous: fx.Node | None) -> bool:
    if node.op != "call_module" or node.args != (previous,) or node.kwargs:
        return False
    # A child that is a chain itself has been inlined; one that has children still is none.
    return not has_children(module.get_submodule(str(node.target)))


def has_children(module: nn.Module) -> bool:
    """Return whether ``module`` contains others."""
    return next(module.children(), None) is not None


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
    if "forward" in module.__dict__:
        raise TraceError("forward was replaced on the instance")
    if type(module).forward is nn.Module.forward:
        raise TraceError("it has no forward")
    if _calls(type(module).forward, "type"):
        raise TraceError("forward asks for the type of a value")
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty]
    if not required or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in required):
        raise TraceError("forward does not take a fixed list of positional arguments")
    return [p.name for p in required]


def _calls(function: Any, name: str) -> bool:
    """Return whether a function names what is global or built in."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and name in names_of(code).globals


def _text(graph: fx.Graph) -> list[str]:
    return [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.nodes]
