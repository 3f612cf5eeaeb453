"""A module whose forward runs a program, while it stays an instance of its own class."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from resnet_fused.nn.program import Program

_ATTRIBUTE = "_fused_program"


class FusedModule:
    """Mixed in before a module's class by :func:`install`.

    The children, parameters, hooks and the class's other methods are the module's own; only
    ``forward`` is another, and it goes back to the class's for every call it was not made for.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the fused program where it applies, else the class's own forward."""
        assert isinstance(self, nn.Module)
        # A slice of a fused Sequential is another object of its class, with no program.
        program = program_of(self)
        bound = None if program is None else program.bind(self, args, kwargs)
        if program is None or bound is None:
            own: Any = super()
            return own.forward(*args, **kwargs)
        return program.run(bound, args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the original class plus the state: the mixed class is made, not imported."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *state = reduced
        if arguments and arguments[0] is type(self):
            return (_rebuild, (class_of(self), make, arguments[1:]), *state)
        return (make, arguments, *state)


def _rebuild(original: type, make: Any, arguments: tuple[Any, ...]) -> Any:
    return make(_fused_class(original), *arguments)


@functools.cache
def _fused_class(original: Any) -> Any:
    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FusedModule.forward(self, *args, **kwargs)

    # Wrapped, so that whoever asks for the forward's signature sees the original's.
    members = {"__doc__": original.__doc__, "forward": forward}
    return type(f"Fused{original.__name__}", (FusedModule, original), members)


def install(module: nn.Module, program: Program) -> None:
    """Make ``module`` run ``program``."""
    module.__dict__[_ATTRIBUTE] = program
    original: Any = type(module)
    module.__class__ = _fused_class(original)


def remove(module: nn.Module) -> None:
    """Give ``module`` its class and forward back, if they were exchanged."""
    if isinstance(module, FusedModule):
        module.__class__ = class_of(module)
        del module.__dict__[_ATTRIBUTE]


def class_of(module: Any) -> Any:
    """Return the class of ``module`` as it was before :func:`install`."""
    return type(module).__bases__[1] if isinstance(module, FusedModule) else type(module)


def program_of(module: nn.Module) -> Program | None:
    """Return the program ``module`` runs, or None if it is not fused."""
    return module.__dict__.get(_ATTRIBUTE)
