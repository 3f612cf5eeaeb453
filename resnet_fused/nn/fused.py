"""A module whose forward runs a program, while it stays an instance of its own class."""

from __future__ import annotations

import copy
import functools
import itertools
import types
from typing import Any

import torch
from torch import fx, nn

from resnet_fused.backends import _derived
from resnet_fused.nn.program import Program

_ATTRIBUTE = "_fused_program"
_ORIGINAL = "_fused_from"


class FusedModule:
    """Mixed in before a module's class by :func:`install`.

    The children, parameters, hooks and the class's other methods are the module's own; only
    ``forward`` is another, and it goes back to the class's for every call it was not made for.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Leave the class's own hook out: whoever keeps a list of subclasses has the class."""

    def _run(
        self, original: Any, traced: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the fused program where it applies, else the class's own forward."""
        assert isinstance(self, nn.Module)
        # A slice of a fused Sequential is another object of its class, with no program. And the
        # class may have been given another forward since.
        program = program_of(self) if original.forward is traced else None
        bound = None if program is None else program.bind(self, args, kwargs)
        if program is None or bound is None:
            return original.forward(self, *args, **kwargs)
        return program.run(bound, args)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Let go of what is kept for parameters that are to be swapped for others."""
        _forget_swapped(self)
        applied: Any = super()
        return applied._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Likewise, as a module is loaded before its children."""
        _forget_swapped(self)
        loading: Any = super()
        loading._load_from_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the original class plus the state: the mixed class is made, not imported."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *state = reduced
        if arguments and arguments[0] is type(self):
            return (_rebuild, (class_of(self), make, arguments[1:]), *state)
        return (make, arguments, *state)


def _forget_swapped(module: Any) -> None:
    if torch.__future__.get_swap_module_params_on_conversion():
        _derived.forget(itertools.chain(module.parameters(), module.buffers()))


def _rebuild(original: Any, make: Any, arguments: tuple[Any, ...]) -> Any:
    return make(_fused_class(original, original.forward), *arguments)


@functools.cache
def _fused_class(original: Any, traced: Any) -> Any:
    run = FusedModule._run

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, original, traced, args, kwargs)

    # TorchScript compiles the original's source, to which wraps leads, by the names it finds here.
    names = getattr(traced, "__globals__", {})
    named = types.FunctionType(forward.__code__, names, closure=forward.__closure__)
    # Wrapped, so that whoever asks for the forward's signature sees the original's.
    wrapped = functools.wraps(traced)(named)
    members = {"__doc__": original.__doc__, "forward": wrapped, _ORIGINAL: original}
    if issubclass(original, fx.GraphModule):
        members |= {"recompile": _recompile, "__deepcopy__": _copy_graph}
    return type(f"Fused{original.__name__}", (FusedModule, original), members)


def _recompile(self: Any) -> Any:
    """Unfuse: a GraphModule writes its forward, of a graph that may be another, into its class."""
    remove(self)
    return self.recompile()


def _copy_graph(self: Any, memo: dict[int, Any]) -> Any:
    """Copy as what it was: a GraphModule makes each copy a class of its own."""
    program = program_of(self)
    remove(self)
    try:
        copied = copy.deepcopy(self, memo)
    finally:
        if program is not None:
            install(self, program)
    if program is not None:
        install(copied, program)
    return copied


def install(module: nn.Module, program: Program) -> None:
    """Make ``module`` run ``program``."""
    module.__dict__[_ATTRIBUTE] = program
    original: Any = type(module)
    module.__class__ = _fused_class(original, original.forward)


def remove(module: nn.Module) -> None:
    """Give ``module`` its class and forward back, if they were exchanged."""
    if isinstance(module, FusedModule):
        module.__class__ = class_of(module)
        module.__dict__.pop(_ATTRIBUTE, None)


def class_of(module: Any) -> Any:
    """Return the class of ``module`` as it was before :func:`install`.

    Of a class that was derived since, as FSDP and parametrizations do, one derived likewise.
    """
    kind: Any = type(module)
    return _without_fused(kind)


@functools.cache
def _without_fused(kind: Any) -> Any:
    if _ORIGINAL in kind.__dict__:
        return kind.__dict__[_ORIGINAL]
    if not issubclass(kind, FusedModule):
        return kind
    bases = tuple(_without_fused(base) for base in kind.__bases__)
    own = {k: v for k, v in kind.__dict__.items() if k not in ("__dict__", "__weakref__")}
    name = kind.__name__
    for fused, base in zip(kind.__bases__, bases, strict=True):
        name = name.replace(fused.__name__, base.__name__)
    return type(name, bases, own)


def program_of(module: nn.Module) -> Program | None:
    """Return the program ``module`` runs, or None if it is not fused."""
    return module.__dict__.get(_ATTRIBUTE)
