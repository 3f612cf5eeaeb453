"""A module as a program knows it: what must still hold for the steps to stand for its forward."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.nn.trace import has_hooks

#: Values that say all about themselves.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
#: What is the same as long as it is the same object.
_FIXED = (types.FunctionType, types.BuiltinFunctionType, type)
#: Members of a collection that are looked at one by one, in every call.
_LONG = 64
_TORCHS_OWN = frozenset(nn.Module().__dict__)


@dataclass(frozen=True)
class Child:
    """A submodule, or the module itself, as the program knows it."""

    path: tuple[str, ...]
    #: Whether no step calls it any more; a hook on it then sends the call the old way.
    bypassed: bool
    #: The class it must have, if the steps stand for that class's forward.
    kind: type | None
    #: What its other attributes must be like, if the steps stand for its forward.
    attributes: tuple[tuple[str, Any], ...]
    #: Of its children, and if the steps stand for its forward of its parameters and buffers, in
    #: order: whether None stands in their place.
    absent: tuple[tuple[bool, ...], ...]

    @property
    def name(self) -> str:
        """Its fully qualified name in the module that runs the program."""
        return ".".join(self.path)

    def of(self, module: nn.Module) -> nn.Module | None:
        """Return the submodule of the one that runs the program, if it is there."""
        found: nn.Module | None = module
        for name in self.path:
            found = found._modules.get(name) if found is not None else None
        return found

    def holds(self, module: nn.Module) -> bool:
        """Return whether ``module`` is still what the steps were made for."""
        if self.bypassed and has_hooks(module):
            return False
        if self.kind is not None and type(module) is not self.kind:
            return False
        if self.absent:
            registered: list[Mapping[str, Any]]
            registered = [module._modules, module._parameters, module._buffers]
            for members, absent in zip(registered, self.absent, strict=False):
                if (members or absent) and _absent(members) != absent:
                    return False
        # A loop that asks first whether it is the very same, as this runs in every call.
        now = module.__dict__
        for name, like in self.attributes:
            if name not in now:
                return False
            if now[name] is not like and likeness(now[name]) != like:
                return False
        return True


def _absent(members: Mapping[str, Any]) -> tuple[bool, ...]:
    return tuple([member is None for member in members.values()])


def child_of(
    module: nn.Module, name: str, *, bypassed: bool, fixed: bool, traced: bool, iterated: bool
) -> Child:
    """Describe ``module`` as it is now.

    Args:
        module: the submodule.
        name: its fully qualified name.
        bypassed: whether no step calls it any more.
        fixed: whether it must keep its class.
        traced: whether the steps stand for its forward.
        iterated: whether they call some of its children by name, as a forward went through them.
    """
    registered: list[Mapping[str, Any]] = []
    if traced or iterated:
        registered = [module._modules]
    if traced:
        registered += [module._parameters, module._buffers]
    return Child(
        path=tuple(name.split(".")) if name else (),
        bypassed=bypassed,
        kind=type(module) if fixed else None,
        attributes=_attributes(module) if traced else (),
        absent=tuple(map(_absent, registered)),
    )


def _attributes(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Return what a forward may have branched on, computed with or called."""
    own = module.__dict__.items()
    return tuple((name, likeness(v)) for name, v in own if name not in _TORCHS_OWN)


def likeness(value: Any, depth: int = 2) -> Any:
    """Return what equals that of another value if a forward would do the same with both.

    A copy of a value is like it. Of long or deeply nested ones it is their class and length, of an
    object of a class that nobody knows the class and its attributes, such as a configuration has.
    """
    if isinstance(value, PLAIN):
        return value if value == value else type(value)  # NaN is not like itself
    if isinstance(value, types.MethodType):
        return value.__func__
    if isinstance(value, _FIXED):
        return value
    kind = type(value)
    if isinstance(value, tuple | list | dict):
        if not depth or len(value) > _LONG:
            return kind, len(value)
        items = value.items() if isinstance(value, dict) else enumerate(value)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, Tensor | nn.Module):
        items = vars(value).items()
    else:
        return kind
    return kind, *((name, likeness(v, depth - 1)) for name, v in items)
